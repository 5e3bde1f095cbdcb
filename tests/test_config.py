"""The config: every mistake is told with the name of its field."""

import dataclasses

import pytest
from ml_collections import ConfigDict
from models import mesh_of, tiny_config

from mtp_jax.config import Config, DataConfig, MeshConfig, TrainConfig, default, freeze
from mtp_jax.errors import UserError
from mtp_jax.parallel.sharding import batch_shards, check_divisible, make_mesh


def edited(**fields):
    """The default tree with fields set: `edited(model__d_ff=3)`."""
    tree = default().to_dict()
    for name, value in fields.items():
        section, _, field = name.partition("__")
        tree[section][field] = value
    return tree


def test_the_default_tree_freezes_to_the_defaults():
    assert freeze(default()) == Config()
    assert freeze({}) == Config()


def test_a_frozen_config_is_the_same_after_a_trip_through_a_tree():
    cfg = freeze(
        edited(
            model__n_future_tokens=2,
            model__compute_dtype="bfloat16",
            loss__head_weights=(1.0, 0.25),
            data__sources=("a", "b"),
            data__weights=(3.0, 1.0),
            mesh__fsdp=2,
            checkpoint__keep_every=100,
        )
    )

    assert freeze(ConfigDict(dataclasses.asdict(cfg))) == cfg
    assert cfg != Config()
    assert cfg.row_len == 1026
    assert cfg.model.num_trunk_layers == 6
    assert hash(cfg) == hash(freeze(dataclasses.asdict(cfg)))


def test_integers_are_floats_and_lists_are_tuples_where_the_field_is():
    cfg = freeze(
        edited(
            optim__peak_lr=1,
            data__sources=["a", "b"],
            data__weights=[1, 2],
            model__n_future_tokens=1,
        )
    )

    assert (cfg.optim.peak_lr, type(cfg.optim.peak_lr)) == (1.0, float)
    assert cfg.data.sources == ("a", "b")
    assert cfg.data.weights == (1.0, 2.0)
    assert {type(w) for w in cfg.data.weights} == {float}


