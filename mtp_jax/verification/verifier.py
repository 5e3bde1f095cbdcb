"""The verb `verify`: proof, on a trained model, that drafting changes nothing."""

import argparse
import dataclasses
import functools
import json
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from mtp_jax.checkpoint.restore import Restored, restore_model
from mtp_jax.cli.args import Parser, positive_int
from mtp_jax.cli.decoder_args import decoder_of, fitting
from mtp_jax.config import ModelConfig
from mtp_jax.data.prompts import heldout_prompts
from mtp_jax.decode.decode_model import unstack
from mtp_jax.decode.decoders.plain import Plain
from mtp_jax.decode.decoders.sampling import Sampling
from mtp_jax.decode.decoders.state import Decoder, ReadsTables
from mtp_jax.decode.generation import Generation
from mtp_jax.decode.generator import Generator
from mtp_jax.decode.programs import Programs
from mtp_jax.errors import UserError
from mtp_jax.verification.exact_distribution import (
    TooManyDraws,
    decoder_distribution,
    distance,
    head_one,
    head_one_distribution,
)
from mtp_jax.verification.greedy import Difference, first_difference, written
from mtp_jax.verification.sampling_tests import Trusting, WithoutRest, chi_square

_TIES = {"float32": 1e-4, "bfloat16": 0.25}
_CONTROL_PROMPTS, _CONTROL_TOKENS = 4, 32
_SAMPLE_BATCH = 256
_EXAMPLES = 10  # differences that are told one by one


@dataclasses.dataclass(frozen=True)
class Check:
    """A line of the result."""

    what: str
    decoder: str
    setting: str
    compared: int
    found: str
    ok: bool
    differences: tuple[Difference, ...] = ()


