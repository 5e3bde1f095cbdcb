"""The verb `generate`: continues prompts with a trained model."""

import argparse
import dataclasses
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from mtp_jax.cli_args import Parser, positive_int
from mtp_jax.errors import UserError

_REPEATS = 2  # runs of each decoder that --compare times; the fastest counts


def main(argv: list[str]) -> int:
    """Prints continuations; with --compare, 1 if decoders disagree.

    Raises:
      UserError: a flag, a prompt file, or a run directory that does not fit.
    """
    args = _parse(argv)
    prompts: Sequence[Any] = _prompts(args)
    for text in [*prompts, *args.stop]:
        if not _is_text(text):
            raise UserError(f"{text!r} is not valid Unicode text; give it in UTF-8.")

    # Not before the flags are known to be good: this imports JAX.
    from mtp_jax import decode, decoders, restore

    if args.decoder not in decoders.DECODERS:
        known = ", ".join(decoders.DECODERS)
        raise UserError(f"--decoder={args.decoder} is unknown; give one of {known}.")
    heads = args.heads
    if heads is None and args.decoder == "plain" and not args.compare:
        heads = 1  # the others would only take memory
    restored = restore.restore_model(args.workdir, step=args.step, heads=heads)
    if args.heldout:
        prompts = heldout_prompts(
            restored.config.data.sources, args.heldout, args.prompt_tokens
        )
    generator = decode.Generator(
        restored.config.model, restored.params, restored.tokenizer, restored.mesh
    )
    settings = {
        "max_new_tokens": args.max_new_tokens,
        "stop": [_unescape(text) for text in args.stop],
        "heads": heads,
    }
    if args.compare:
        return _compare(generator, list(decoders.DECODERS), prompts, settings)
    results = generator.generate(prompts, decoder=args.decoder, **settings)
    for result in results:
        print(json.dumps(dataclasses.asdict(result)) if args.json else _shown(result))
    if not args.json:
        print(_summary(args.decoder, results))
    return 0


def heldout_prompts(
    sources: Sequence[str], count: int, prompt_tokens: int
) -> list[np.ndarray]:
    """Token ids from inside held-out documents, the same ones every time.

    The documents are spread evenly over those that are long enough; a document that is
    used several times is cut at several places.

    Raises:
      UserError: a source is not a corpus, or no document is long enough.
    """
    from mtp_jax.corpus import Corpus

    splits = [Corpus.open(source).documents("heldout") for source in sources]
    # A document begins and ends with an id of its own; a prompt holds neither.
    spare = [(s, i, int(n) - 2 - prompt_tokens) for s in splits
             for i, n in enumerate(s.lengths)]  # fmt: skip
    fitting = [(split, i, room) for split, i, room in spare if room >= 0]
    if not fitting:
        longest = max((room + prompt_tokens for *_, room in spare), default=0)
        raise UserError(
            f"no held-out document of {', '.join(sources)} has {prompt_tokens} tokens "
            f"(the longest has {max(longest, 0)}); give a smaller --prompt_tokens."
        )
    chosen = [j * len(fitting) // count for j in range(count)]
    prompts = []
    for j, choice in enumerate(chosen):
        split, i, room = fitting[choice]
        which, uses = j - chosen.index(choice), chosen.count(choice)
        start = 1 + room * (which + 1) // (uses + 1)
        prompts.append(split.tokens(i, start, start + prompt_tokens).astype(np.int32))
    return prompts


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser("mtp-jax generate", "Continues prompts with a trained model.")
    parser.add_argument("--workdir", required=True, help="directory of the run")
    parser.add_argument("--step", type=int, help="checkpoint; the latest if not given")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", help="a text to continue")
    source.add_argument(
        "--prompts",
        metavar="FILE",
        help="a prompt a line; .jsonl: objects with `prompt`; -: standard input",
    )
    source.add_argument(
        "--heldout", type=positive_int, metavar="K", help="K held-out beginnings"
    )
    parser.add_argument(
        "--prompt_tokens",
        type=positive_int,
        default=64,
        help="tokens of a held-out prompt (64)",
    )
    parser.add_argument(
        "--decoder",
        default="blockwise",
        help="plain: one token a forward pass; blockwise: the other heads draft, the "
        "first verifies, and the text is that of plain (blockwise)",
    )
    parser.add_argument(
        "--heads", type=positive_int, help="use the first so many heads; all"
    )
    parser.add_argument(
        "--max_new_tokens", type=positive_int, default=128, help="(128)"
    )
    parser.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help=r"end before this text; may be repeated; \n, \t and \\ are understood",
    )
    output = parser.add_mutually_exclusive_group()
    output.add_argument(
        "--compare", action="store_true", help="every decoder on the same prompts"
    )
    output.add_argument(
        "--json", action="store_true", help="print a JSON object a prompt, no more"
    )
    args = parser.parse_args(argv)
    if "" in args.stop:
        raise UserError("--stop is empty; give the text that ends a continuation.")
    return args


