"""The verb `verify`: proof, on a trained model, that drafting changes nothing."""

import argparse
import dataclasses
import functools
import json
from collections.abc import Callable
from typing import TYPE_CHECKING

from mtp_jax.cli.args import Parser, add_data, positive_int

if TYPE_CHECKING:
    from mtp_jax.data.tokenizer import Tokenizer
    from mtp_jax.verification.greedy import Difference
    from mtp_jax.verification.subject import Check

_EXAMPLES = 10  # differences that are told one by one
_ROW = "{:<12}{:<{widest}} {:<26} {:>8}  {:<28}{}"


def main(argv: list[str]) -> int:
    """Prints a line a check; 1 if there is any difference or a control found none.

    Raises:
      UserError: a flag, or a run directory that does not fit.
    """
    args = _parse(argv)

    # Not before the flags are known to be good: these import JAX.
    from mtp_jax.checkpoint import restore
    from mtp_jax.cli.decoder_args import decoder_of
    from mtp_jax.verification.settings import VerifySettings
    from mtp_jax.verification.verifier import exact_decoders, verify

    asked = {spec: decoder_of(spec) for spec in args.decoder}
    restored = restore.restore_model(args.workdir, step=args.step, heads=args.heads)
    restored = restored.with_data(args.data)
    chosen, left_out = exact_decoders(restored.config.model.n_future_tokens, asked)
    settings = VerifySettings(
        prompts=args.heldout,
        prompt_tokens=args.prompt_tokens,
        max_new_tokens=args.max_new_tokens,
        batch_sizes=args.batch_sizes,
        dtype=args.dtype,
        near_tie=args.near_tie,
        allow_near_ties=args.allow_near_ties,
        temperature=args.temperature,
        top_k=args.top_k,
        distribution_tokens=args.law_tokens,
        distribution_prompts=args.law_prompts,
        distribution_tolerance=args.law_tolerance,
        samples=args.samples,
        least_p=args.least_p,
    )
    checks = []
    row = functools.partial(_ROW.format, widest=max(16, *map(len, chosen)))
    running = verify(restored, decoders=chosen, settings=settings)
    if not args.json:
        print(row("check", "decoder", "setting", "compared", "found", ""))
    for check in running:
        checks.append(check)
        if not args.json:
            print(_shown(check, restored.tokenizer, row), flush=True)
    ok = all(check.ok for check in checks)
    if args.json:
        rows = [dataclasses.asdict(check) for check in checks]
        print(json.dumps({"ok": ok, "checks": rows, "left_out": left_out}))
        return 0 if ok else 1
    for name, why in left_out.items():
        print(f"left out: {name} ({why})")
    failed = sum(not check.ok for check in checks)
    print("drafting changes nothing" if ok else f"{failed} checks failed")
    return 0 if ok else 1


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(
        "mtp-jax verify", "Proves on a trained model that drafting changes nothing."
    )
    add = parser.add_argument
    add("--workdir", required=True, metavar="D", help="directory of the run")
    add("--step", type=int, metavar="S", help="checkpoint; the latest if not given")
    add("--heads", type=positive_int, metavar="K", help="use the first so many heads")
    add("--decoder", action="append", default=[], metavar="NAME[:OPTION=VALUE,...]",
        help="may be repeated; all that claim to be exact")  # fmt: skip
    add("--heldout", type=positive_int, default=16, metavar="K",
        help="held-out prompts (16)")  # fmt: skip
    add("--prompt_tokens", type=_numbers, default=(8, 64), metavar="N,N",
        help="their lengths, in turn (8,64)")  # fmt: skip
    add("--max_new_tokens", type=positive_int, default=64, metavar="N",
        help="of a greedy text (64)")  # fmt: skip
    add("--batch_sizes", type=_numbers, default=(1, 4, 16), metavar="N,N",
        help="(1,4,16)")  # fmt: skip
    add("--dtype", choices=("float32", "bfloat16"), default="float32",
        help="to compute in (float32)")  # fmt: skip
    add("--near_tie", type=float, metavar="X",
        help="logits no further apart may change places by rounding "
        "(1e-4; with bfloat16 0.25)")  # fmt: skip
    add("--allow_near_ties", action="store_true",
        help="texts that part at a near-tie do not fail")  # fmt: skip
    add("--temperature", type=float, default=1.0, metavar="X", help="of sampling (1.0)")
    add("--top_k", type=positive_int, default=2, metavar="K", help="of sampling (2)")
    add("--law_tokens", type=positive_int, default=3, metavar="N",
        help="tokens whose law is compared (3)")  # fmt: skip
    add("--law_prompts", type=positive_int, default=2, metavar="K",
        help="prompts that this is done for (2)")  # fmt: skip
    add("--law_tolerance", type=float, default=1e-5, metavar="X",
        help="sum of all differences allowed for rounding (1e-5)")  # fmt: skip
    add("--samples", type=positive_int, default=2048, metavar="N",
        help="texts drawn for the chi-square test (2048)")  # fmt: skip
    add("--least_p", type=float, default=1e-4, metavar="P",
        help="p-value below which it fails (1e-4)")  # fmt: skip
    add("--json", action="store_true", help="print one JSON object, no more")
    add_data(parser)
    return parser.parse_args(argv)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(positive_int(part) for part in text.split(","))


def _shown(check: "Check", tokenizer: "Tokenizer", row: Callable[..., str]) -> str:
    result = "ok" if check.ok else "FAILED"
    if check.what == "control" and check.ok:
        result = "caught"
    lines = [row(check.what, check.decoder, check.setting, check.compared,
                 check.found, result)]  # fmt: skip
    lines += [_told(d, tokenizer) for d in check.differences[:_EXAMPLES]]
    if len(check.differences) > _EXAMPLES:
        lines.append(f"  and {len(check.differences) - _EXAMPLES} more (--json)")
    return "\n".join(lines)


def _told(d: "Difference", tokenizer: "Tokenizer") -> str:
    from mtp_jax.decode.text_stream import Continuation

    within = Continuation(tokenizer, tokenizer.encode("a"))
    a, b = (
        "nothing" if x is None else repr(within.decode([x])) for x in (d.plain, d.other)
    )
    gap = "" if d.gap is None else f"; plain's is {d.gap:+.2g} ahead"
    tie = ", a near-tie" if d.near_tie else ""
    return f"  prompt {d.prompt}, new token {d.position}: {b} instead of {a}{gap}{tie}"