def test_a_misspelt_field_of_the_tree_is_refused_at_once():
    with pytest.raises(AttributeError, match="num_layer"):
        default().model.num_layer = 3


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        # what a field is called, and of what type it is
        ({"model__num_layer": 3}, "config.model.num_layer is not a field"),
        ({"model__d_ff": 8.0}, "config.model.d_ff is 8.0"),
        ({"model__d_ff": "8"}, "config.model.d_ff is '8'"),
        ({"model__d_ff": True}, "config.model.d_ff is True"),
        ({"model__d_ff": None}, "config.model.d_ff is None"),
        ({"model__tie_embeddings": 1}, "config.model.tie_embeddings is 1"),
        ({"model__param_dtype": "float16"}, "config.model.param_dtype is 'float16'"),
        ({"compute__remat": True}, "config.compute.remat is True"),
        ({"optim__peak_lr": "fast"}, "config.optim.peak_lr is 'fast'"),
        ({"data__sources": "corpus"}, "config.data.sources is 'corpus'"),
        ({"data__sources": ("a", 1)}, "config.data.sources[1] is 1"),
        ({"loss__head_weights": 1.0}, "config.loss.head_weights is 1.0"),
        ({"checkpoint__keep_best": 1.5}, "config.checkpoint.keep_best is 1.5"),
        # model
        ({"model__vocab_size": 0}, "config.model.vocab_size is 0"),
        ({"model__d_model": 0}, "config.model.d_model is 0"),
        ({"model__d_ff": 0}, "config.model.d_ff is 0"),
        ({"model__num_layers": 0}, "config.model.num_layers is 0"),
        ({"model__num_query_heads": 0}, "config.model.num_query_heads is 0"),
        ({"model__num_kv_heads": 0}, "config.model.num_kv_heads is 0"),
        ({"model__d_head": 0}, "config.model.d_head is 0"),
        ({"model__n_future_tokens": 0}, "config.model.n_future_tokens is 0"),
        ({"model__n_future_tokens": 9}, "config.model.n_future_tokens is 9"),
        ({"model__num_kv_heads": 3}, "config.model.num_kv_heads (3)"),
        ({"model__d_head": 33}, "config.model.d_head is 33"),
        ({"model__rope_theta": 0.0}, "config.model.rope_theta"),
        ({"model__norm_eps": 0.0}, "config.model.norm_eps"),
        # loss
        ({"loss__head_weights": (1.0, 1.0)}, "config.loss.head_weights has 2"),
        ({"loss__head_weights": (1.0, 1.0, -1.0, 1.0)}, "config.loss.head_weights"),
        (
            {"loss__head_weights": (1.0,) * 4, "loss__head_decay": 0.5},
            "config.loss.head_decay",
        ),
        ({"loss__head_decay": 0.0}, "config.loss.head_decay is 0.0"),
        ({"loss__z_loss": -1.0}, "config.loss.z_loss is -1.0"),
        # data
        ({"data__sources": ()}, "config.data.sources is empty"),
        ({"data__weights": (1.0, 2.0)}, "config.data.weights has 2"),
        ({"data__weights": (0.0,)}, "config.data.weights must be above 0"),
        ({"data__seq_len": 0}, "config.data.seq_len is 0"),
        ({"data__batch_size": 0}, "config.data.batch_size is 0"),
        ({"data__workers": -1}, "config.data.workers is -1"),
        ({"data__seed": -1}, "config.data.seed is -1"),
        # optim
        ({"optim__peak_lr": -1.0}, "config.optim.peak_lr is -1.0"),
        ({"optim__peak_lr": float("nan")}, "config.optim.peak_lr is nan"),
        ({"optim__warmup_steps": -1}, "config.optim.warmup_steps is -1"),
        ({"optim__decay_ratio": -0.1}, "config.optim.decay_ratio is -0.1"),
        ({"optim__eps": -1e-8}, "config.optim.eps is"),
        ({"optim__weight_decay": -1.0}, "config.optim.weight_decay is -1.0"),
        ({"optim__b1": 1.0}, "config.optim.b1"),
        ({"optim__b2": -0.1}, "config.optim.b2"),
        ({"optim__clip_norm": 0.0}, "config.optim.clip_norm must be above 0"),
        # train
        ({"train__steps": 0}, "config.train.steps is 0"),
        ({"train__accumulation": 0}, "config.train.accumulation is 0"),
        ({"train__accumulation": 3}, "config.train.accumulation (3)"),
        ({"train__max_bad_steps": 0}, "config.train.max_bad_steps is 0"),
        ({"train__seed": -1}, "config.train.seed is -1"),
        # mesh
        ({"mesh__tensor": 0}, "config.mesh.tensor is 0"),
        ({"mesh__replica": -2}, "config.mesh.replica is -2"),
        ({"mesh__replica": -1}, "config.mesh has more than one -1"),
        # what happens how often
        ({"checkpoint__every": 0}, "config.checkpoint.every is 0"),
        ({"checkpoint__keep_latest": 0}, "config.checkpoint.keep_latest is 0"),
        ({"checkpoint__keep_every": -1}, "config.checkpoint.keep_every is -1"),
        ({"checkpoint__keep_best": -1}, "config.checkpoint.keep_best is -1"),
        ({"eval__every": -1}, "config.eval.every is -1"),
        ({"eval__batches": 0}, "config.eval.batches is 0"),
        ({"eval__sample_tokens": -1}, "config.eval.sample_tokens is -1"),
        ({"eval__sample_prompt_tokens": 0}, "config.eval.sample_prompt_tokens is 0"),
        ({"log__every": 0}, "config.log.every is 0"),
        ({"log__profile_step": -1}, "config.log.profile_step is -1"),
        ({"log__profile_steps": 0}, "config.log.profile_steps is 0"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_a_mistake_is_told_with_the_name_of_its_field(fields, named):
    with pytest.raises(UserError) as error:
        freeze(edited(**fields))

    assert named in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("tree", "named"),
    [
        ({"modle": {}}, "config.modle is not a field"),
        ({"model": 3}, "config.model is 3; it must be a section"),
        ([], "config is []; it must be a section"),
    ],
)
def test_a_tree_of_another_form_is_refused(tree, named):
    with pytest.raises(UserError) as error:
        freeze(tree)

    assert named in str(error.value)


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ({}, (1, 8, 1, 1)),
        ({"replica": 2, "fsdp": -1, "tensor": 2}, (2, 2, 1, 2)),
        ({"replica": -1, "fsdp": 1, "tensor": 4}, (2, 1, 1, 4)),
        ({"replica": 1, "fsdp": 2, "tensor": -1}, (1, 2, 1, 4)),
        ({"replica": 1, "fsdp": 8, "tensor": -1}, (1, 8, 1, 1)),
        ({"replica": 4, "fsdp": 2, "tensor": 1}, (4, 2, 1, 1)),
        ({"fsdp": 2, "sequence": -1}, (1, 2, 4, 1)),
        ({"sequence": 2, "tensor": 2}, (1, 2, 2, 2)),
    ],
)
def test_an_axis_of_minus_one_takes_the_devices_that_are_left(sizes, shape):
    mesh = make_mesh(MeshConfig(**sizes))

    assert mesh.devices.shape == shape
    assert mesh.axis_names == ("replica", "fsdp", "sequence", "tensor")
    assert batch_shards(mesh) == shape[0] * shape[1]


