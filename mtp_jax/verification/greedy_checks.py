"""Checks that greedy texts are those of plain decoding, at several batch sizes."""

from collections.abc import Iterator, Sequence

import jax

from mtp_jax.decode.decoders.plain import Plain
from mtp_jax.decode.decoders.state import Decoder
from mtp_jax.decode.generation import Generation
from mtp_jax.verification.greedy import Difference, first_difference
from mtp_jax.verification.sampling_tests import Trusting
from mtp_jax.verification.subject import Check, Subject


def greedy_checks(subject: Subject) -> Iterator[Check]:
    """A check a batch size and decoder, plain's own at other sizes too, and a control.

    The reference is plain decoding at the first batch size. If every depth is asked
    for, the number of heads in use changes from pass to pass at the last size, too.
    """
    settings, n = subject.settings, subject.exact_cfg.n_future_tokens
    reference: list[Generation] = []
    for size in settings.batch_sizes:
        for name, decoder in {"plain": Plain(), **subject.decoders}.items():
            results = _generate(subject, decoder, settings.max_new_tokens, size)
            if not reference:
                reference = results
                continue
            found = _differences(subject, reference, results)
            yield _check(subject, name, f"batch {size}", found)
    if settings.every_depth:
        for name, decoder in subject.decoders.items():
            depths, size = (n, 1, 1, 2, 1, n), settings.batch_sizes[-1]
            results = _generate(subject, decoder, settings.max_new_tokens, size, depths)
            found = _differences(subject, reference, results)
            setting = f"heads {','.join(map(str, depths))}"
            yield _check(subject, name, setting, found)
    yield _control(subject, reference)


def _control(subject: Subject, plain: Sequence[Generation]) -> Check:
    """A decoder whose drafts all pass must differ from plain."""
    tokens, size = subject.settings.max_new_tokens, subject.settings.batch_sizes[-1]
    broken = _generate(subject, Trusting(), tokens, size)
    found = _differences(subject, plain, broken)
    wrong = [d for d in found if not d.near_tie]
    return Check(
        "control",
        "all drafts pass",
        "greedy",
        len(plain),
        f"{len(wrong)} differ" if wrong else "not caught",
        bool(wrong),
    )


def _generate(
    subject: Subject,
    decoder: Decoder,
    tokens: int,
    size: int,
    adaptive: bool | tuple[int, ...] = False,
) -> list[Generation]:
    return subject.generator.generate(
        subject.prompts,
        max_new_tokens=tokens,
        decoder=decoder,
        batch_size=size,
        adaptive=adaptive,
    )


def _differences(
    subject: Subject, plain: Sequence[Generation], others: Sequence[Generation]
) -> list[Difference]:
    with jax.set_mesh(subject.mesh):
        found = [
            first_difference(
                number,
                subject.ids(number),
                a,
                b,
                subject.tokenizer.eos_id,
                subject.next_logits,
                subject.settings.tie,
            )
            for number, (a, b) in enumerate(zip(plain, others, strict=True))
        ]
    return [x for x in found if x is not None]


def _check(
    subject: Subject, name: str, setting: str, found: Sequence[Difference]
) -> Check:
    ties = sum(x.near_tie for x in found)
    wrong = len(found) - ties
    ok = not wrong and (not ties or subject.settings.allow_near_ties)
    text = f"{wrong} differ, {ties} at near-ties"
    compared = len(subject.prompts)
    return Check("equal texts", name, setting, compared, text, ok, tuple(found))
