"""Local checkpoints: what comes back, what is ignored, and who may read them."""

import hashlib
import json
import os
import pathlib
import pickle
import shutil
import stat
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import mesh_of

from mtp_jax.checkpoint import shard_file
from mtp_jax.checkpoint.local import LocalCheckpoints
from mtp_jax.config import CheckpointConfig
from mtp_jax.parallel.sharding import abstract_tree, spec

ABOUT = {"step": 1.25, "lost": 0.0}


@pytest.fixture
def mesh():
    mesh = mesh_of(1, 4, 2)
    with jax.set_mesh(mesh):
        yield mesh


def make_state(mesh):
    """A tree with arrays of every kind of a state: split, whole, scalar, narrow."""
    key = jax.random.key(0)
    weights = jax.random.normal(key, (8, 6), jnp.float32)
    values = {
        "split": (weights, spec("embed", "heads")),
        "narrow": (weights.astype(jnp.bfloat16), spec("embed", None)),
        "whole": (jnp.arange(3, dtype=jnp.uint32), spec(None)),
        "count": (jnp.int32(7), spec()),
        "empty": (jnp.zeros((0, 4), jnp.float32), spec(None, None)),
    }
    return {
        name: jax.device_put(x, jax.NamedSharding(mesh, p))
        for name, (x, p) in values.items()
    }


def abstract_of(state, mesh):
    return abstract_tree(jax.eval_shape(lambda: state), mesh)


def opened(folder, setting="a model on a mesh"):
    cfg = CheckpointConfig(local_dir=str(folder), local_every=2)
    return LocalCheckpoints(cfg, "run", setting)


def saved(folder, state, steps=(2,)):
    local = opened(folder)
    for step in steps:
        local.save(step, state, ABOUT)
    local.wait()
    return local


def step_folder(folder, step=2):
    return folder / "run" / "0-of-1" / str(step)


def plant(folder, content):
    """Replaces the file of a step by other content, with the right checksum."""
    (folder / "shards").write_bytes(content)
    (folder / "sha256").write_text(hashlib.sha256(content).hexdigest())


def test_a_state_comes_back_bit_by_bit(mesh, tmp_path):
    state = make_state(mesh)
    abstract = abstract_of(state, mesh)
    saved(tmp_path, state)

    local = opened(tmp_path)
    newest = local.newest(0, abstract)
    found, about = local.restore(newest, abstract)

    assert (newest, about) == (2, ABOUT)
    for name, x in state.items():
        assert found[name].sharding == x.sharding and found[name].dtype == x.dtype
        assert jax.device_get(found[name]).tobytes() == jax.device_get(x).tobytes()


def test_only_the_newest_two_are_kept(mesh, tmp_path):
    state = make_state(mesh)

    local = saved(tmp_path, state, steps=(2, 4, 6))

    kept = {path.name for path in step_folder(tmp_path).parent.iterdir()}
    abstract = abstract_of(state, mesh)
    assert kept == {"4", "6"} and local.newest(0, abstract) == 6
    assert local.newest(6, abstract) == 6  # none is newer
    local.drop_after(4)
    assert local.newest(0, abstract) == 4


def test_those_of_another_number_of_processes_are_deleted(mesh, tmp_path):
    saved(tmp_path, make_state(mesh))
    step_folder(tmp_path).parent.rename(tmp_path / "run" / "0-of-2")

    opened(tmp_path)

    assert not list((tmp_path / "run").iterdir())


class Deed:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)


def test_a_pickle_is_ignored_and_does_nothing(mesh, tmp_path):
    """Files of the format before, which was pickle, may still lie there."""
    state, trace = make_state(mesh), tmp_path / "trace"
    local = saved(tmp_path / "local", state)
    content = pickle.dumps(Deed(trace), protocol=5)
    pickle.loads(content)
    assert trace.exists()  # the deed works
    trace.unlink()

    plant(step_folder(tmp_path / "local"), content)

    assert local.newest(0, abstract_of(state, mesh)) == 0
    assert not trace.exists()


def test_those_of_another_setting_or_another_state_are_ignored(mesh, tmp_path):
    state = make_state(mesh)
    abstract = abstract_of(state, mesh)
    local = saved(tmp_path, state)
    fewer = {name: x for name, x in abstract.items() if name != "count"}
    wider = {**abstract, "count": jax.ShapeDtypeStruct((), jnp.float32)}
    wider = abstract_tree(wider, mesh)

    assert opened(tmp_path, "another").newest(0, abstract) == 0
    assert local.newest(0, fewer) == 0
    assert local.newest(0, wider) == 0
    assert local.newest(0, abstract) == 2


@pytest.mark.parametrize("deed", ["flip", "cut", "longer", "delete"])
def test_damage_anywhere_is_ignored(mesh, tmp_path, deed):
    state = make_state(mesh)
    abstract = abstract_of(state, mesh)
    local = saved(tmp_path, state)
    path = step_folder(tmp_path) / "shards"
    content = path.read_bytes()

    for at in range(0, len(content), 97):
        damaged = {
            "flip": content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :],
            "cut": content[:at],
            "longer": content + content[: at + 1],
        }
        if deed == "delete":
            path.unlink(missing_ok=True)
        else:
            path.write_bytes(damaged[deed])
        assert local.newest(0, abstract) == 0, at


def split(content):
    """Magic, header and arrays of a file."""
    magic = content.index(b"\n") + 1
    (length,) = struct.unpack("<Q", content[magic : magic + 8])
    begin = magic + 8
    header = json.loads(content[begin : begin + length])
    return content[:magic], header, content[begin + length :]