@pytest.mark.parametrize(
    "sizes",
    [
        {"fsdp": 4},
        {"replica": 2, "fsdp": 4, "tensor": 2},
        {"replica": 2, "fsdp": 4, "sequence": 2},
        {"replica": 3, "fsdp": -1},
        {"replica": 16, "fsdp": -1},
    ],
)
def test_a_mesh_of_another_number_of_devices_is_refused(sizes):
    with pytest.raises(UserError, match=r"config\.mesh .* 8 devices"):
        make_mesh(MeshConfig(**sizes))


@pytest.mark.parametrize(
    ("of_model", "of_run", "shape", "named"),
    [
        ({"vocab_size": 31}, {}, (1, 1, 2), "config.model.vocab_size (31)"),
        ({"d_ff": 23}, {}, (1, 1, 2), "config.model.d_ff (23)"),
        ({"num_kv_heads": 1}, {}, (1, 1, 2), "config.model.num_kv_heads (1)"),
        ({}, {}, (1, 1, 8), "config.model.num_query_heads (4)"),
        ({"d_model": 12, "d_head": 3 * 2, "num_query_heads": 2}, {}, (1, 8, 1),
         "config.model.d_model (12)"),
        ({"d_model": 12, "d_head": 3 * 2, "num_query_heads": 2}, {}, (1, 2, 1, 4),
         "(12) is not divisible by the 8 devices of config.mesh.fsdp x sequence "
         "(2 x 4; 8 devices in all)"),
        ({}, {"accumulation": 8}, (2, 4, 1), "train.accumulation (4)"),
        ({}, {}, (1, 1, 1, 8), "config.data.seq_len (1000) is not divisible by 16"),
    ],
)  # fmt: skip
def test_what_the_mesh_cannot_split_is_refused(of_model, of_run, shape, named):
    cfg = dataclasses.replace(
        tiny_config(**of_model),
        data=DataConfig(batch_size=32, seq_len=1000),
        train=TrainConfig(**of_run),
    )

    with pytest.raises(UserError) as error:
        check_divisible(cfg, mesh_of(*shape))

    assert named in str(error.value)
    check_divisible(cfg, mesh_of(1, 1, 1))
