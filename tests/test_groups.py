"""Groups of parameters: rates, decay, clips, freezing; heads that wait; checkpoints."""

import dataclasses
import functools

import jax
import naive
import numpy as np
import optax
import pytest
from head_cases import model_of
from models import TINY, mesh_of, placed_batch

from mtp_jax.checkpoint.checkpoints import (
    Checkpoints,
    abstract_items,
    restore_newest,
    state_from_items,
)
from mtp_jax.config import (
    CheckpointConfig,
    Config,
    HeadsConfig,
    LossConfig,
    OptimConfig,
    TrainConfig,
)
from mtp_jax.config.learning import check_learning, groups_there
from mtp_jax.errors import UserError
from mtp_jax.run.records import step_record
from mtp_jax.run.stopwatch import Window
from mtp_jax.training.train_step import make_gradients, make_init, make_step

LR = 0.02
OPTIM = OptimConfig(peak_lr=LR, warmup_steps=0, decay_ratio=1.0, eps=1e-3)
N, STEPS = 3, 6
MODEL = dataclasses.replace(TINY, num_layers=4, n_future_tokens=N)


def config_of(loss=None, model=MODEL, **of_optim):
    return Config(
        model=model,
        loss=loss or LossConfig(),
        optim=dataclasses.replace(OPTIM, **of_optim),
        train=TrainConfig(steps=STEPS),
    )


def batch(seed=0, n=N):
    rng = np.random.default_rng(seed)
    rows = naive.packed_rows(rng, 8, 10 + n, TINY.vocab_size, padding=2)
    rows["hash"] = rng.integers(2**31, 2**32, (8, 2), dtype=np.uint32)
    return placed_batch(rows, 1)


def leaves(tree):
    """Arrays by the names that lead to them."""
    return {
        ".".join(key.key for key in path): np.asarray(x, np.float64)
        for path, x in jax.tree.leaves_with_path(jax.device_get(tree))
    }


def group(name):
    first = name.split(".")[0]
    own = {"w_embedding": "embedding", "w_unembedding": "unembedding", "norm": "norms"}
    return own.get(first, first)


def test_a_step_treats_every_group_as_it_was_told(one_device):
    cfg = config_of(
        rates=(("heads", 3.0), ("norms", 0.5)),
        decays=(("unembedding", 0.0), ("heads", 0.5)),
        clips=(("heads", 0.05),),
        clip_norm=0.5,
        frozen=("embedding",),
    )
    state = make_init(cfg)(jax.random.key(0))
    _, _, grads = jax.jit(make_gradients(cfg))(state.params, batch())
    before, grads = leaves(state.params), leaves(grads)

    state, metrics = make_step(cfg)(state, batch())

    after = leaves(state.params)
    assert "w_embedding" not in grads and "embedding" not in optax.tree.get(
        state.opt_state, "mu"
    )
    np.testing.assert_array_equal(after["w_embedding"], before["w_embedding"])
    norms = {
        of_heads: np.sqrt(
            sum(
                (x**2).sum()
                for k, x in grads.items()
                if (group(k) == "heads") == of_heads
            )
        )
        for of_heads in (True, False)
    }
    assert norms[True] > 0.05 and norms[False] > 0.5
    for name, grad in grads.items():
        of_heads = group(name) == "heads"
        grad = grad * min(1, (0.05 if of_heads else 0.5) / norms[of_heads])
        update = grad / (np.abs(grad) + OPTIM.eps)
        if name.split(".")[-1].startswith("w_"):
            decay = {"unembedding": 0.0, "heads": 0.5}.get(group(name), 0.1)
            update = update + decay * before[name]
        rate = LR * {"heads": 3.0, "norms": 0.5}.get(group(name), 1.0)
        np.testing.assert_allclose(
            after[name], before[name] - rate * update, atol=3e-6, err_msg=name
        )
    np.testing.assert_allclose(metrics["norm/heads"], norms[True], rtol=1e-4)
    assert metrics["clipped"] == 1


@pytest.mark.parametrize(
    ("name", "n", "tied"),
    [("linear", 1, False), ("serial", 1, True), ("residual", 1, False)],
)
def test_groups_that_a_model_lacks_have_no_norm(one_device, name, n, tied):
    model = dataclasses.replace(
        MODEL, n_future_tokens=n, tie_embeddings=tied, heads=HeadsConfig(kind=name)
    )
    cfg = config_of(model=model, rates=(("trunk", 0.5),))
    state = make_init(cfg)(jax.random.key(0))
    there = {group(name) for name in leaves(state.params)}

    _, metrics = make_step(cfg)(state, batch(n=n))

    record = step_record(cfg, 1, jax.device_get(metrics), Window(1.0, 0.0, 0.0))
    told = {key.split("/")[1] for key in record if key.startswith("grad_norm/")}
    assert told == there == set(groups_there(model)) and "heads" not in told
    frozen = dataclasses.replace(cfg.optim, frozen=tuple(there))
    with pytest.raises(UserError, match=r"every group of this model \(.*embedding"):
        check_learning(dataclasses.replace(cfg, optim=frozen))
    check_learning(cfg)


