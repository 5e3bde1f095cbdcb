"""Files that earlier versions wrote: evaluated, decoded from, continued."""

import json
import pathlib
import shutil

import pytest
from runs import complete, records

from mtp_jax.checkpoint.restore import restore_model
from mtp_jax.config import Config, config_from_json, config_to_json
from mtp_jax.config.formats import FORMAT
from mtp_jax.decode.decoders import DECODERS
from mtp_jax.decode.decoders.sampling import Sampling
from mtp_jax.decode.generator import Generator
from mtp_jax.errors import UserError
from mtp_jax.eval.heldout import evaluate

FOLDER = pathlib.Path(__file__).parent / "data" / "run_format_0"
EXPECTED = json.loads((FOLDER / "expected.json").read_text())


@pytest.fixture
def run(tmp_path):
    """A copy of the old run and of its corpus, to write to."""
    for name in ("run", "corpus"):
        shutil.copytree(FOLDER / name, tmp_path / name)
    return tmp_path


def test_an_old_checkpoint_has_the_figures_of_its_time(run):
    restored = restore_model(str(run / "run"))

    figures = evaluate(restored, data=[str(run / "corpus")])

    expected = EXPECTED["eval"]
    assert figures["step"] == expected["step"] == 20
    assert figures["tokens"] == expected["tokens"]
    assert figures["bits_per_byte"] == pytest.approx(expected["bits_per_byte"])
    for found, head in zip(figures["heads"], expected["heads"], strict=True):
        assert found == pytest.approx(head)


@pytest.mark.parametrize("case", EXPECTED["generate"])
def test_an_old_checkpoint_writes_the_texts_of_its_time(run, case):
    generator = Generator.from_restored(restore_model(str(run / "run")))
    sampling = Sampling(temperature=case["temperature"], seed=case["seed"])

    [made] = generator.generate(
        ["The old mill"],
        max_new_tokens=24,
        decoder=DECODERS[case["decoder"]](),
        sampling=sampling,
    )

    assert made.tokens == case["tokens"]


def test_an_old_run_goes_on_with_the_same_losses(run):
    complete(
        [
            "train",
            f"--config={FOLDER / 'config.py'}",
            f"--workdir={run / 'run'}",
            f"--config.data.sources={run / 'corpus'}",
        ]
    )

    found = [row for row in records(run / "run") if row["step"] > 20]
    assert len(found) == len(EXPECTED["metrics"]) == 10
    for row, expected in zip(found, EXPECTED["metrics"], strict=True):
        assert row["batch_hash"] == expected["batch_hash"]
        for name, value in expected.items():
            if name != "batch_hash":
                assert row[name] == pytest.approx(value, rel=1e-4), (row["step"], name)


def test_a_config_is_written_with_its_format_and_read_back():
    cfg = Config()

    tree = json.loads(json.dumps(config_to_json(cfg)))

    assert tree["format"] == FORMAT
    assert config_from_json(tree, "x") == cfg
    del tree["format"]
    assert config_from_json(tree, "x") == cfg


@pytest.mark.parametrize("number", [FORMAT + 1, -1, "1", None])
def test_a_config_of_a_later_version_is_refused(number):
    tree = {**config_to_json(Config()), "format": number}

    with pytest.raises(UserError, match=r"run\.json has a config of format"):
        config_from_json(tree, "run.json")


def test_what_is_no_config_is_refused_with_its_file():
    with pytest.raises(UserError, match=r"run\.json: config\.model\.d_mdl"):
        config_from_json({"model": {"d_mdl": 3}}, "run.json")
    with pytest.raises(UserError, match=r"run\.json holds no config"):
        config_from_json([], "run.json")