def main(argv: list[str]) -> int:
    """Prints a line a check; 1 if there is any difference or a control found none.

    Raises:
      UserError: a flag, or a run directory that does not fit.
    """
    args = _parse(argv)
    chosen = {spec: decoder_of(spec) for spec in args.decoder}
    restored = restore_model(args.workdir, step=args.step, heads=args.heads)
    n = restored.config.model.n_future_tokens
    if n == 1:
        raise UserError("there is one head, so nothing drafts: nothing to verify.")
    left_out = {}
    if not chosen:
        fit = fitting(n)
        left_out = {k: d for k, d in fit.items() if isinstance(d, str)}
        chosen = {k: d for k, d in fit.items() if not isinstance(d, str)}
    lossy = [name for name, decoder in chosen.items() if decoder.lossy]
    left_out |= {name: "lossy: it claims no such thing" for name in lossy}
    chosen = {name: d for name, d in chosen.items() if name not in lossy}
    if not chosen:
        raise UserError(
            f"--decoder={lossy[0]} is lossy: it claims nothing that could be verified; "
            "give an exact one."
        )
    verifier = _Verifier(restored, args, chosen)
    checks = []
    row = functools.partial(_ROW.format, widest=max(16, *map(len, chosen)))
    if not args.json:
        print(row("check", "decoder", "setting", "compared", "found", ""))
    for check in verifier.checks():
        checks.append(check)
        if not args.json:
            print(_shown(check, verifier, row), flush=True)
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
    add("--dtype", choices=tuple(_TIES), default="float32",
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
    return parser.parse_args(argv)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(positive_int(part) for part in text.split(","))


class _Verifier:
    """A model, its prompts, and what they are decoded with."""

    def __init__(
        self,
        restored: Restored,
        args: argparse.Namespace,
        decoders: dict[str, Decoder],
    ):
        self.args = args
        self.decoders = {k: d for k, d in decoders.items() if k != "plain"}
        self.tie = _TIES[args.dtype] if args.near_tie is None else args.near_tie
        cfg = dataclasses.replace(restored.config.model, compute_dtype=args.dtype)
        run = dataclasses.replace(restored.config, model=cfg)
        self.restored = dataclasses.replace(restored, config=run)
        self.tokenizer = restored.tokenizer
        self.generator = Generator.from_restored(self.restored)
        # Laws are always compared in float32, whose rounding is far below them.
        exact = dataclasses.replace(cfg, compute_dtype="float32")
        self.exact_cfg = exact
        self.sampling = Sampling(temperature=args.temperature, top_k=args.top_k)
        longest = max(args.prompt_tokens)
        whole = heldout_prompts(run.data.sources, args.heldout, longest)
        lengths = [args.prompt_tokens[i % len(args.prompt_tokens)]
                   for i in range(len(whole))]  # fmt: skip
        self.prompts = [p[-k:] for p, k in zip(whole, lengths, strict=True)]
        with jax.set_mesh(restored.mesh):
            self.next_logits = head_one(exact, restored.params)

    def ids(self, number: int) -> list[int]:
        """A prompt's token ids, begin of text first."""
        return [self.tokenizer.bos_id, *map(int, self.prompts[number])]

    def checks(self) -> Iterator[Check]:
        """All of them, one by one."""
        yield from self._greedy()
        yield from self._distributions()
        yield from self._samples()

    def _greedy(self) -> Iterator[Check]:
        args = self.args
        reference: list[Generation] = []
        for size in args.batch_sizes:
            for name, decoder in {"plain": Plain(), **self.decoders}.items():
                results = self._generate(decoder, args.max_new_tokens, size)
                if not reference:  # plain, at the first batch size
                    reference = results
                    continue
                found = self._differences(reference, results)
                yield self._text_check("equal texts", name, f"batch {size}", found)
        few = range(min(_CONTROL_PROMPTS, len(self.prompts)))
        tokens = min(_CONTROL_TOKENS, args.max_new_tokens)
        plain, broken = (
            self._generate(decoder, tokens, len(few), len(few))
            for decoder in (Plain(), Trusting())
        )
        found = self._differences(plain, broken)
        wrong = [d for d in found if not d.near_tie]
        yield Check(
            "control", "all drafts pass", "greedy", len(few),
            f"{len(wrong)} differ" if wrong else "not caught", bool(wrong),
        )  # fmt: skip

    def _generate(
        self, decoder: Decoder, tokens: int, size: int, count: int | None = None
    ) -> list[Generation]:
        return self.generator.generate(
            self.prompts[:count], max_new_tokens=tokens, decoder=decoder,
            batch_size=size,
        )  # fmt: skip

    def _differences(
        self, plain: list[Generation], others: list[Generation]
    ) -> list[Difference]:
        with jax.set_mesh(self.restored.mesh):
            found = [
                first_difference(
                    number, self.ids(number), a, b, self.tokenizer.eos_id,
                    self.next_logits, self.tie,
                )
                for number, (a, b) in enumerate(zip(plain, others, strict=True))
            ]  # fmt: skip
        return [x for x in found if x is not None]

    def _text_check(
        self, what: str, name: str, setting: str, found: list[Difference]
    ) -> Check:
        ties = sum(x.near_tie for x in found)
        wrong = len(found) - ties
        ok = not wrong and (not ties or self.args.allow_near_ties)
        text = f"{wrong} differ, {ties} at near-ties"
        return Check(what, name, setting, len(self.prompts), text, ok, tuple(found))

    def _distributions(self) -> Iterator[Check]:
        args, cfg = self.args, self.exact_cfg
        count = min(args.law_prompts, len(self.prompts))
        with jax.set_mesh(self.restored.mesh):
            programs = Programs(cfg, self.tokenizer.eos_id)
            params = unstack(cfg, self.restored.params)
            right = [self._right_distribution(number) for number in range(count)]

            def furthest(decoder: Decoder, heads: int, count: int) -> float:
                kept = {**params, "heads": params["heads"][: decoder.heads(heads)]}
                if isinstance(decoder, ReadsTables):
                    kept["tables"] = self.generator.tables_of(decoder)
                distributions = [
                    decoder_distribution(
                        programs, kept, decoder,
                        self.ids(number), args.law_tokens, self.sampling,
                        rows=_rows_at_a_time(cfg, max(args.prompt_tokens)),
                    )
                    for number in range(count)
                ]  # fmt: skip
                return max(map(distance, distributions, right))

            for name, decoder in self.decoders.items():
                yield self._distribution_check(name, decoder, furthest, count)
            far = furthest(WithoutRest(), 2, 1)
            caught = far > args.law_tolerance
            yield Check(
                "control", "no rest law", "enumerated, 2 heads", 1,
                f"sum |p - q| {far:.1e}" if caught else "not caught", caught,
            )  # fmt: skip

    def _distribution_check(
        self, name: str, decoder: Decoder, furthest, count: int
    ) -> Check:
        """With as many heads as can be enumerated."""
        n = self.exact_cfg.n_future_tokens
        for heads in range(n, 1, -1):
            try:
                far = furthest(decoder, heads, count)
            except TooManyDraws:
                continue
            setting = f"enumerated, {heads} heads"
            ok = far <= self.args.law_tolerance
            found = f"sum |p - q| {far:.1e}"
            return Check("law", name, setting, count, found, ok)
        return Check(
            "law", name, "enumerated", 0, "too many draws; see chi-square", True
        )

    def _right_distribution(self, number: int):
        return head_one_distribution(
            self.next_logits, self.ids(number), self.args.law_tokens, self.sampling,
            self.tokenizer.eos_id,
        )  # fmt: skip

    def _samples(self) -> Iterator[Check]:
        args = self.args
        with jax.set_mesh(self.restored.mesh):
            distribution = self._right_distribution(0)
        controls: dict[str, Any] = {"all drafts pass": Trusting()}
        for name, decoder in {**self.decoders, **controls}.items():
            results = self.generator.generate(
                [np.asarray(self.prompts[0])] * args.samples,
                max_new_tokens=args.law_tokens, decoder=decoder,
                sampling=self.sampling, batch_size=min(_SAMPLE_BATCH, args.samples),
            )  # fmt: skip
            texts = [written(r, self.tokenizer.eos_id) for r in results]
            test = chi_square(texts, distribution)
            agrees = test.p_value >= args.least_p
            setting = f"chi-square, {test.freedom} degrees"
            found = f"{test.statistic:.1f}, p = {test.p_value:.2g}"
            if name in controls:
                if agrees:
                    found += ": too few --samples to notice"
                yield Check("control", name, setting, len(texts), found, not agrees)
            else:
                yield Check("law", name, setting, len(texts), found, agrees)


def _rows_at_a_time(cfg: ModelConfig, prompt_tokens: int) -> int:
    """As many as have caches of a quarter of a GiB, but 8 to 256."""
    entries = 2 * cfg.num_layers * cfg.num_kv_heads * cfg.d_head
    row_bytes = 4 * entries * (2 * prompt_tokens + 64)
    return min(256, max(8, 2**28 // row_bytes))


_ROW = "{:<12}{:<{widest}} {:<26} {:>8}  {:<28}{}"


def _shown(check: Check, verifier: _Verifier, row: Callable[..., str]) -> str:
    result = "ok" if check.ok else "FAILED"
    if check.what == "control" and check.ok:
        result = "caught"
    lines = [row(check.what, check.decoder, check.setting, check.compared,
                 check.found, result)]  # fmt: skip
    for d in check.differences[:_EXAMPLES]:
        a, b = (
            "nothing" if x is None else repr(verifier.tokenizer.decode([x]))
            for x in (d.plain, d.other)
        )
        gap = "" if d.gap is None else f"; plain's is {d.gap:+.2g} ahead"
        tie = ", a near-tie" if d.near_tie else ""
        lines.append(f"  prompt {d.prompt}, new token {d.position}: {b} instead of {a}"
                     f"{gap}{tie}")  # fmt: skip
    if len(check.differences) > _EXAMPLES:
        lines.append(f"  and {len(check.differences) - _EXAMPLES} more (--json)")
    return "\n".join(lines)