@pytest.mark.parametrize(("bound", "clipped"), [(1e-3, 1), (1e3, 0)])
def test_a_clip_of_a_group_is_told_by_its_own_bound(one_device, bound, clipped):
    clips = tuple((g, bound) for g in ("trunk", "heads", "norms"))
    clips += (("unembedding", 1e3), ("embedding", 1e3))
    cfg = config_of(clips=clips, clip_norm=1e-3)
    state = make_init(cfg)(jax.random.key(0))

    _, metrics = make_step(cfg)(state, batch())

    assert metrics["clipped"] == clipped


def test_nothing_runs_backward_through_a_trunk_that_nothing_trains(one_device):
    def flops(cfg):
        state = jax.eval_shape(make_init(cfg), jax.random.key(0))
        compiled = jax.jit(make_gradients(cfg)).lower(state.params, batch()).compile()
        return compiled.cost_analysis()["flops"]

    frozen = flops(config_of(frozen=("trunk", "embedding")))

    # The bodies of loops count once: of one trunk layer forward, of two backward; and
    # one head of both.
    whole = flops(config_of())
    assert frozen < 0.8 * whole


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"rates": (("body", 2.0),)}, "names 'body'"),
        ({"rates": (("heads", -2.0),)}, "must be 0 or more"),
        ({"rates": (("heads", 1.0), ("heads", 2.0))}, "names a group twice"),
        ({"decays": (("heads",),)}, "give pairs"),
        ({"clips": (("heads", 0.0),)}, "must be above 0"),
        ({"frozen": ("tail",)}, "names 'tail'"),
        (
            {"frozen": ("trunk", "heads", "unembedding", "embedding", "norms")},
            "leave one",
        ),
    ],
    ids=str,
)
def test_groups_that_are_none_are_refused(fields, words):
    with pytest.raises(UserError, match=words) as error:
        OptimConfig(**fields)

    assert "config.optim" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["parallel", "causal"])
def test_heads_that_wait_do_not_move_and_come_back_as_they_were(kind, one_device):
    model = MODEL if kind == "parallel" else model_of("causal", N)
    table = ((0, 1, 1, 1), (1, 1, 1, 0), (2, 1, 1, 1))
    cfg = config_of(LossConfig(schedule=table), model=model)
    state, step = make_init(cfg)(jax.random.key(0)), make_step(cfg)
    seen, idle = [], {}
    for k in range(3):
        state, metrics = step(state, batch(k))
        seen.append(jax.device_get((state.params, state.opt_state)))
        if k == 1:
            idle = jax.device_get(metrics)

    for part in (0, 1):
        first, second, third = (
            {
                jax.tree_util.keystr(path): x
                for path, x in jax.tree.leaves_with_path(s[part])
                if "heads" in jax.tree_util.keystr(path)
            }
            for s in seen
        )
        assert first
        for name, x in first.items():
            np.testing.assert_array_equal(second[name][2], x[2], err_msg=name)
            assert (third[name][2] != x[2]).any(), name
            assert (second[name][:2] != x[:2]).any(), name
    assert np.isnan(idle["loss_N"]).tolist() == [False, False, True]
    record = step_record(cfg, 2, idle, Window(1.0, 0.0, 0.0))
    assert "loss/head_2" in record and "loss/head_3" not in record


def test_a_head_of_no_weight_stands_still_as_one_that_waits(one_device):
    """Its weight decay too, which alone would move it."""
    cfg = config_of(LossConfig(head_weights=(1.0, 0.0, 1.0)))
    state, step = make_init(cfg)(jax.random.key(0)), make_step(cfg)
    before = leaves(state.params["heads"])

    state, metrics = step(state, batch())

    for name, x in leaves(state.params["heads"]).items():
        np.testing.assert_array_equal(x[1], before[name][1], err_msg=name)
        assert (x[[0, 2]] != before[name][[0, 2]]).any(), name
    assert np.isfinite(metrics["loss_N"]).all()  # it is measured


def test_a_head_of_no_weight_is_measured_while_others_wait(one_device):
    loss = LossConfig(head_weights=(1.0, 0.0, 1.0), schedule=((0, 1, 1, 0),))
    cfg = config_of(loss)
    state = make_init(cfg)(jax.random.key(0))

    _, metrics = make_step(cfg)(state, batch())

    assert np.isnan(metrics["loss_N"]).tolist() == [False, False, True]


@pytest.mark.parametrize("hidden", ["before", "after"])
def test_a_norm_that_later_heads_read_through_is_trained_with_them(hidden, one_device):
    heads = {"kind": "serial", "norm": "own", "hidden": hidden}
    model = dataclasses.replace(MODEL, heads=HeadsConfig(**heads))
    loss = LossConfig(schedule=((0, 1, 0, 1),), acceptance=True)
    cfg = config_of(loss, model=model)
    state, step = make_init(cfg)(jax.random.key(0)), make_step(cfg)
    before = np.asarray(state.params["norm"])

    state, metrics = step(state, batch())

    moved_N = (np.asarray(state.params["norm"]) != before).any(axis=1)
    assert moved_N.tolist() == [True, hidden == "after", True]
    # A draft of a head that waits is none, although the head runs for the next one.
    assert metrics["sampled_length"] == metrics["accept_length"] == 1.0


