"""Files that are damaged or contradict themselves: one line, and no workdir."""

import json
import os
import struct

import foreign
import numpy as np
import pytest
from test_import import CONFIGS


def edit_config(**fields):
    def damage(folder):
        file = folder / "config.json"
        found = {**json.loads(file.read_text()), **fields}
        file.write_text(json.dumps(found))

    return damage


def edit_tensors(change, config=None):
    """Writes the folder anew, its tensors changed."""

    def damage(folder):
        found = foreign.tensors_of(config or CONFIGS["llama"])
        change(found)
        foreign.write_folder(folder, config or CONFIGS["llama"], found)

    return damage


def cut(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def bad_header(folder):
    file = folder / "model.safetensors"
    file.write_bytes(struct.pack("<Q", 1 << 40) + file.read_bytes()[8:])


def lose_shard(folder):
    (folder / "model.safetensors").unlink()
    foreign.write_folder(
        folder, CONFIGS["llama"], foreign.tensors_of(CONFIGS["llama"]), 3
    )
    (folder / "model-00002-of-00003.safetensors").unlink()


def lose_from_shard(folder):
    (folder / "model.safetensors").unlink()
    found = foreign.tensors_of(CONFIGS["llama"])
    foreign.write_folder(folder, CONFIGS["llama"], found, 2)
    index = folder / "model.safetensors.index.json"
    told = json.loads(index.read_text())
    told["weight_map"]["model.more.weight"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(told))


def nested(name):
    """A file of JSON that no reader goes down to the end of."""

    def damage(folder):
        text = b"[" * 100_000
        head = struct.pack("<Q", len(text)) if name.endswith(".safetensors") else b""
        (folder / name).write_bytes(head + text)

    return damage


REFUSED = {
    "deep config": (nested("config.json"), "config.json cannot be read"),
    "deep header": (nested("model.safetensors"), "damaged, or no safetensors file"),
    "deep index": (nested("model.safetensors.index.json"), "json cannot be read"),
    "more layers than tensors": (
        edit_config(num_hidden_layers=10**9),
        "its config speaks of 1000000000 layers",
    ),
    "cut file": (cut, "damaged"),
    "bad header": (bad_header, "its header does not fit"),
    "missing shard": (lose_shard, "model-00002-of-00003.safetensors"),
    "shard without a tensor": (lose_from_shard, "lacks model.more.weight"),
    "missing tensor": (
        edit_tensors(lambda t: t.pop("model.layers.1.mlp.up_proj.weight")),
        "lacks model.layers.1.mlp.up_proj.weight",
    ),
    "surplus tensor": (
        edit_tensors(lambda t: t.update({"model.layers.3.x": np.zeros(1, "f4")})),
        "has model.layers.3.x",
    ),
    "wrong shape": (
        edit_tensors(lambda t: t.update({"model.norm.weight": np.ones(8, "f4")})),
        "model.norm.weight is [8], and by the config it is [16]",
    ),
    "more heads than tensors": (
        edit_tensors(lambda t: t.pop("model.mtp_norms.2.weight"), CONFIGS["mtp_llama"]),
        "lacks model.mtp_norms.2.weight",
    ),
    "fewer heads than tensors": (
        edit_tensors(
            lambda t: t.update({"model.mtp_norms.3.weight": np.ones(16, "f4")}),
            CONFIGS["mtp_llama"],
        ),
        "has model.mtp_norms.3.weight",
    ),
    "no heads": (edit_config(model_type="mtp_llama", prediction_heads=0), "at least 1"),
    "unknown rope type": (
        edit_config(rope_scaling={"rope_type": "longrope"}), "rope_type is 'longrope'"
    ),
    "unknown field": (edit_config(logit_scale=2.0), "logit_scale is 2.0"),
    "unknown family": (edit_config(model_type="gemma"), "model_type is 'gemma'"),
    "unknown activation": (edit_config(hidden_act="gelu"), "hidden_act is 'gelu'"),
    "tied by the config alone": (
        edit_config(tie_word_embeddings=True), "lm_head.weight is not"
    ),
    "untied by the config alone": (
        edit_tensors(lambda t: t.pop("lm_head.weight")), "are not tied"
    ),
    "two kinds of positions": (
        edit_config(
            rope_scaling={"type": "linear", "factor": 2.0},
            rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        ),
        "rope_scaling and rope_parameters say different things",
    ),
    "two bases of positions": (
        edit_config(
            rope_theta=5e5,
            rope_scaling=None,
            rope_parameters={"rope_theta": 10_000.0},
        ),
        "rope_theta is there several times, and not alike: 10000.0, 500000.0",
    ),
    "positions that are a text": (
        edit_config(rope_scaling="linear"), "rope_scaling is 'linear'; it must be an"
    ),
    "a factor that is a text": (
        edit_config(rope_scaling={"type": "linear", "factor": "two"}),
        "factor is 'two'; it must be a number",
    ),
    "no attention heads": (
        edit_config(num_attention_heads=0), "num_attention_heads is 0; it must be"
    ),
    "a context of 0": (
        edit_config(max_position_embeddings=0), "max_position_embeddings is 0"
    ),
    "an epsilon that is a text": (
        edit_config(rms_norm_eps="x"), "rms_norm_eps is 'x'; it must be a number"
    ),
    "a tie that is a text": (
        edit_config(tie_word_embeddings="no"), "it must be true or false"
    ),
    "attention heads that do not share": (
        edit_config(num_key_value_heads=3), "config.json is of a model that cannot be"
    ),
    "kinds of more layers": (
        edit_config(layer_types=["full_attention"] * 9), "layer_types must name"
    ),
    "weights that are not finite": (
        edit_tensors(lambda t: t["model.norm.weight"].__setitem__(0, np.nan)),
        "weights that are not finite",
    ),
    "no size": (edit_config(hidden_size="16"), "hidden_size is '16'"),
    "a size that is missing": (edit_config(hidden_size=None), "lacks the field hidden"),
    "no JSON": (lambda folder: (folder / "config.json").write_text("{"), "be read"),
    "no weights": (
        lambda folder: (folder / "model.safetensors").unlink(), "no model.safetensors"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_wrong_is_refused_in_a_line_and_nothing_is_written(
    name, tmp_path, refusal
):
    damage, named = REFUSED[name]
    config = CONFIGS["llama"]
    folder = foreign.write_folder(tmp_path / "hf", config, foreign.tensors_of(config))
    damage(folder)

    where = [f"--from={folder}", f"--workdir={tmp_path / 'run'}"]
    assert named in refusal("import", *where, "--tokenizer=bytes")

    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def test_folders_that_cannot_be_are_refused(tmp_path, refusal):
    config = CONFIGS["llama"]
    folder = foreign.write_folder(tmp_path / "hf", config, foreign.tensors_of(config))

    def said(source, workdir=tmp_path / "run", *more):
        return refusal("import", f"--from={source}", f"--workdir={workdir}", *more)

    assert "has no tokenizer" in said(folder)
    assert "is not empty" in said(folder, folder, "--tokenizer=bytes")
    in_file = folder / "config.json" / "run"
    assert "no folder can be made" in said(folder, in_file, "--tokenizer=bytes")
    if os.path.isdir("/proc"):
        assert "no folder can be made" in said(folder, "/proc/run", "--tokenizer=bytes")
    assert "there is no such" in said(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    assert "has no config.json" in said(tmp_path / "empty")
    for name in ("a.gguf", "b.bin"):
        (tmp_path / "empty" / name).touch()
    assert "name one of them: a.gguf, b.bin" in said(tmp_path / "empty")
    edit_config(vocab_size=200)(folder)
    assert "has 256 ids" in said(folder, tmp_path / "run", "--tokenizer=bytes")
    stories = tmp_path / "stories.bin"
    stories.write_bytes(struct.pack("<7i", 64, 172, 5, 8, 4, 512, 512) + bytes(100))
    assert "is it cut" in said(stories)
    stories.write_bytes(struct.pack("<7i", 64, 172, 5, 8, 4, -512, 0) + bytes(100))
    assert "no file of llama2" in said(stories)
    assert not (tmp_path / "run").exists()