def _prompts(args: argparse.Namespace) -> list[str]:
    """Those of --prompt or --prompts; none for --heldout."""
    if args.prompt is not None:
        return [args.prompt]
    if args.prompts is None:
        return []
    name = "standard input" if args.prompts == "-" else args.prompts
    try:
        if args.prompts == "-":
            data = sys.stdin.buffer.read()
        else:
            data = pathlib.Path(args.prompts).read_bytes()
        text = data.decode("utf-8")
    except OSError as error:
        raise UserError(
            f"--prompts: {name} cannot be read: {error.strerror}."
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"--prompts: {name} is not UTF-8 (byte {error.start}); convert it."
        ) from None
    # Not splitlines(): a prompt may hold other characters that end lines.
    lines = text.removesuffix("\n").split("\n") if text else []
    if name.endswith(".jsonl"):
        lines = [_of_json(s, name, i) for i, s in enumerate(lines, 1) if s.strip()]
    if not lines:
        raise UserError(f"--prompts: {name} is empty; give at least one prompt.")
    return lines


def _is_text(text: str) -> bool:
    """False with a lone surrogate, as JSON and command lines may bring one."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _of_json(line: str, name: str, number: int) -> str:
    try:
        value = json.loads(line)
    except ValueError:
        value = None
    prompt = value.get("prompt") if isinstance(value, dict) else None
    if not isinstance(prompt, str):
        raise UserError(
            f'--prompts: line {number} of {name} is not {{"prompt": "TEXT"}} in JSON.'
        )
    return prompt


def _unescape(text: str) -> str:
    """`\\n`, `\\t` and `\\\\` as the characters they stand for."""
    parts = text.split("\\\\")
    return "\\".join(p.replace("\\n", "\n").replace("\\t", "\t") for p in parts)


def _shown(result: Any) -> str:
    return (
        f"{result.prompt}{result.text}\n"
        f"[{len(result.tokens)} tokens, {result.forwards} forward passes, "
        f"{result.tokens_per_forward:.2f} tokens a pass, ended by {result.finish}]\n"
    )


def _totals(results: Sequence[Any]) -> tuple[int, float]:
    """Forward passes, and tokens a pass, of all texts."""
    forwards = sum(r.forwards for r in results)
    made = sum(r.tokens_per_forward * r.forwards for r in results)
    return forwards, made / forwards


def _summary(decoder: str, results: Sequence[Any]) -> str:
    forwards, per_forward = _totals(results)
    return (
        f"{decoder}: {len(results)} texts, {forwards} forward passes, "
        f"{per_forward:.2f} tokens a pass, {results[0].tokens_per_s:.0f} tokens/s"
    )


def _compare(
    generator: Any, names: list[str], prompts: Sequence[Any], settings: dict[str, Any]
) -> int:
    """Prints a line a decoder; 1 if a text differs from that of plain."""
    header = "decoder", "forwards", "tokens/forward", "tokens/s", "ratio", "equal"
    row = "{:<12}{:>10}{:>16}{:>12}{:>8}{:>12}".format
    print(row(*header))
    reference: list[str] = []
    plain_speed, differs = 0.0, False
    for name in ["plain", *(name for name in names if name != "plain")]:
        runs = [
            generator.generate(prompts, decoder=name, **settings)
            for _ in range(_REPEATS)
        ]
        results = max(runs, key=lambda run: run[0].tokens_per_s)
        texts, speed = [r.text for r in results], results[0].tokens_per_s
        reference = reference or texts
        plain_speed = plain_speed or speed
        equal = sum(a == b for a, b in zip(texts, reference, strict=True))
        differs |= equal < len(texts)
        forwards, per_forward = _totals(results)
        print(
            row(
                name,
                forwards,
                f"{per_forward:.2f}",
                f"{speed:.1f}",
                f"{speed / plain_speed:.2f}",
                f"{equal} of {len(texts)}",
            )
        )
    return 1 if differs else 0
