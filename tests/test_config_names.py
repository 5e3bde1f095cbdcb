"""Fields as people write and call them, and the listing of a resolved config."""

import argparse
import ast
import pathlib

import pytest
from runs import ROOT

from mtp_jax.cli import train
from mtp_jax.cli.args import config_from, positive_int
from mtp_jax.config import Config, as_tree, config_to_python, freeze
from mtp_jax.config.names import _MEANINGS
from mtp_jax.errors import UserError

TINY = str(ROOT / "configs" / "tiny.py")


def with_line(tmp_path, line):
    path = tmp_path / "a config.py"
    text = pathlib.Path(TINY).read_text()
    path.write_text(text.replace("    return c\n", f"    {line}\n    return c\n"))
    return str(path)


@pytest.mark.parametrize(
    ("option", "meant"),
    [
        ("--config.optim.lr=1", "config.optim.peak_lr?"),
        ("--config.lr=1", "config.optim.peak_lr?"),
        ("--lr=1", "--config.optim.peak_lr?"),
        ("--batch_size=8", "--config.data.batch_size?"),
        ("--config.train.batch_size=8", "config.data.batch_size?"),
        ("--config.data.steps=8", "config.train.steps?"),
        (
            "--config.model.n_heads=4",
            "config.model.n_future_tokens or config.model.num_query_heads?",
        ),
        ("--config.model.d_modle=4", "config.model.d_model?"),
        ("--config.modle.d_model=4", "config.model?"),
        ("--config.train.grad_accum=2", "config.train.accumulation?"),
    ],
)
def test_a_field_is_found_by_what_others_call_it(option, meant):
    with pytest.raises(UserError) as caught:
        config_from(TINY, [option])

    assert str(caught.value).endswith(f"did you mean {meant}")


def test_a_name_that_means_nothing_gets_no_guess():
    with pytest.raises(UserError, match=r"has no field 'zzzzz'\.$"):
        config_from(TINY, ["--config.optim.zzzzz=1"])
    with pytest.raises(UserError, match=r"unknown option --zzzzz; see --help\.$"):
        config_from(TINY, ["--zzzzz=1"])


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("c.optim.lr = 1", "config.optim has no field 'lr'; did you mean config.optim"),
        ("c.model.update(n_heads=2)", "config.model has no field 'n_heads'; did you"),
        ("c.train.steps = 1e3", "steps is 1000.0; it must be of type int."),
        ("c.data.sources = 'a b'", "sources is a b; it must be of type tuple."),
        (
            "c.optim.rates = {'heads': 2}",
            "a field is set to a dict, and it must be of "
            "type tuple; pairs of names and numbers are tuples, as (('heads', 10),).",
        ),
    ],
)
def test_a_wrong_line_of_a_file_is_told(tmp_path, line, words):
    path = with_line(tmp_path, line)

    with pytest.raises(UserError) as caught:
        config_from(path, [])

    assert str(caught.value).startswith(f"{path}: {words}")


def test_a_tree_with_a_wrong_name_is_told_what_is_right():
    with pytest.raises(
        UserError, match=r"optim\.lr is not a field; did you mean config"
    ):
        freeze({"optim": {"lr": 1.0}})


def test_every_meaning_is_of_a_field():
    there = {
        f"{section}.{name}"
        for section, fields in as_tree(Config()).items()
        for name in fields
    }
    assert set(_MEANINGS) <= there


@pytest.mark.parametrize(
    ("value", "steps"),
    [("1e3", 1000), ("2.5e1", 25), ("30.0", 30), ("1_000", 1000), ("7", 7)],
)
def test_a_whole_number_may_be_written_with_an_exponent(value, steps):
    assert config_from(TINY, [f"--config.train.steps={value}"]).train.steps == steps
    assert config_from(TINY, ["--config.train.steps", value]).train.steps == steps


@pytest.mark.parametrize(
    "value", ["('heads',2)", "(('heads',2),)", "['heads', 2.0]", "'heads',2"]
)
def test_one_group_and_its_number_need_no_second_pair_of_brackets(value):
    rates = config_from(TINY, [f"--config.optim.rates={value}"]).optim.rates
    assert rates == (("heads", 2),)


