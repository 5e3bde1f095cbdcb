"""The verb `verify`: proof, on a trained model, that drafting changes nothing."""

import argparse
import dataclasses
import functools
import json
from collections.abc import Callable
from typing import TYPE_CHECKING

from mtp_jax.cli.args import Parser, add_data, add_draft_cache, positive_int
from mtp_jax.errors import counted

if TYPE_CHECKING:
    from mtp_jax.data.tokenizer import Tokenizer
    from mtp_jax.verification.greedy import Difference
    from mtp_jax.verification.subject import Check

_EXAMPLES = 10  # differences that are told one by one
# Flags that set a field of `VerifySettings`, if they are given.
_SETTINGS = {
    "heldout": "prompts",
    "prompt_tokens": "prompt_tokens",
    "max_new_tokens": "max_new_tokens",
    "batch_sizes": "batch_sizes",
    "dtype": "dtype",
    "near_tie": "near_tie",
    "allow_near_ties": "allow_near_ties",
    "temperature": "temperature",
    "top_k": "top_k",
    "law_tokens": "distribution_tokens",
    "law_prompts": "distribution_prompts",
    "law_heads": "distribution_heads",
    "law_tolerance": "distribution_tolerance",
    "samples": "samples",
    "least_p": "least_p",
}
_ROW = "{:<12}{:<{widest}} {:<26} {:>8}  {:<28} {}"


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
    restored = restored.with_data(args.data).with_draft_cache(args.draft_cache)
    chosen, left_out = exact_decoders(restored.config.model, asked)
    given = {name: getattr(args, flag) for flag, name in _SETTINGS.items()}
    given = {name: value for name, value in given.items() if value is not None}
    make = VerifySettings.thorough if args.thorough else VerifySettings
    settings = make(**given)
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
    print("drafting changes nothing" if ok else f"{counted(failed, 'check')} failed")
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
    add("--thorough", action="store_true",
        help="more of everything, in several times the time (after a /)")  # fmt: skip
    add("--heldout", type=positive_int, metavar="K", help="held-out prompts (8/16)")
    add("--prompt_tokens", type=_numbers, metavar="N,N",
        help="their lengths, in turn (8,40/8,64)")  # fmt: skip
    add("--max_new_tokens", type=positive_int, metavar="N",
        help="of a greedy text (64)")  # fmt: skip
    add("--batch_sizes", type=_numbers, metavar="N,N", help="(8/1,4,16)")
    add("--dtype", choices=("float32", "bfloat16"),
        help="to compute in (float32)")  # fmt: skip
    add("--near_tie", type=float, metavar="X",
        help="logits no further apart may change places by rounding "
        "(1e-4; with bfloat16 0.25)")  # fmt: skip
    add("--allow_near_ties", action="store_true",
        help="texts that part at a near-tie do not fail")  # fmt: skip
    add("--temperature", type=float, metavar="X", help="of sampling (1.0)")
    add("--top_k", type=positive_int, metavar="K", help="of sampling (2)")
    add("--law_tokens", type=positive_int, metavar="N",
        help="tokens whose law is compared (3)")  # fmt: skip
    add("--law_prompts", type=positive_int, metavar="K",
        help="prompts that this is done for (1/2)")  # fmt: skip
    add("--law_heads", type=positive_int, metavar="K",
        help="most heads that are used for it (2/all)")  # fmt: skip
    add("--law_tolerance", type=float, metavar="X",
        help="sum of all differences allowed for rounding (1e-5)")  # fmt: skip
    add("--samples", type=positive_int, metavar="N",
        help="texts drawn for the chi-square test (2048)")  # fmt: skip
    add("--least_p", type=float, metavar="P",
        help="p-value below which it fails (1e-4)")  # fmt: skip
    add("--json", action="store_true", help="print one JSON object, no more")
    add_data(parser)
    add_draft_cache(parser)
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
