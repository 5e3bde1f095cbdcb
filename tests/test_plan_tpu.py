"""The planner and libtpu: refusals, and real compiles for TPUs."""

import contextlib
import importlib.util
import json
import re
import sys

import jax
import jax.numpy as jnp
import pytest
from runs import TINY_FILE, finish, start

from mtp_jax import __main__
from mtp_jax.config import MeshConfig
from mtp_jax.parallel.sharding import make_mesh
from mtp_jax.planning import aot, plan
from mtp_jax.training.train_step import TrainState

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
)


def placed_on_one(shape, dtype):
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def test_refusals_for_memory_are_read():
    whole = (
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in "
        "memory space hbm. Used 16.97G of 15.75G hbm. Exceeded hbm capacity by 1.22G."
        "\n\nTotal hbm usage >= 17.22G:\n    reserved        258.00M \n"
        "    program          11.34G \n    arguments         5.63G \n"
    )
    state = TrainState(None, None, None, {}, None)

    found = aot._refused(whole, state, {})

    gib = [found.argument_bytes, found.temp_bytes, found.hbm_bytes, found.limit_bytes]
    assert [round(x / 2**30, 2) for x in gib] == [5.63, 11.34, 16.97, 15.75]
    assert found.program is None
    early = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for "
        "HLO temporaries (15.88G) exceeds available HBM (15.75G)."
    )
    batch = {"tokens": placed_on_one((2**28,), jnp.float32)}
    found = aot._refused(early, state, batch)
    gib = [found.argument_bytes, found.temp_bytes, found.hbm_bytes, found.limit_bytes]
    assert [round(x / 2**30, 2) for x in gib] == [1.0, 14.88, 15.88, 15.75]
    with pytest.raises(jax.errors.JaxRuntimeError, match="vmem"):
        aot._refused("RESOURCE_EXHAUSTED: Ran out of memory in vmem", state, {})


@pytest.fixture
def refused(monkeypatch, capsys):
    """The one line of a command that is refused before anything is compiled."""
    monkeypatch.setattr(plan, "no_devices", contextlib.nullcontext)
    monkeypatch.setattr(plan, "compile_step", None)

    def run(*options):
        argv = ["mtp-jax", "plan", f"--config={TINY_FILE}", *options]
        monkeypatch.setattr(sys, "argv", argv)
        sys.modules.pop("config_config", None)  # the config file of the test before
        assert __main__.main() == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    return run


def test_what_needs_no_libtpu_is_refused_without(refused):
    assert "--heads=5 is more" in refused("--topology=v5e:2x2", "--heads=1,5")
    assert "'0' is not a whole" in refused("--topology=v5e:2x2", "--heads=0")
    assert "'x' is not a whole" in refused("--topology=v5e:2x2", "--heads=1,x")
    weights = "--config.loss.head_weights=(1.0,0.5)"
    assert "2 values for 3 heads" in refused("--topology=v5e:2x2", weights)
    assert "--topology" in refused()


def test_a_missing_libtpu_is_named(refused, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)

    line = refused("--topology=v5e:2x2")

    assert line == "mtp-jax: error: plan needs libtpu: pip install 'mtp-jax[tpu]'."


def planned(*options):
    """Exit code, stdout and stderr of a real `plan`."""
    return finish(start(["plan", *options]))


@pytest.mark.packages
@needs_libtpu
def test_topologies_and_meshes_are_refused_before_compiling(refused, monkeypatch):
    for name, value in (
        ("TPU_SKIP_MDS_QUERY", "1"),
        ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1"),
    ):
        monkeypatch.setenv(name, value)

    assert "such as v4:2x2x1, v5e:4x4" in refused("--topology=v5e:3x3")
    assert "such as v4:2x2x1, v5e:4x4" in refused("--topology=v5e:2x2,v9:2x2")
    assert "such as v4:2x2x1, v5e:4x4" in refused("--topology=moon")
    assert "slices of up to 256 chips" in refused("--topology=v5e:16x32")
    assert "v6e, which has 2 dimensions" in refused("--topology=v6e:2x2x2")
    assert "no figures of a TPU v2" in refused("--topology=v2:2x2")
    assert "(8) is not divisible by the 16 devices" in refused("--topology=v5e:4x4")
    assert "such as v4:2x2x1, v5e:4x4" in refused("--topology=0xv5e:2x2")
    said = refused("--topology=2xv5e:2x2")
    assert "config.mesh.replica is 1, with 8 devices in 2 slices" in said
    mesh = "--config.mesh.fsdp=3"
    assert "does not multiply to the 4 devices" in refused("--topology=v5e:2x2", mesh)
    cudnn = "--config.compute.attention=cudnn"
    assert "runs on NVIDIA GPUs" in refused("--topology=v5e:2x2", cudnn)
    splash = "--config.compute.attention=splash"
    assert "config.data.seq_len is 64" in refused("--topology=v5e:2x2", splash)