@pytest.mark.parametrize(
    ("value", "tied"), [("yes", True), ("t", True), ("f", False), ("0", False)]
)
def test_truth_has_several_words(value, tied):
    option = f"--config.model.tie_embeddings={value}"
    assert config_from(TINY, [option]).model.tie_embeddings is tied
    assert config_from(TINY, ["--config.model.tie_embeddings"]).model.tie_embeddings


def test_other_words_are_no_truth():
    with pytest.raises(UserError, match="tie_embeddings is 'maybe'; it must be True"):
        config_from(TINY, ["--config.model.tie_embeddings=maybe"])


def test_a_flag_may_be_written_with_an_exponent():
    assert positive_int("1e3") == 1000 and positive_int("7") == 7
    for text in ("0", "-1", "1.5", "1e99999999999", "nan", "x", ""):
        with pytest.raises(argparse.ArgumentTypeError, match="whole number above 0"):
            positive_int(text)


@pytest.mark.parametrize("value", ["1.5", "1e-3", "1e99999999999", "nan", "inf", ""])
def test_what_is_no_whole_number_is_refused(value):
    with pytest.raises(UserError):
        config_from(TINY, [f"--config.train.steps={value}"])


@pytest.mark.parametrize(
    ("value", "sources"),
    [
        ("my texts", ("my texts",)),
        ("'my texts'", ("my texts",)),
        ('"/a b/c d"', ("/a b/c d",)),
        ("1e5", ("1e5",)),
        ("007", ("007",)),
        ("None", ("None",)),
        ("(1e5,'b')", ("1e5", "b")),
        ("('my texts', \"b\")", ("my texts", "b")),
        ("['a', 'b',]", ("a", "b")),
        ("a b,c", ("a b", "c")),
        ("it's", ("it's",)),
        ("/x/y (old)", ("/x/y (old)",)),
        ("gs://bucket/data", ("gs://bucket/data",)),
    ],
)
def test_sources_are_read_as_texts(value, sources):
    made = config_from(TINY, [f"--config.data.sources={value}"])

    assert made.data.sources == sources


def test_a_source_that_is_there_is_one_whatever_its_name(tmp_path):
    folder = tmp_path / "a,b (1)"
    folder.mkdir()

    made = config_from(TINY, [f"--config.data.sources={folder}"])

    assert made.data.sources == (str(folder),)


def test_sources_given_one_by_one_are_a_mixture():
    options = [f"--config.data.sources={name}" for name in ("1e5", "my texts")]

    assert config_from(TINY, options).data.sources == ("1e5", "my texts")


def test_quotes_around_a_path_are_no_part_of_it():
    option = "--config.checkpoint.local_dir='/fast disk/x'"

    assert config_from(TINY, [option]).checkpoint.local_dir == "/fast disk/x"


def test_the_printed_config_is_a_config_file_with_every_field(tmp_path, capsys):
    options = ["--config.train.steps=1e3", "--config.data.sources=my texts"]

    assert train.main([f"--config={TINY}", "--print_config", *options]) == 0

    text = capsys.readouterr().out
    path = tmp_path / "printed.py"
    path.write_text(text)
    assert config_from(str(path), []) == config_from(TINY, options)
    lines = {line.strip() for line in text.splitlines()}
    assert (
        "c.train.accumulation = 1  # microbatches a step" in lines
        and "c.data.batch_size = 8  # rows of a global batch, all microbatches "
        "together (default: 32)"
        in lines
    )
    for part, fields in as_tree(Config()).items():
        for name in fields:
            start = f"c.{part}.{name} = "
            (line,) = [line for line in lines if line.startswith(start)]
            assert "  # " in line, line


def test_a_bfloat16_model_prints_its_choices():
    text = config_to_python(freeze({"model": {"compute_dtype": "bfloat16"}}))

    ast.parse(text)
    assert "products and activations (float32; bfloat16) (default: 'float32')" in text


def test_training_asks_for_a_workdir():
    with pytest.raises(UserError, match="are required: --workdir"):
        train.main([f"--config={TINY}"])
