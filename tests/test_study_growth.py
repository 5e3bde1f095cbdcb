"""Growth as a study: its arms, and one workdir that all of them grow."""

import dataclasses
import json

import pytest
from runs import complete, records

from mtp_jax.config import config_to_json
from mtp_jax.config.regrow import config_of as config_of_run
from mtp_jax.growth.starts import check_start
from mtp_jax.model.sizes import sizes_of
from mtp_jax.studies import growth
from mtp_jax.studies.study import Trial

ARMS = growth.STUDY.arms("full")


def trial(tmp_path, arm, size="full", **changed):
    return Trial(
        arm=arm,
        seed=0,
        size=size,
        folder=tmp_path,
        shared=tmp_path,
        data=("corpus",),
        **changed,
    )


@pytest.fixture(params=["tiny", "quick", "full"])
def size(request):
    return request.param


@pytest.fixture
def configs(tmp_path, size):
    """The config of every arm, of a base of which only the config is there."""
    base = growth.base_config(trial(tmp_path, ARMS[0], size))
    workdir = tmp_path / "base"
    workdir.mkdir()
    (workdir / "run.json").write_text(json.dumps({"config": config_to_json(base)}))
    assert config_of_run(workdir) == base and base.model.n_future_tokens == 1
    return {arm: growth.config_of(trial(tmp_path, arm, size), workdir) for arm in ARMS}


def test_arms_grow_the_same_model_to_the_same_size(configs, tmp_path):
    base = config_of_run(tmp_path / "base")
    several = [cfg for arm, cfg in configs.items() if arm != "one head"]

    assert len({cfg.model for cfg in several}) == 1
    assert several[0].model.num_layers == base.model.num_layers + 3
    assert configs["one head"].model == base.model
    assert len({sizes_of(cfg.model).total for cfg in several}) == 1
    for arm, cfg in configs.items():
        start = growth._ARMS[arm].start
        assert cfg.data == base.data
        if start is None:
            assert cfg.init.workdir == ""
            grown = configs["ridge, frozen"].train.steps
            assert cfg.train.steps == base.train.steps + grown
            assert cfg.optim == base.optim and cfg.loss == base.loss
            continue
        assert cfg.init.workdir == str(tmp_path / "base")
        assert cfg.init.start == start
        check_start(base.model, cfg.model, start)


def test_arms_train_what_they_say(configs):
    for arm, cfg in configs.items():
        trains = growth._ARMS[arm].trains
        assert bool(cfg.optim.frozen) == (trains != "all")
        assert bool(cfg.optim.lora_rank) == (trains == "lora")
        assert (cfg.loss.head_weights[:1] == (0.0,)) == (trains == "heads")
        steps, every = cfg.train.steps, cfg.eval.every
        assert every == growth.early(steps) or arm == "from the start"
    assert configs["ridge, frozen, tv"].loss.kind == "tv"
    frozen = configs["ridge, frozen"]
    for loss in ("kl", "tv"):
        told = dataclasses.replace(frozen.loss, kind=loss)
        cfg = configs[f"ridge, frozen, {loss}"]
        assert dataclasses.replace(frozen, loss=told) == cfg
    for start in ("random", "copy", "unigram"):
        init = dataclasses.replace(frozen.init, start=start)
        assert dataclasses.replace(frozen, init=init) == configs[f"{start}, frozen"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_arms_of_a_seed_grow_one_model(corpus_dir, tmp_path):
    out = complete(
        [
            *("study", "growth", "--tiny", f"--workdir={tmp_path / 'grown'}"),
            *("--arm=ridge, frozen", "--arm=one head", f"--data={corpus_dir}"),
        ],
        timeout_s=800,
    )

    rows = records(tmp_path / "grown", "growth.jsonl")
    assert [row["arm"] for row in rows] == ["ridge, frozen", "one head"]
    frozen, one = (row["figures"] for row in rows)
    assert frozen["less_before"] == 0.0 and one["less_before"] != 0.0
    assert one["accepted"] == 1.0 and "start_loss" not in one
    assert len(frozen["start_losses"]) == 3 and 1 < frozen["start_loss"] < 10
    assert 1 <= frozen["accepted_early"] <= 4
    assert [step for step, _ in frozen["accepted_by_step"]] == [1, 2]
    bases = (tmp_path / "grown" / "data").glob("base-seed*/metrics.jsonl")
    assert len(list(bases)) == 1
    assert "not decided" in out
