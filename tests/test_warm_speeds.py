"""Speeds are those of programs that are compiled and have run before."""

import dataclasses
import time

import jax
import pytest
from test_continuations import Speaking

from mtp_jax.data.tokenizer import ByteTokenizer
from mtp_jax.decode.decoders.plain import Plain
from mtp_jax.decode.generation import totals
from mtp_jax.decode.programs import Programs
from mtp_jax.errors import counted
from mtp_jax.reports.compare import Comparison, compare, header, line
from mtp_jax.verification.settings import VerifySettings

BYTES = ByteTokenizer()


class Timed(Speaking):
    """A generator of given speeds, the first of each decoder far off."""

    speeds = (1.0, 100.0, 130.0, 90.0, 110.0, 120.0)

    def generate(self, prompts, **options):
        self.runs = getattr(self, "runs", 0)
        speed = self.speeds[self.runs % len(self.speeds)]
        self.runs += 1
        made = super().generate(prompts, **options)
        return [dataclasses.replace(r, tokens_per_s=speed) for r in made]


def test_a_comparison_is_the_median_of_warm_runs():
    generator = Timed(BYTES, [97], [98])

    rows = list(compare(generator, {}, "a", max_new_tokens=2))

    [(name, found)] = rows
    assert name == "plain" and generator.runs == len(Timed.speeds)
    assert found.figures.tokens_per_s == pytest.approx(110)
    assert found.spread == pytest.approx((130 - 90) / 220)
    assert "spread" in header({}) and " 18%" in line(name, found, {})
    assert header({}).index("spread") + 6 == line(name, found, {}).index("18%") + 3


@pytest.mark.parametrize("streamed", [False, True])
def test_no_compilation_is_in_a_speed(monkeypatch, streamed):
    """Compiling a program, at first or for a cache that grew, takes an hour here."""
    from test_decode import case

    c = case(1, 3)
    monkeypatch.setattr(c.generator, "_programs", Programs(c.cfg, c.eos_id))
    compiled, late_s = [], 0.0
    get, now = Programs._get, time.perf_counter

    def slowly(self, key, make):
        def made():
            nonlocal late_s
            compiled.append(key[0])
            late_s += 3600
            return make()

        return get(self, key, made)

    monkeypatch.setattr(Programs, "_get", slowly)
    monkeypatch.setattr(time, "perf_counter", lambda: now() + late_s)
    options = {"max_new_tokens": 120, "decoder": Plain()}

    if streamed:
        writing = c.generator.stream(c.prompts[0], **options)
        with pytest.raises(StopIteration) as end:
            while True:
                next(writing)
        result = end.value.value
    else:
        result = c.generator.generate(c.prompts, **options)[0]

    assert {"begin", "advance", "grow"} <= set(compiled)
    assert result.tokens_per_s > 1 and late_s >= 3 * 3600


def test_what_is_whole_here_is_fetched_without_a_program(monkeypatch):
    from mtp_jax.decode import batch

    def gathered(*_, **__):
        raise AssertionError("compiles a program")

    monkeypatch.setattr(batch.multihost_utils, "process_allgather", gathered)
    assert batch.on_host(jax.numpy.arange(3)).tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("deviations", "kind"),
    [(None, "exact"), (0, "0.0%"), (1, "-<0.1%"), (2, "-0.1%"), (62, "-3.1%")],
)
def test_a_share_of_deviations_has_no_negative_zero(deviations, kind):
    [result] = Timed(BYTES, [97], [98]).generate("a", max_new_tokens=2)
    made = dataclasses.replace(result, deviations=deviations)
    figures = dataclasses.replace(totals([result]), tokens=2000)

    found = Comparison([made], figures, 1.0, 0.0, 1, lossy=deviations is not None)

    assert line("typical", found, {}).split()[1] == kind


@pytest.mark.parametrize(
    ("number", "noun", "text"),
    [
        (1, "device", "1 device"),
        (2000, "pass", "2,000 passes"),
        (0, "batch", "0 batches"),
    ],
)
def test_a_number_has_its_noun(number, noun, text):
    assert counted(number, noun) == text


def test_the_long_form_of_verify_is_the_longer_one():
    short, long = VerifySettings(), VerifySettings.thorough(samples=9)
    assert long.samples == 9 and long.every_depth and not short.every_depth
    assert short.prompts < long.prompts
    assert set(short.batch_sizes).isdisjoint({1}) and 1 in long.batch_sizes
    assert short.distribution_heads == 2 and long.distribution_heads is None
