"""Settings at the ends of their ranges: done right, or refused by name."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import ROOT, train_args
from test_continuations import Speaking

from mtp_jax import __main__
from mtp_jax.cli import train
from mtp_jax.data.tokenizer import ByteTokenizer
from mtp_jax.data.workers import check_workers
from mtp_jax.decode.decoders.sampling import (
    RandomKeys,
    Sampler,
    Sampling,
    probabilities,
    sampling_arrays,
)
from mtp_jax.errors import UserError, told_as
from mtp_jax.verification.exact_distribution import next_distribution

LOGITS = np.array([1.0, 12.0, 3.0, 2.0, -300.0, -np.inf], np.float32)


def drawn(sampling):
    arrays = sampling_arrays(sampling, len(LOGITS))
    probs_BWV = probabilities(arrays, jnp.asarray(LOGITS)[None, None])
    length_B = jnp.ones(1, jnp.int32)
    keys = RandomKeys(jnp.zeros((1, 2), jnp.uint32))
    token_BW = Sampler(keys, length_B).sample(probs_BWV)
    return np.asarray(probs_BWV)[0, 0], int(token_BW[0, 0])


@pytest.mark.parametrize("temperature", [0.0, 1e-50, 1e-45, 1e-38, 1e-21, 1e-19, 1e-3])
def test_the_colder_the_surer(temperature):
    sampling = Sampling(temperature=temperature)

    target_V, token = drawn(sampling)

    np.testing.assert_array_equal(target_V, np.eye(len(LOGITS))[1])
    assert token == 1 and sampling.greedy == (temperature < 1e-20)
    np.testing.assert_allclose(next_distribution(LOGITS, [], sampling), target_V)


@pytest.mark.parametrize("temperature", [1e20, 1e38, 1e39, 1e300, float("inf")])
def test_the_hottest_is_even_over_what_can_be(temperature):
    target_V, _ = drawn(Sampling(temperature=temperature))

    np.testing.assert_allclose(target_V, [0.2] * 5 + [0.0], atol=1e-6)


@pytest.mark.parametrize("penalty", [1e-10, 1e10])
def test_the_strongest_penalty_at_the_coldest_is_finite(penalty):
    for logit in (100.0, -100.0):
        assert np.isfinite(np.float32(logit / penalty / 1e-20))
        assert np.isfinite(np.float32(logit * penalty / 1e-20))
    Sampling(repetition_penalty=penalty, temperature=1e-20)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("top_k", 99999999999),
        ("top_k", 2**31),
        ("top_k", -1),
        ("top_p", 0.0),
        ("repetition_penalty", 1e-11),
        ("repetition_penalty", 1e39),
        ("repetition_penalty", float("nan")),
        ("temperature", float("nan")),
        ("seed", 2**32),
    ],
)
def test_what_is_out_of_range_is_refused_by_name(field, value):
    with pytest.raises(UserError, match=f"^{field} is .*; it must be "):
        Sampling(**{field: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 99999999999),
        ("max_new_tokens", 0),
        ("first", -1),
        ("first", 2**32),
        ("batch_size", 0),
        ("heads", 99999999999),
    ],
)
def test_arguments_of_generate_are_refused_by_name(name, value):
    generator = Speaking(ByteTokenizer(), [97], [98])
    with pytest.raises(UserError, match=f"^{name} is {value}; "):
        generator.generate(
            "a", **{"max_new_tokens": 4, "decoder": "plain", name: value}
        )


def test_a_seed_of_more_than_32_bits_begins_no_run(tmp_path, monkeypatch):
    corpus = ROOT / "tests" / "data" / "run_format_0" / "corpus"
    seed = "--config.train.seed=4294967296"
    with pytest.raises(UserError, match=r"config\.train\.seed is 4294967296; .* 2\^32"):
        train.main(train_args(tmp_path / "run", corpus, seed)[1:])


@pytest.mark.parametrize(
    "error",
    [
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 B."),
        jax.errors.JaxRuntimeError("INTERNAL: ...: Out of memory allocating 9 bytes."),
        MemoryError(),
    ],
    ids=str,
)
def test_a_lack_of_memory_is_told_in_a_line(error, monkeypatch, capsys):
    def lacks(argv):
        raise error

    monkeypatch.setattr(train, "main", lacks)
    monkeypatch.setattr(sys, "argv", ["mtp-jax", "train"])

    assert __main__.main() == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("mtp-jax: out of memory (")
    assert told_as(error) == (1, line, line.removeprefix("mtp-jax: "))


@pytest.mark.parametrize(
    "error", [jax.errors.JaxRuntimeError("INTERNAL: x"), RuntimeError("Out of memory")]
)
def test_other_errors_keep_their_traceback(error, monkeypatch):
    def fails(argv):
        raise error

    monkeypatch.setattr(train, "main", fails)
    monkeypatch.setattr(sys, "argv", ["mtp-jax", "train"])

    with pytest.raises(type(error), match=str(error)):
        __main__.main()


@pytest.mark.parametrize(
    ("name", "value"),
    [("JAX_NUM_CPU_DEVICES", "many"), ("JAX_ENABLE_X64", "maybe"),
     pytest.param("JAX_PLATFORMS", "abacus", marks=pytest.mark.slow)],
)  # fmt: skip
def test_an_environment_that_jax_refuses_is_told_in_a_line(name, value, monkeypatch):
    run = ROOT / "tests" / "data" / "run_format_0" / "run"
    monkeypatch.setenv(name, value)
    code = [sys.executable, "-m", "mtp_jax", "evaluate", f"--workdir={run}"]
    ended = subprocess.run(code, capture_output=True, text=True, cwd=ROOT)

    assert ended.returncode == 2
    (line,) = ended.stderr.splitlines()
    assert line.startswith("mtp-jax: error: JAX ") and value in line


@pytest.mark.parametrize("field", ["model.num_layers", "model.d_ff", "data.seq_len"])
def test_a_size_that_32_bits_cannot_count_is_refused(field, tmp_path):
    corpus = ROOT / "tests" / "data" / "run_format_0" / "corpus"
    option = f"--config.{field}=99999999999"
    with pytest.raises(UserError, match=f"config.{field} is 99999999999; .* at most"):
        train.main(train_args(tmp_path / "run", corpus, option)[1:])


def test_reader_processes_beyond_measure_begin_no_run(tmp_path):
    corpus = ROOT / "tests" / "data" / "run_format_0" / "corpus"
    workers = "--config.data.workers=99999"
    with pytest.raises(UserError, match=r"config\.data\.workers is 99999; at most "):
        train.main(train_args(tmp_path / "run", corpus, workers)[1:])
    assert not (tmp_path / "run").exists()
    check_workers("workers", os.cpu_count())
