"""Attention kernels against the formula in NumPy, and which of them is taken where."""

import functools
import importlib
import json
import os
import pathlib
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import naive
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding
from models import mesh_of

from mtp_jax.config import ComputeConfig, Config, DataConfig, ModelConfig
from mtp_jax.errors import UserError
from mtp_jax.model import attention, kernels
from mtp_jax.model.attention import causal_attention, check_attention
from mtp_jax.parallel import zigzag
from mtp_jax.parallel.sharding import spec

CPU = AbstractDevice("cpu", None, "cpu")
TPU = AbstractDevice("TPU v5 lite", 1, "tpu")
NVIDIA = AbstractDevice("NVIDIA H200", 132, "gpu")
NVIDIA_AHEAD = AbstractDevice("NVIDIA H100 80GB HBM3", 132, "cuda")  # of a topology
AMD = AbstractDevice("AMD Instinct MI300X", 304, "gpu")


def random_rows(t, *, h, g, k=8, rows=2, seed=0):
    """Queries, keys, values, gradients of what is read, and segments, with padding."""
    rng = np.random.default_rng(seed)
    heads = (h, g, g, h)
    arrays = [rng.normal(size=(rows, t, n, k)).astype(np.float32) for n in heads]
    return arrays, naive.packed_rows(rng, rows, t, 32, padding=t // 8)["segments"]


def formula(q_BTHK, k_BTGK, v_BTGK, d_out_BTHK, segments_BT, window=0):
    """What is read, and the gradients of queries, keys and values, in float64."""
    q, k, v, d_out = (
        np.asarray(x, np.float64).swapaxes(1, 2)
        for x in (q_BTHK, k_BTGK, v_BTGK, d_out_BTHK)
    )
    b, g, t, width = k.shape
    k, v = (np.repeat(x, q.shape[1] // g, axis=1) for x in (k, v))
    seen_BTT = np.tril(segments_BT[:, :, None] == segments_BT[:, None, :])
    if window:
        seen_BTT &= ~np.tril(np.ones((t, t), bool), -window)
    score = np.where(seen_BTT[:, None], q @ k.swapaxes(2, 3) / width**0.5, -np.inf)
    weight = np.exp(score - score.max(axis=-1, keepdims=True))
    weight /= weight.sum(axis=-1, keepdims=True)
    d_weight = d_out @ v.swapaxes(2, 3)
    d_score = weight * (d_weight - (d_weight * weight).sum(axis=-1, keepdims=True))
    d_q = d_score @ k / width**0.5
    d_k = d_score.swapaxes(2, 3) @ q / width**0.5
    d_v = weight.swapaxes(2, 3) @ d_out
    d_k, d_v = (x.reshape(b, g, -1, t, width).sum(axis=2) for x in (d_k, d_v))
    return [x.swapaxes(1, 2) for x in (weight @ v, d_q, d_k, d_v)]


def ours(kernel, mesh, arrays, segments_BT, window=0):
    """The same four by a kernel, on a mesh."""
    by_head = NamedSharding(mesh, spec("batch", "time", "heads", None))
    by_row = NamedSharding(mesh, spec("batch", None))

    @jax.jit
    def run(q_BTHK, k_BTGK, v_BTGK, d_out_BTHK, segments_BT):
        def read(*qkv):
            return causal_attention(*qkv, segments_BT, kernel, window=window)

        out_BTHK, pull = jax.vjp(read, q_BTHK, k_BTGK, v_BTGK)
        return out_BTHK, *pull(d_out_BTHK)

    order_T = zigzag.positions(segments_BT.shape[1], mesh.shape["sequence"])
    placed = jax.device_put([x[:, order_T] for x in arrays], by_head)
    found = run(*placed, jax.device_put(segments_BT, by_row))
    assert all(x.sharding.spec == by_head.spec for x in found)
    return [np.asarray(x)[:, np.argsort(order_T)] for x in found]


@pytest.fixture
def interpreted(monkeypatch):
    """Splash runs on the CPU."""
    splash = functools.partial(kernels.splash, interpret=True)
    monkeypatch.setattr(kernels, "splash", splash)


@pytest.mark.parametrize(
    ("kernel", "t", "h", "g"),
    [
        ("xla", 40, 4, 4),
        ("xla", 40, 4, 2),
        ("xla", 40, 4, 1),
        ("xla", 130, 4, 2),  # two blocks of queries on a CPU
        ("xla", 301, 2, 1),  # four, which are not of one size
        ("splash", 128, 2, 2),
        ("splash", 128, 4, 2),
        ("splash", 640, 3, 1),  # five blocks of queries, five of keys
    ],
)
def test_a_kernel_computes_the_formula_and_its_gradients(
    kernel, t, h, g, one_device, interpreted
):
    arrays, segments_BT = random_rows(t, h=h, g=g)

    found = ours(kernel, one_device, arrays, segments_BT)

    for x, expected in zip(found, formula(*arrays, segments_BT), strict=True):
        np.testing.assert_allclose(x, expected, atol=2e-5)
    assert {0, 1, 2} <= set(segments_BT[1])  # padding and several documents


@pytest.mark.parametrize(
    ("kernel", "t", "axes"),
    [
        ("splash", 128, {"fsdp": 2, "tensor": 2}),
        ("splash", 1024, {"sequence": 4}),
        ("splash", 512, {"tensor": 2, "sequence": 2}),
        ("xla", 48, {"sequence": 8}),
        ("xla", 40, {"fsdp": 2, "tensor": 2, "sequence": 2}),
    ],
)
def test_every_device_reads_with_its_own_rows_heads_and_positions(
    kernel, t, axes, interpreted
):
    arrays, segments_BT = random_rows(t, h=4, g=2)

    mesh = mesh_of(**axes)
    with jax.set_mesh(mesh):
        found = ours(kernel, mesh, arrays, segments_BT)

    for x, expected in zip(found, formula(*arrays, segments_BT), strict=True):
        np.testing.assert_allclose(x, expected, atol=2e-5)


@pytest.mark.parametrize("window", [1, 5, 200])
@pytest.mark.parametrize(
    ("kernel", "t", "axes"),
    [
        ("xla", 40, {}),
        ("xla", 301, {}),  # four blocks of queries on a CPU
        ("xla", 40, {"sequence": 2}),
        ("splash", 384, {}),
        ("splash", 512, {"sequence": 2}),
    ],
)
def test_a_window_hides_what_is_further_back(kernel, t, axes, window, interpreted):
    arrays, segments_BT = random_rows(t, h=2, g=1)

    mesh = mesh_of(**axes)
    with jax.set_mesh(mesh):
        found = ours(kernel, mesh, arrays, segments_BT, window)

    for x, expected in zip(found, formula(*arrays, segments_BT, window), strict=True):
        np.testing.assert_allclose(x, expected, atol=2e-5)


@pytest.mark.parametrize("parts", [1, 2, 3, 8])
def test_devices_that_share_a_row_have_the_same_share_of_its_attention(parts):
    length = 48

    positions_S = zigzag.positions(length, parts)

    read_S = positions_S + 1  # keys that a query reads
    by_device = read_S.reshape(parts, -1).sum(axis=1)
    assert sorted(positions_S) == list(range(length))
    assert set(by_device) == {length * (length + 1) / 2 / parts}


@pytest.mark.parametrize("parts", [1, 2, 3, 8])
def test_a_row_comes_back_from_the_devices_in_order(parts):
    x_BT = np.arange(96).reshape(2, 48)

    dealt_BT = zigzag.deal(x_BT, parts, axis=1)

    np.testing.assert_array_equal(dealt_BT[0], zigzag.positions(48, parts))
    np.testing.assert_array_equal(zigzag.restore(dealt_BT, parts, axis=1), x_BT)


@pytest.mark.parametrize(
    ("device", "t", "k", "dtype", "expected"),
    [
        (CPU, 1024, 64, "bfloat16", "blockwise"),
        (TPU, 1024, 64, "bfloat16", "splash"),
        (TPU, 384, 80, "float32", "splash"),
        (TPU, 1000, 64, "bfloat16", "xla"),
        (NVIDIA, 1024, 64, "bfloat16", "cudnn"),
        (NVIDIA_AHEAD, 1024, 128, "bfloat16", "cudnn"),
        (NVIDIA, 1000, 8, "bfloat16", "cudnn"),
        (NVIDIA, 1024, 64, "float32", "xla"),
        (NVIDIA, 1024, 60, "bfloat16", "xla"),
        (NVIDIA, 1024, 256, "bfloat16", "xla"),
        (NVIDIA, 1023, 64, "bfloat16", "xla"),
        (AMD, 1024, 64, "bfloat16", "xla"),
        (None, 1024, 64, "bfloat16", "xla"),
    ],
)
def test_auto_takes_the_kernel_of_the_device_if_the_shape_allows(
    device, t, k, dtype, expected, monkeypatch
):
    taken = []
    for name in ("splash", "cudnn", "xla", "blockwise"):

        def kernel(q_BTHK, *_, name=name):
            taken.append(name)
            return q_BTHK

        module = attention if name == "blockwise" else kernels
        monkeypatch.setattr(module, name, kernel)
    mesh = abstract_mesh(device)

    with jax.sharding.use_abstract_mesh(mesh):
        jax.eval_shape(
            causal_attention, *abstract_arguments(mesh, 2, t, 4, 2, k, dtype)
        )

    assert taken == [expected]


def abstract_mesh(device, sequence=1):
    names, axes = ("replica", "fsdp", "sequence", "tensor"), (AxisType.Explicit,) * 4
    shape = (1, 1, sequence, 1)
    return AbstractMesh(shape, names, axes, abstract_device=device)


def abstract_arguments(mesh, b, t, h, g, k, dtype):
    """Shapes of queries, keys, values and segments."""
    by_head = NamedSharding(mesh, spec("batch", "time", "heads", None))
    qkv = [
        jax.ShapeDtypeStruct((b, t, n, k), dtype, sharding=by_head) for n in (h, g, g)
    ]
    by_row = NamedSharding(mesh, spec("batch", None))
    return *qkv, jax.ShapeDtypeStruct((b, t), "int32", sharding=by_row)


@pytest.mark.parametrize(
    ("kernel", "device", "shape", "words"),
    [
        ("splash", CPU, {}, ["runs on TPUs", "'cpu'"]),
        ("splash", NVIDIA, {}, ["runs on TPUs", "'NVIDIA H200'"]),
        (
            "splash",
            TPU,
            {"t": 1000},
            ["a multiple of 128", "config.data.seq_len is 1000"],
        ),
        (
            "splash",
            TPU,
            {"t": 1024, "sequence": 16},
            ["of 4096 positions with config.mesh.sequence = 16", "seq_len is 1024"],
        ),
        ("cudnn", CPU, {}, ["runs on NVIDIA GPUs", "'cpu'"]),
        ("cudnn", TPU, {}, ["runs on NVIDIA GPUs", "'TPU v5 lite'"]),
        ("cudnn", AMD, {}, ["runs on NVIDIA GPUs", "'AMD Instinct MI300X'"]),
        (
            "cudnn",
            NVIDIA,
            {"dtype": "float32"},
            ["takes bfloat16", "config.model.compute_dtype is float32"],
        ),
        ("cudnn", NVIDIA, {"k": 256}, ["up to 128", "config.model.d_head is 256"]),
        ("cudnn", NVIDIA, {"k": 60}, ["a multiple of 8", "config.model.d_head is 60"]),
        (
            "cudnn",
            NVIDIA,
            {"t": 1023},
            ["an even number", "config.data.seq_len is 1023"],
        ),
    ],
)
def test_a_kernel_that_cannot_run_is_refused_in_a_line(kernel, device, shape, words):
    with pytest.raises(UserError) as error:
        check(kernel, device, **shape)

    said = str(error.value)
    assert said.startswith(f"config.compute.attention is {kernel}, which ")
    assert "with auto" in said and "\n" not in said
    for word in words:
        assert word in said


@pytest.mark.parametrize(
    ("kernel", "device", "shape"),
    [
        ("splash", TPU, {}),
        ("splash", TPU, {"sequence": 4}),
        ("cudnn", NVIDIA, {}),
        ("xla", TPU, {"t": 7}),
        ("auto", CPU, {"dtype": "float32"}),
        ("auto", TPU, {"t": 7}),
    ],
)
def test_a_kernel_that_can_run_is_not_refused(kernel, device, shape):
    check(kernel, device, **shape)


def check(kernel, device, *, t=1024, k=64, dtype="bfloat16", sequence=1):
    cfg = Config(
        model=ModelConfig(
            num_query_heads=4,
            num_kv_heads=4,
            d_head=k,
            d_model=4 * k,
            compute_dtype=dtype,
        ),
        data=DataConfig(seq_len=t),
        compute=ComputeConfig(attention=kernel),
    )
    mesh = abstract_mesh(device, sequence)
    check_attention(cfg, types.SimpleNamespace(abstract_mesh=mesh, shape=mesh.shape))


@pytest.mark.parametrize("sequence", [1, 2])
def test_cudnn_is_called_forward_and_backward_for_each_devices_rows_and_heads(
    sequence, monkeypatch
):
    # There is no GPU to ask for its versions; the program is made, not compiled.
    library = importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(library, "check_cudnn_version", lambda: 91100)
    monkeypatch.setattr(library, "check_compute_capability", lambda version: True)
    mesh = mesh_of(fsdp=2, tensor=2, sequence=sequence)
    t = 64 // sequence  # queries; all keys

    def loss(q_BTHK, k_BTGK, v_BTGK, segments_BT):
        out_BTHK = causal_attention(q_BTHK, k_BTGK, v_BTGK, segments_BT, "cudnn")
        return jnp.sum(out_BTHK.astype(jnp.float32))

    with jax.set_mesh(mesh):
        shapes = abstract_arguments(mesh, 4, 64, 4, 2, 16, "bfloat16")
        traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(*shapes)
        program = traced.lower(lowering_platforms=("cuda",)).as_text()

    calls = [line for line in program.splitlines() if "@__cudnn$" in line]
    forward, backward = sorted(calls, key=len)
    assert "@__cudnn$fmhaScaleBiasSoftmax(" in forward
    assert "@__cudnn$fmhaScaleBiasSoftmaxBackward(" in backward
    for call in calls:
        assert ("CAUSAL" in call) == (sequence == 1)  # else the mask says it
        operands = call.rpartition(" : (")[2].split(" -> ")[0]
        # Half of the rows, half of the heads, the keys not repeated; then the mask.
        assert operands.startswith(
            f"tensor<2x{t}x2x16xbf16>, tensor<2x64x1x16xbf16>, tensor<2x64x1x16xbf16>, "
        )
        assert f"tensor<2x1x{t}x64xbf16>" in operands


@pytest.mark.packages
def test_programs_for_tpu_call_splash_and_offload_what_they_say():
    pytest.importorskip("libtpu")
    tests = pathlib.Path(__file__).parent
    command = [sys.executable, tests / "tpu_program.py", "full", "offload"]
    env = {k: x for k, x in os.environ.items() if k != "XLA_FLAGS"}

    run = subprocess.run(
        command,
        env=env | {"PYTHONPATH": str(tests.parent)},
        capture_output=True,
        text=True,
        timeout=280,
    )

    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout.splitlines()[-1])
    # Forward, gradients of queries, those of keys and values: in the trunk and in the
    # heads; and the trunk's forward again.
    assert found["full"]["kernels"] == 7
    assert found["offload"]["kernels"] >= 7
    inputs = (
        256 * 2 * 256 * 256 * 2
    )  # layers, rows of a device, positions, width, bytes
    assert found["full"]["host"] == 0
    assert found["offload"]["host"] == inputs
    assert found["offload"]["device"] < found["full"]["device"] - 0.8 * inputs
