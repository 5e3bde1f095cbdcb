"""What a step on a GPU computes in another way than on a CPU, checked on a CPU.

Axes: B rows, T positions, M documents of a row.
"""

import dataclasses

import jax
import jax.numpy as jnp
import naive
import numpy as np
import pytest
from models import mesh_of, placed_batch, placed_params, random_params, tiny_config

from mtp_jax.config import ComputeConfig
from mtp_jax.model import attention, kernels
from mtp_jax.training.train_step import make_gradients

T = 16


def rows_of(documents):
    rng = np.random.default_rng(documents)
    return naive.packed_rows(rng, 8, T + 2, 32, n_documents=documents)


def gradients_of(cfg, rows):
    batch = placed_batch(rows, 1)
    params = placed_params(cfg.model, random_params(cfg.model))
    return jax.jit(make_gradients(cfg))(params, batch)


@pytest.mark.parametrize(
    ("mesh", "remat"), [((1, 1, 1), "none"), ((1, 1, 1), "full"), ((2, 2, 2), "dots")]
)
def test_layers_written_out_have_the_loss_and_gradients_of_a_loop(mesh, remat):
    cfg, found = tiny_config(num_layers=5), {}
    with jax.set_mesh(mesh_of(*mesh)):
        for scan in ("yes", "no"):
            compute = ComputeConfig(scan_layers=scan, remat=remat)
            changed = dataclasses.replace(cfg, compute=compute)
            found[scan] = gradients_of(changed, rows_of(3))

    (loss, _, grads), (loss_out, _, grads_out) = found["yes"], found["no"]
    assert float(loss) == pytest.approx(float(loss_out), rel=1e-6)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(grads_out), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(a)


def loops(scan, layers):
    """The loops over layers in the gradients' program, on the mesh that is set."""
    cfg = tiny_config(num_layers=layers)
    compute = ComputeConfig(scan_layers=scan, head_loss="naive")
    gradients = make_gradients(dataclasses.replace(cfg, compute=compute))
    params = placed_params(cfg.model, random_params(cfg.model))
    batch = placed_batch(rows_of(3), 1)
    return str(jax.make_jaxpr(gradients)(params, batch)).count("scan[")


def test_layers_written_out_are_no_loop():
    with jax.set_mesh(mesh_of(fsdp=2)):
        # The loop forwards and the loop backwards.
        assert loops("auto", 5) == loops("yes", 5) == loops("no", 5) + 2


def test_one_cpu_writes_out_few_layers(one_device):
    # Two layers are the heads'.
    assert loops("auto", 10) == loops("no", 10) == loops("yes", 10) - 2
    assert loops("auto", 11) == loops("yes", 11)


def test_documents_are_told_by_length_and_beginning():
    rng = np.random.default_rng(0)
    t = 512  # at most 4 documents
    rows = [[512], [1, 511], [100, 200, 150, 62], [511, 1], [128] * 4]
    segments_BT = np.stack(
        [np.repeat(rng.permutation(9)[: len(row)], row) for row in rows]
    )

    length_BM, offset_BM1 = kernels.document_lengths(jnp.asarray(segments_BT))

    assert kernels.most_documents(t) == 4
    for row, length_M, offset_M1 in zip(rows, length_BM, offset_BM1, strict=True):
        rest = [-1] * (4 - len(row))
        begins = np.cumsum([0, *row[:-1]]).tolist()
        assert length_M.tolist() == row + rest
        assert offset_M1.tolist() == begins + rest + [-1]


@pytest.mark.parametrize(("documents", "kernel"), [(2, "few"), (4, "any")])
@pytest.mark.parametrize("mesh", [(1, 1, 1), (2, 2, 1)], ids=["1", "4"])
def test_few_documents_go_to_the_kernel_for_few(monkeypatch, mesh, documents, kernel):
    """Two documents are few here; the devices are taken for GPUs."""
    cfg, called = tiny_config(), []
    with jax.set_mesh(mesh_of(*mesh)):
        expected = gradients_of(cfg, rows_of(documents))
    monkeypatch.setattr(attention, "_best", lambda _: "cudnn")
    monkeypatch.setattr(kernels, "why_not", lambda *_, **__: "")
    monkeypatch.setattr(kernels, "takes_lengths", lambda _: True)

    def kernel_of(name):
        def run(*of):
            jax.debug.callback(lambda: called.append(name))
            return attention._masked(*of)

        return run

    monkeypatch.setattr(kernels, "cudnn", kernel_of("any"))
    monkeypatch.setattr(kernels, "cudnn_of_few", kernel_of("few"))
    with jax.set_mesh(mesh_of(*mesh)):
        found = gradients_of(cfg, rows_of(documents))
    jax.effects_barrier()

    assert set(called) == {kernel}
    for a, b in zip(*map(jax.tree.leaves, (expected, found)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
