"""Options that change nothing are told, and runs that learn nothing refused."""

import dataclasses
import json
import pathlib

import pytest
from models import TINY

from mtp_jax.cli.args import config_from
from mtp_jax.config import (
    Config,
    HeadsConfig,
    LossConfig,
    OptimConfig,
    config_to_json,
)
from mtp_jax.config.learning import check_learning, idle_options
from mtp_jax.errors import UserError

CONFIGS = pathlib.Path(__file__).parent.parent / "configs"
ONE = {"n_future_tokens": 1}
BELOW = ("trunk", "embedding")


def config_of(loss=None, optim=None, **model):
    return Config(
        model=dataclasses.replace(TINY, **model),
        loss=LossConfig(**loss or {}),
        optim=OptimConfig(**optim or {}),
    )


IDLE = [
    ("loss.teacher is ema", {"loss": {"teacher": "ema"}}),
    ("loss.soft_mix is 0.5", {"loss": {"soft_mix": 0.5}}),
    ("loss.teacher_decay is 0.9", {"loss": {"teacher_decay": 0.9, "kind": "kl"}}),
    ("loss.balance_decay is 0.9", {"loss": {"balance_decay": 0.9}}),
    ("loss.balance_budget is 0.5", {"loss": {"balance_budget": 0.5}}),
    ("loss.balance_most is 2.0", {"loss": {"balance": "encodec", "balance_most": 2.0}}),
    ("loss.mask_threshold is 1.0", {"loss": {"mask_threshold": 1.0}}),
    ("loss.head_decay is 0.5", {"loss": {"head_decay": 0.5}, **ONE}),
    ("loss.acceptance is True", {"loss": {"acceptance": True}, **ONE}),
    ("loss.schedule is linear", {"loss": {"schedule": ("linear",)}, **ONE}),
    ("loss.trunk_gradient is warmup", {"loss": {"trunk_gradient": ("warmup",)}, **ONE}),
    (
        "loss.balance is pcgrad",
        {"loss": {"balance": "pcgrad"}, "optim": {"frozen": BELOW}},
    ),
    (
        "loss.balance is encodec",
        {"loss": {"balance": "encodec", "head_weights": (1.0, 0.0)}},
    ),
    (
        "loss.trunk_gradient is (1.0, 0.5)",
        {"loss": {"trunk_gradient": (1.0, 0.5)}, "optim": {"frozen": BELOW}},
    ),
    ("optim.rates of lora is 2.0", {"optim": {"rates": (("lora", 2.0),)}}),
    (
        "optim.clips of unembedding is 1.0",
        {"optim": {"clips": (("unembedding", 1.0),)}, "tie_embeddings": True},
    ),
    (
        "optim.decays of heads is 0.0",
        {"optim": {"decays": (("heads", 0.0),)}, "heads": HeadsConfig(kind="serial"),
         **ONE},
    ),
    (
        "optim.rates of trunk is 0.1",
        {"optim": {"rates": (("trunk", 0.1),), "frozen": ("trunk",)}},
    ),
    ("optim.lora_alpha is 8.0", {"optim": {"lora_alpha": 8.0}}),
    ("optim.decay_share is 0.2", {"optim": {"decay_share": 0.2}}),
]  # fmt: skip


@pytest.mark.parametrize(("words", "fields"), IDLE, ids=[x for x, _ in IDLE])
def test_an_option_that_changes_nothing_is_told(words, fields):
    [line] = idle_options(config_of(**fields))

    assert line.startswith(f"config.{words}, and ")
    assert line.endswith(": it changes nothing that is learned.")


USED = [
    {"loss": {"teacher": "ema", "kind": "kl", "soft_mix": 0.5, "teacher_decay": 0.9}},
    {"loss": {"teacher": "ema", "acceptance": True}},
    {"loss": {"balance": "occ", "balance_budget": 5.0, "balance_decay": 0.9}},
    {"loss": {"gradient_meter": True}, **ONE},
    {"loss": {"mask": "entropy", "mask_threshold": 1.0, "head_decay": 0.5}},
    {"loss": {"balance": "pcgrad"}, "optim": {"frozen": BELOW, "lora_rank": 2}},
    {"loss": {"extra_targets": (1.0, 0.5)}, **ONE},
    {"optim": {"rates": (("lora", 2.0), ("heads", 3.0)), "frozen": ("trunk",),
               "lora_rank": 1, "lora_alpha": 8.0}},
    {"optim": {"schedule": "wsd", "decay_share": 0.2}},
]  # fmt: skip


@pytest.mark.parametrize("fields", USED, ids=str)
def test_of_options_that_are_used_nothing_is_told(fields):
    assert idle_options(config_of(**fields)) == []


@pytest.mark.parametrize(
    "name",
    [
        "quickstart.py", "paper.py", "bytes_n4.py", "bytes_small.py", "tiny.py",
        "llama.py:8b-n4-heads", "finetune.py:heads,{run},4",
        "finetune.py:joint,{run},4", "finetune.py:lora,{run},4",
    ],
)  # fmt: skip
def test_configs_of_the_project_have_no_idle_option(name, tmp_path):
    begun = {"config": config_to_json(config_of(**ONE))}
    (tmp_path / "run.json").write_text(json.dumps(begun))
    cfg = config_from(f"{CONFIGS}/{name.format(run=tmp_path)}", [])
    assert idle_options(cfg) == []


@pytest.mark.parametrize("kind", ["linear", "parallel"])
def test_fewer_heads_leave_nothing_idle(kind):
    loss = {"kind": "kl", "soft_mix": 0.5, "teacher": "ema", "head_weights": (0.0, 1.0)}
    cfg = config_of(loss, heads=HeadsConfig(kind=kind))

    kept = cfg.keep_heads(1)

    assert kept.loss.head_weights == (0.0,) and kept.loss.kind == "hard"
    assert idle_options(kept) == []


@pytest.mark.parametrize(
    ("loss", "model"),
    [
        ({"head_weights": (0.0, 0.0)}, {}),
        ({"schedule": ((0, 0, 0), (5, 0, 0))}, {}),
        ({"head_weights": (1.0, 0.0), "schedule": (0.0, 1.0)}, {}),
        ({"head_weights": (0.0,)}, ONE),
    ],
)
def test_heads_without_any_weight_are_refused_where_they_are_trained(loss, model):
    cfg = config_of(loss, **model)  # a checkpoint of such a run can be read
    with pytest.raises(UserError, match="leave no head any weight") as error:
        check_learning(cfg)
    assert "\n" not in str(error.value)


def test_extra_targets_alone_are_something_to_learn():
    check_learning(config_of({"head_weights": (0.0,), "extra_targets": (1.0,)}, **ONE))


@pytest.mark.parametrize(
    "optim",
    [
        {"rates": tuple((g, 0.0) for g in ("heads", "norms", "unembedding")),
         "frozen": BELOW},
        {"rates": (("lora", 0.0),), "lora_rank": 2,
         "frozen": ("trunk", "embedding", "heads", "norms", "unembedding")},
    ],
)  # fmt: skip
def test_rates_of_nothing_but_0_are_refused(optim):
    with pytest.raises(UserError, match="rates are 0 for every group"):
        check_learning(config_of(optim=optim))


def test_some_rate_above_0_is_enough():
    check_learning(config_of(optim={"rates": (("heads", 0.0),)}))
