"""Exported folders read back with their heads: every kind, and what is refused."""

import dataclasses
import json
import shutil

import jax
import llama_reference
import numpy as np
import pytest
from export_models import FAMILIES, ids, random_model
from foreign import write_safetensors
from models import mesh_of
from usual_cases import cases

from mtp_jax.checkpoint.restore import restore_model
from mtp_jax.config import HeadsConfig
from mtp_jax.errors import RunFailed
from mtp_jax.eval.outputs import head_outputs
from mtp_jax.exporting import tensors
from mtp_jax.exporting.export import export
from mtp_jax.run import import_model as importing
from mtp_jax.run.import_model import import_model

pytest.importorskip("safetensors")
_LLAMA = FAMILIES["llama"]  # all biases, stretched positions
_LONGER = {"num_layers": 5}
KINDS = {
    "parallel": {},
    "own norms and tables": {"norm": "own", "unembedding": "own"},
    "bias": {"markov_rank": 3, "norm": "own", "of_model": {"tie_embeddings": True}},
    "deep": {"layers": 2, "of_model": {**_LLAMA, **_LONGER}},
    "causal": {"kind": "causal", "of_model": _LLAMA},
    "deep causal": {"kind": "causal", "layers": 2, "of_model": _LONGER},
    "linear": {"kind": "linear", "norm": "own", "markov_rank": 2},
    "residual": {"kind": "residual", "layers": 2, "unembedding": "own"},
    "windows": {"of_model": FAMILIES["mistral"], "markov_rank": 2},
    "biases of queries": {"of_model": FAMILIES["qwen2"], "norm": "own"},
    "norms of queries": {"of_model": FAMILIES["qwen3"], "kind": "causal"},
    "norms after": {"of_model": FAMILIES["olmo2"]},
    "bfloat16": {"of_model": {"param_dtype": "bfloat16"}, "norm": "own"},
}


def comes_back(model, workdir):
    """The model of a workdir, which must be the one given, to the bit."""
    again = restore_model(workdir, mesh=mesh_of())
    cfg = dataclasses.replace(model.config.model, rope=again.config.model.rope)
    assert again.config.model == cfg
    before = jax.tree.leaves_with_path(jax.device_get(model.params))
    after = jax.tree.leaves_with_path(jax.device_get(again.params))
    assert [path for path, _ in before] == [path for path, _ in after]
    for (path, one), (_, other) in zip(before, after, strict=True):
        assert other.dtype == cfg.param_dtype
        assert one.astype("f4").tobytes() == other.astype("f4").tobytes(), path
    return again


USUAL = ["own norms and tables", "bias", "deep causal", "linear", "norms after"]


@pytest.mark.parametrize("fields", cases(KINDS, USUAL))
def test_a_model_comes_back_bit_for_bit(tmp_path, fields):
    model = random_model(**fields)
    cfg = model.config.model
    export(model, tmp_path / "hf", positions=64)

    report = import_model(
        tmp_path / "hf", tmp_path / "run", param_dtype=cfg.param_dtype
    )

    again = comes_back(model, tmp_path / "run")
    assert again.config.model.rope == dataclasses.replace(cfg.rope, context=64)
    assert set(report.sha256) == {"model.safetensors", "mtp_heads/model.safetensors"}
    assert again.tokenizer.encode("naïve").tolist() == [*"naïve".encode()]
    assert (again.tokenizer.bos_id, again.tokenizer.eos_id) == (254, 255)


@pytest.mark.parametrize(
    ("format", "norm"),
    [("fastllm", "own"), pytest.param("meta", "shared", marks=pytest.mark.packages)],
)
def test_other_layouts_bring_all_heads_back_bit_for_bit(tmp_path, format, norm):
    if format == "meta":
        pytest.importorskip("torch")
    model = random_model(n=4, norm=norm, of_model=_LONGER)
    export(model, tmp_path / "out", format=format, positions=64)

    report = import_model(tmp_path / "out", tmp_path / "run", tokenizer="bytes")

    comes_back(model, tmp_path / "run")
    assert report.format == format and not report.ignored


@pytest.mark.parametrize("name", ["deep", "bias", "residual"])
def test_heads_say_what_their_tensors_say(tmp_path, name):
    export(random_model(**KINDS[name]), tmp_path / "hf", positions=64)

    import_model(tmp_path / "hf", tmp_path / "run")

    again = restore_model(tmp_path / "run", mesh=mesh_of())
    found = head_outputs(again, ids()[None]).logits_NBTV
    expected = llama_reference.all_logits(
        ids(),
        tensors.read(tmp_path / "hf"),
        tensors.read(tmp_path / "hf" / "mtp_heads"),
        json.loads((tmp_path / "hf" / "config.json").read_text()),
    )
    assert len(expected) == 3
    for number, logits_TV in enumerate(expected):
        known = slice(0, len(logits_TV) - number)
        ours_TV = np.asarray(found)[number, 0]
        close = {"rtol": 1e-4, "atol": 1e-3}
        np.testing.assert_allclose(ours_TV[known], logits_TV[known], **close)