HOSTILE = {
    "no object": lambda header: [],
    "no leaves": lambda header: header | {"leaves": None},
    "no setting": lambda header: {k: v for k, v in header.items() if k != "setting"},
    "object dtype": lambda header: _with_leaf(header, dtype="object"),
    "unknown dtype": lambda header: _with_leaf(header, dtype=["float32"]),
    "wider dtype": lambda header: _with_leaf(header, dtype="float64"),
    "equally wide dtype": lambda header: _with_leaf(header, dtype="float32"),
    "shard elsewhere": lambda header: _with_leaf(header, indices=[[[1, 4]]]),
    "huge shard": lambda header: _with_leaf(header, indices=[[[0, 10**30], [0, 6]]]),
    "negative": lambda header: _with_leaf(header, indices=[[[0, -2], [0, -6]]]),
    "backwards": lambda header: _with_leaf(header, indices=[[[5, 2], [7, 1]]]),
    "fractions": lambda header: _with_leaf(header, indices=[[[0, 1.5], [0, 2]]]),
    "texts": lambda header: _with_leaf(header, indices=[["ab", "cd"]]),
    "no pairs": lambda header: _with_leaf(header, indices=[[0, 1]]),
    "too few": lambda header: _with_leaf(header, indices=[]),
    "not a number": lambda header: header | {"about": {"step": float("nan")}},
    "too large": lambda header: header | {"about": {"step": 10**400}},
    "no numbers": lambda header: header | {"about": {"step": {}}},
    "about nothing": lambda header: header | {"about": None},
}


def _with_leaf(header, **fields):
    leaves = header["leaves"]
    return header | {"leaves": [*leaves[:-1], leaves[-1] | fields]}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_header_that_lies_is_ignored(mesh, tmp_path, kind):
    state = make_state(mesh)
    abstract = abstract_of(state, mesh)
    local = saved(tmp_path, state)
    magic, header, arrays = split((step_folder(tmp_path) / "shards").read_bytes())

    def planted(header):
        text = json.dumps(header).encode()
        plant(
            step_folder(tmp_path), magic + struct.pack("<Q", len(text)) + text + arrays
        )
        return local.newest(0, abstract)

    assert planted(header) == 2  # the planting works
    assert planted(HOSTILE[kind](header)) == 0


@pytest.mark.parametrize(
    "text",
    [b"[" * 10**5, b"\xff\xfe", b"", b"9" * 10**5],
    ids=["deep", "no text", "nothing", "long number"],
)
def test_a_header_that_is_no_json_is_ignored(tmp_path, text):
    content = b"mtp_jax shards 1\n" + struct.pack("<Q", len(text)) + text
    tmp_path.joinpath("shards").write_bytes(content)

    with pytest.raises(ValueError):
        shard_file.read(tmp_path / "shards", hashlib.sha256(content).hexdigest())


def test_a_header_longer_than_the_file_is_refused_before_memory_is_asked_for(tmp_path):
    content = b"mtp_jax shards 1\n" + struct.pack("<Q", 2**62) + b"{}"
    tmp_path.joinpath("shards").write_bytes(content)

    with pytest.raises(ValueError, match="too early"):
        shard_file.read(tmp_path / "shards", hashlib.sha256(content).hexdigest())


def test_an_array_of_objects_is_not_written(tmp_path):
    leaf = shard_file.Leaf(np.dtype(object), {((0, 1),): np.array([None])})

    with pytest.raises(ValueError, match="no file of shards holds arrays of object"):
        shard_file.write(tmp_path / "shards", shard_file.Contents("", {}, [leaf]))


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("umask", [0, 0o022, 0o077])
def test_the_folders_are_closed_to_other_users(mesh, tmp_path, umask):
    state = make_state(mesh)
    shared = tmp_path / "shared"  # as /tmp is
    shared.mkdir()
    shared.chmod(0o1777)
    before = os.umask(umask)
    try:
        saved(tmp_path / "new" / "folder", state)
        saved(shared, state)
    finally:
        os.umask(before)

    for folder in (tmp_path / "new" / "folder", shared):
        run = folder / "run"
        made = [run, *(path for path in run.rglob("*") if path.is_dir())]
        assert {mode(path) for path in made} == {0o700} and len(made) == 3
    assert mode(tmp_path / "new") == mode(tmp_path / "new" / "folder") == 0o700
    assert mode(shared) == 0o1777


def test_a_folder_that_was_open_to_others_is_not_read_and_is_closed(mesh, tmp_path):
    state = make_state(mesh)
    abstract = abstract_of(state, mesh)
    local = saved(tmp_path, state)
    (tmp_path / "run").chmod(0o777)
    assert local.newest(0, abstract) == 0

    saved(tmp_path, state, steps=(4,))

    assert mode(tmp_path / "run") == 0o700 and local.newest(0, abstract) == 4


def test_a_link_in_place_of_the_folder_is_not_followed(mesh, tmp_path):
    state = make_state(mesh)
    abstract = abstract_of(state, mesh)
    saved(tmp_path / "elsewhere", state)
    shutil.copytree(tmp_path / "elsewhere" / "run", tmp_path / "victim")
    (tmp_path / "local").mkdir()
    (tmp_path / "local" / "run").symlink_to(tmp_path / "victim")
    (tmp_path / "victim").chmod(0o750)

    assert opened(tmp_path / "local").newest(0, abstract) == 0
    with pytest.raises(PermissionError):
        saved(tmp_path / "local", state, steps=(4,))
    assert mode(tmp_path / "victim") == 0o750
