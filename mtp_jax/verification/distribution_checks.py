"""Checks that the exact distribution of sampled texts is head 1's, by enumeration."""

from collections.abc import Callable, Iterator, Sequence

import jax

from mtp_jax.config import ModelConfig
from mtp_jax.decode.decode_model import unstack
from mtp_jax.decode.decoders.state import Decoder, ReadsTables
from mtp_jax.decode.programs import Programs
from mtp_jax.verification.exact_distribution import (
    TooManyDraws,
    decoder_distribution,
    distance,
)
from mtp_jax.verification.sampling_tests import WithoutRest
from mtp_jax.verification.subject import Check, Subject

# Of a decoder with so many heads, over prompts of these numbers: the largest
# sum |p - q|.
Furthest = Callable[[Decoder, int, Sequence[int]], float]


def distribution_checks(subject: Subject) -> Iterator[Check]:
    """A check a decoder, and a control that leaves out what follows a rejection."""
    settings = subject.settings
    count = min(settings.distribution_prompts, len(subject.prompts))
    furthest = _furthest(subject)
    for name, decoder in subject.decoders.items():
        yield _check(subject, name, decoder, furthest, count)
    caught, tried, far = False, 0, 0.0
    # Where head 2 drafts what head 1 never says, what follows a rejection is the same.
    while not caught and tried < len(subject.prompts):
        far = furthest(WithoutRest(), 2, [subject.open_prompts[tried]])
        caught = far > settings.distribution_tolerance
        tried += 1
    yield Check(
        "control",
        "no rest law",
        "enumerated, 2 heads",
        tried,
        f"sum |p - q| {far:.1e}" if caught else "not caught",
        caught,
    )


def _furthest(subject: Subject) -> Furthest:
    cfg, settings = subject.exact_cfg, subject.settings
    with jax.set_mesh(subject.mesh):
        tokenizer = subject.tokenizer
        programs = Programs(cfg, tokenizer.end_ids, tokenizer.vocab_size)
        params = unstack(cfg, subject.params)

    def furthest(decoder: Decoder, heads: int, numbers: Sequence[int]) -> float:
        kept = {**params, "heads": params["heads"][: decoder.heads(heads)]}
        if isinstance(decoder, ReadsTables):
            kept["tables"] = subject.generator.tables_of(decoder)
        with jax.set_mesh(subject.mesh):
            found = [
                decoder_distribution(
                    programs,
                    kept,
                    decoder,
                    subject.ids(number),
                    settings.distribution_tokens,
                    subject.sampling,
                    rows=_rows_at_a_time(cfg, max(settings.prompt_tokens)),
                )
                for number in numbers
            ]
        right = [subject.right_distribution(number) for number in numbers]
        return max(map(distance, found, right))

    return furthest


def _check(
    subject: Subject, name: str, decoder: Decoder, furthest: Furthest, count: int
) -> Check:
    """With as many heads as can be enumerated."""
    n, most = subject.exact_cfg.n_future_tokens, subject.settings.distribution_heads
    for heads in range(n if most is None else min(n, most), 1, -1):
        try:
            far = furthest(decoder, heads, range(count))
        except TooManyDraws:
            continue
        setting = f"enumerated, {heads} heads"
        ok = far <= subject.settings.distribution_tolerance
        return Check("law", name, setting, count, f"sum |p - q| {far:.1e}", ok)
    return Check("law", name, "enumerated", 0, "too many draws; see chi-square", True)


def _rows_at_a_time(cfg: ModelConfig, prompt_tokens: int) -> int:
    """Rows whose caches take a quarter of a GiB together, but 8 to 256."""
    entries = 2 * cfg.num_layers * cfg.num_kv_heads * cfg.d_head
    row_bytes = 4 * entries * (2 * prompt_tokens + 64)
    return min(256, max(8, 2**28 // row_bytes))