def test_idle_heads_skip_their_work_and_change_no_gradient(one_device):
    """Gradients are those of a run in which these heads weigh nothing."""
    table = ((0, 1, 0, 1),)
    for kind in ("hard", "kl"):
        fields = {"kind": kind, "gradient_meter": True}
        found, skips = [], []
        for loss in (
            LossConfig(schedule=table, **fields),
            LossConfig(head_weights=(1.0, 0.0, 1.0), **fields),
        ):
            cfg = config_of(loss)
            params = make_init(cfg)(jax.random.key(0)).params
            compiled = jax.jit(make_gradients(cfg)).lower(params, batch()).compile()
            found.append(compiled(params, batch()))
            skips.append("conditional(" in compiled.as_text())
        assert skips == [True, False]
        (loss, sums, grads), (value, other, expected) = jax.device_get(found)
        np.testing.assert_allclose(loss, value, rtol=1e-6)
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6),
            grads,
            expected,
        )
        assert sums.count_N[1] == 0 < other.count_N[1]


def restored(cfg, folder):
    shapes = jax.eval_shape(make_init(cfg), jax.random.key(0))
    checkpoints = Checkpoints(folder)
    _, items, _ = restore_newest(checkpoints, abstract_items(shapes))
    checkpoints.close()
    return state_from_items(items)


def saved(state, folder, step):
    checkpoints = Checkpoints(folder, CheckpointConfig())
    checkpoints.save(step, state, {})
    checkpoints.close()


def test_a_run_resumes_bit_for_bit_across_the_end_of_a_phase(tmp_path):
    loss = LossConfig(
        schedule=("reverse",), kind="kl", teacher="ema", balance="encodec",
        teacher_decay=0.5, trunk_gradient=("warmup", 4.0),
    )  # fmt: skip
    cfg = config_of(loss)
    with jax.set_mesh(mesh_of(1, 2, 1)):
        state, step = make_init(cfg)(jax.random.key(0)), make_step(cfg)
        for k in range(STEPS):
            if k == 2:  # two steps of three heads are done
                saved(state, tmp_path, k)
            state, _ = step(state, batch(k))
        again = restored(cfg, tmp_path)
        assert int(again.step) == 2
        for k in range(2, STEPS):
            again, _ = step(again, batch(k))

    jax.tree.map(np.testing.assert_array_equal, *jax.device_get((state, again)))


def test_a_teacher_is_the_mean_of_the_parameters_over_steps(one_device):
    cfg = config_of(LossConfig(kind="tv", teacher="ema", teacher_decay=0.75))
    state, step = make_init(cfg)(jax.random.key(0)), make_step(cfg)
    mean = leaves(state.params)
    for k in range(2):
        state, _ = step(state, batch(k))
        now = leaves(state.params)
        mean = {name: 0.75 * x + 0.25 * now[name] for name, x in mean.items()}

    for name, x in leaves(state.teacher).items():
        np.testing.assert_allclose(x, mean[name], atol=1e-6, err_msg=name)


def test_other_groups_are_frozen_and_thawed_at_a_checkpoint(one_device, tmp_path):
    whole, frozen = config_of(), config_of(frozen=("trunk",))
    taught = config_of(LossConfig(kind="kl", teacher="ema", balance="occ"))
    state, _ = make_step(whole)(make_init(whole)(jax.random.key(0)), batch())
    was = jax.device_get(state)
    saved(state, tmp_path, 1)

    less = restored(frozen, tmp_path)
    more = jax.device_get(restored(taught, tmp_path))
    saved(less, tmp_path / "frozen", 1)
    back = jax.device_get(restored(whole, tmp_path / "frozen"))
    saved(restored(taught, tmp_path), tmp_path / "taught", 1)
    plain = jax.device_get(restored(whole, tmp_path / "taught"))

    grouped = config_of(
        rates=(("heads", 2.0),), decays=(("heads", 0.0),), clips=(("heads", 1.0),)
    )
    saved(restored(grouped, tmp_path), tmp_path / "grouped", 1)
    ungrouped = jax.device_get(restored(whole, tmp_path / "grouped"))
    jax.tree.map(np.testing.assert_array_equal, ungrouped, was)

    moments = optax.tree.get(was.opt_state, "mu")
    kept = jax.device_get(optax.tree.get(less.opt_state, "mu"))
    assert "trunk" not in kept
    jax.tree.map(
        np.testing.assert_array_equal,
        kept,
        {k: v for k, v in moments.items() if k != "trunk"},
    )
    thawed = optax.tree.get(back.opt_state, "mu")
    jax.tree.map(np.testing.assert_array_equal, thawed["heads"], moments["heads"])
    assert not any(x.any() for x in jax.tree.leaves(thawed["trunk"]))
    jax.tree.map(np.testing.assert_array_equal, more.teacher, was.params)
    assert not any(x.any() for x in more.balance.values())
    jax.tree.map(np.testing.assert_array_equal, plain, was)