@pytest.mark.packages
@needs_libtpu
def test_a_tiny_model_compiles_for_a_tpu():
    code, out, err = planned(
        f"--config={TINY_FILE}", "--topology=v5e:2x2", "--heads=2", "--json"
    )

    assert code == 0, err
    rows = json.loads(out)
    assert [(row["topology"], row["heads"]) for row in rows] == [
        ("v5e:2x2", 1),
        ("v5e:2x2", 2),
    ]
    wanted = re.findall(r"\w+", "topology chips heads params argument_bytes temp_bytes")
    wanted += ["hbm_bytes", "fits", "flops_per_step", "overhead_vs_n1", "remedy"]
    for row in rows:
        assert set(wanted) <= set(row)
        assert row["fits"] and row["chips"] == 4 and row["remedy"] is None
        layer = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128  # and two norms
        assert row["params"] == 2 * 256 * 64 + 4 * (layer + 2 * 64) + 64
        # Parameters and two moments of four bytes, a quarter on each chip.
        assert row["argument_bytes"] > row["params"] * 12 / 4
        assert row["unknown_loops"] == 0
        # At most two passes gather the matrices of a layer, one the unembedding; in 2
        # or 4 bytes.
        gathered = 3 / 4 * (2 * 4 * layer + 256 * 64)
        sent = row["collectives"]["all-gather"]["bytes"]
        assert gathered * 0.9 < sent < 4 * gathered * 1.1
    assert rows[0]["overhead_vs_n1"] == 0.0
    assert rows[1]["flops_unembedding"] == 2 * rows[0]["flops_unembedding"]


@pytest.mark.packages
@needs_libtpu
def test_replicas_are_on_slices_of_their_own(monkeypatch):
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    devices = aot.topology_devices("2xv5p:2x2x1")
    sizes = {"replica": 4, "fsdp": 1, "sequence": 2}

    mesh = make_mesh(MeshConfig(**sizes), devices)

    assert mesh.devices.shape == (4, 1, 2, 1)
    slices = [{d.slice_index for d in replica.flat} for replica in mesh.devices]
    assert slices == [{0}, {0}, {1}, {1}]
    assert len(set(mesh.devices.flat)) == 8


@pytest.mark.packages
@needs_libtpu
def test_a_step_compiles_for_two_slices_whose_rows_are_split():
    code, out, err = planned(
        f"--config={TINY_FILE}",
        "--topology=2xv5p:2x2x1",
        "--heads=1",
        "--json",
        "--config.mesh.replica=2",
        "--config.mesh.sequence=2",
        "--config.data.seq_len=512",
    )

    assert code == 0, err
    (row,) = json.loads(out)
    assert row["fits"] and row["chips"] == 8 and row["unknown_loops"] == 0
    # Each gradient of the four shards of a copy, once in float32; the table's, too.
    least = row["params"] * 4 / 4
    assert least < row["collectives"]["dcn"]["bytes"] < 2 * least
    assert row["dcn_s"] == row["collectives"]["dcn"]["bytes"] / 6.25e9


@pytest.mark.packages
@needs_libtpu
def test_what_does_not_fit_is_told_with_its_remedy(tmp_path):
    # So many small layers, with all of each kept, that only their number costs.
    text = TINY_FILE.read_text().replace("    return c", "    c.compute.remat = 'none'")
    file = tmp_path / "deep.py"
    file.write_text(f"{text}\n    return c\n")
    code, out, err = planned(
        f"--config={file}",
        "--topology=v5e:2x2",
        "--heads=1",
        "--json",
        "--config.model.num_layers=9600",
        "--config.model.d_model=128",
        "--config.model.num_query_heads=1",
        "--config.model.num_kv_heads=1",
        "--config.model.d_head=128",
        "--config.data.seq_len=128",
        "--config.data.batch_size=32",
    )

    assert code == 0, err
    (row,) = json.loads(out)
    assert not row["fits"]
    assert row["hbm_bytes"] > row["hbm_limit_bytes"] == int(15.75 * 2**30)
    assert row["hbm_bytes"] >= row["temp_bytes"] + row["argument_bytes"]
    assert row["collectives"] is None and row["links_s"] is None
    assert row["remedy"] == "--config.compute.remat=full"