@pytest.mark.parametrize("kind", ["linear", "causal"])
def test_one_head_of_any_kind_comes_back_as_the_plain_model(tmp_path, kind):
    model = random_model(n=1, kind=kind)
    export(model, tmp_path / "hf")

    import_model(tmp_path / "hf", tmp_path / "run")

    again = restore_model(tmp_path / "run", mesh=mesh_of())
    assert again.config.model.heads == HeadsConfig()
    one, other = (head_outputs(x, ids()[None]).logits_NBTV for x in (model, again))
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_a_head_that_says_something_else_is_no_import(tmp_path, monkeypatch):
    export(random_model(kind="linear"), tmp_path / "hf")
    right = importing.read_params

    def wrong(*args):
        params = right(*args)
        params["heads"]["w_map"] = -params["heads"]["w_map"]
        return params

    monkeypatch.setattr(importing, "read_params", wrong)

    with pytest.raises(RunFailed, match="says something else"):
        import_model(tmp_path / "hf", tmp_path / "run")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A folder of three parallel heads with norms of their own."""
    folder = tmp_path_factory.mktemp("exported") / "hf"
    export(random_model(norm="own", size=0.5), folder)
    return folder


def edit_heads(change):
    """Writes the file of the heads anew, its tensors changed."""

    def damage(folder):
        found = dict(tensors.read(folder / "mtp_heads"))
        change(found)
        write_safetensors(folder / "mtp_heads" / "model.safetensors", found)

    return damage


def edit_about(**fields):
    """Writes config.json anew; fields of the heads changed, None: left out."""

    def damage(folder):
        about = json.loads((folder / "config.json").read_text())
        both = {**about["mtp_heads"], **fields}
        about["mtp_heads"] = {k: v for k, v in both.items() if v is not None}
        (folder / "config.json").write_text(json.dumps(about))

    return damage


def edit_config(**fields):
    def damage(folder):
        about = json.loads((folder / "config.json").read_text()) | fields
        (folder / "config.json").write_text(json.dumps(about))

    return damage


def cut(folder):
    file = folder / "mtp_heads" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])


REFUSED = {
    "cut file": (cut, "damaged"),
    "no file": (
        lambda f: (f / "mtp_heads" / "model.safetensors").unlink(),
        "mtp_heads holds no model.safetensors",
    ),
    "no folder": (lambda f: shutil.rmtree(f / "mtp_heads"), "not beside it"),
    "folder without an entry": (edit_config(mtp_heads=None), "no entry mtp_heads"),
    "missing tensor": (
        edit_heads(lambda t: t.pop("heads.1.layers.0.mlp.up_proj.weight")),
        "lacks heads.1.layers.0.mlp.up_proj.weight",
    ),
    "surplus tensor": (
        edit_heads(lambda t: t.update({"heads.0.map.weight": np.ones((2, 2), "f4")})),
        "has heads.0.map.weight",
    ),
    "tensor of the trunk": (
        edit_heads(lambda t: t.update({"model.norm.weight": np.ones(16, "f4")})),
        "has model.norm.weight once more",
    ),
    "wrong shape": (
        edit_heads(lambda t: t.update({"heads.0.norm.weight": np.ones(3, "f4")})),
        "heads.0.norm.weight is [3], and by the config it is [16]",
    ),
    "more heads than tensors": (edit_about(n_future_tokens=4), "lacks heads.2."),
    "fewer heads than tensors": (edit_about(n_future_tokens=2), "has heads.1."),
    "no heads": (edit_about(n_future_tokens=1), "it is at least 2"),
    "another kind": (edit_about(kind="linear"), "lacks heads.0.map.weight"),
    "unknown kind": (edit_about(kind="serial"), "kind is 'serial'; it must be one of"),
    "more layers than there are": (edit_about(layers=9), "mtp_heads cannot be: "),
    "no number": (edit_about(markov_rank="2"), "markov_rank is '2'"),
    "missing field": (edit_about(norm=None), "it must have"),
    "unknown field": (edit_about(scale=2), "it must have"),
    "no entry of fields": (edit_config(mtp_heads=3), "mtp_heads has 3"),
    "another family": (
        edit_config(model_type="phi3", attention_bias=None, mlp_bias=None),
        "is of a phi3",
    ),
    "tied tables of heads": (
        lambda f: (
            edit_about(unembedding="own")(f),
            edit_config(tie_word_embeddings=True)(f),
        ),
        "unembedding is own, and tie_word_embeddings is true",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_wrong_is_refused_in_a_line(name, exported, tmp_path, refusal):
    damage, named = REFUSED[name]
    folder = shutil.copytree(exported, tmp_path / "hf")
    damage(folder)

    where = [f"--from={folder}", f"--workdir={tmp_path / 'run'}"]
    assert named in refusal("import", *where)

    assert [p.name for p in tmp_path.iterdir()] == ["hf"]
