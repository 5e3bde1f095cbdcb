"""Models whose texts end with any of several tokens."""

import dataclasses

import numpy as np
import pytest
from test_decode import NEW, VOCAB, Letters, case, init, one_device
from usual_cases import cases

from mtp_jax.decode.decoders.beam import Beam
from mtp_jax.decode.generator import Generator
from mtp_jax.verification.exact_distribution import head_one_distribution
from mtp_jax.verification.greedy import written


@dataclasses.dataclass(frozen=True)
class SeveralEnds(Letters):
    """Letters of which several end a text."""

    others: tuple[int, ...] = ()

    @property
    def end_ids(self):
        return (self.eos_id, *self.others)


def cut(text, ends):
    """Tokens before the first end, and the end, None if the text is long enough."""
    for at, token in enumerate(text[:NEW]):
        if token in ends:
            return text[:at], token
    return text[:NEW], None


NAMES = ("plain", "blockwise", "speculative", "tree")
ALL = {name: name for name in NAMES} | {"beam": Beam(beams=1)}


@pytest.mark.parametrize("decoder", cases(ALL, ["speculative", "tree", "beam"]))
def test_the_first_end_of_any_kind_ends_a_text(decoder):
    c = case(4, 5)
    counts = [sum(t in text[2:NEW] for text in c.texts) for t in range(VOCAB)]
    other = max((t for t in range(1, VOCAB) if t != c.eos_id), key=lambda t: counts[t])
    tokenizer = SeveralEnds(c.eos_id, others=(other,))
    mesh = one_device()
    generator = Generator(c.cfg, init(c.cfg, mesh), tokenizer, mesh)

    results = generator.generate(c.prompts, max_new_tokens=NEW, decoder=decoder)

    ended = set()
    for result, text in zip(results, c.texts, strict=True):
        tokens, end = cut(text, tokenizer.end_ids)
        assert (result.tokens, result.ended_by) == (tokens, end)
        assert result.finish == ("length" if end is None else "eos")
        assert written(result, -1) == [*tokens, *[end] * (end is not None)]
        ended.add(end)
    assert ended >= {c.eos_id, other}
    assert [*generator.stream(c.prompts[0], max_new_tokens=NEW)] or not results[0].text


def test_a_distribution_goes_on_after_neither_end():
    def next_logits(rows):
        return np.log([[0.1, 0.2, 0.3, 0.4]] * len(rows))

    from mtp_jax.decode.decoders.sampling import Sampling

    sampling = Sampling(temperature=1.0)
    found = head_one_distribution(next_logits, [0], 2, sampling, (1, 3))
    assert found[(1,)] == pytest.approx(0.2) and found[(3,)] == pytest.approx(0.4)
    assert found[(2, 3)] == pytest.approx(0.12) and len(found) == 2 + 2 * 4
    assert sum(found.values()) == pytest.approx(1)
