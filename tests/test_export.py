"""Models in other formats: what is written, by arithmetic that is not the model's."""

import json
import struct
from typing import get_args

import foreign
import llama_reference as reference
import numpy as np
import pytest
from export_models import FAMILIES, ids, random_model

from mtp_jax.cli import export as verb
from mtp_jax.errors import RunFailed, UserError
from mtp_jax.eval.outputs import head_outputs
from mtp_jax.exporting import meta, tensors
from mtp_jax.exporting.export import Format, export
from mtp_jax.exporting.parts import parts_of
from mtp_jax.interop import reference as importing
from mtp_jax.interop.formats import open_foreign

pytest.importorskip("safetensors")
KINDS = {
    "parallel": {},
    "deep": {"layers": 2, "norm": "own"},
    "bias": {"norm": "own", "markov_rank": 3},
    "tables": {"unembedding": "own"},
    "causal": {"kind": "causal"},
    "linear": {"kind": "linear", "norm": "own"},
    "residual": {"kind": "residual", "layers": 2, "norm": "own"},
}


def logits_of(model, tokens):
    return np.asarray(head_outputs(model, tokens[None]).logits_NBTV)[:, 0]


def header(path):
    """The header of a safetensors file, read by its definition."""
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + size])


@pytest.mark.parametrize("fields", KINDS.values(), ids=KINDS)
def test_a_folder_computes_what_the_model_does(tmp_path, fields):
    model = random_model(**fields)

    lost = export(model, tmp_path / "out")

    about = json.loads((tmp_path / "out" / "config.json").read_text())
    found = reference.all_logits(
        ids(),
        tensors.read(tmp_path / "out"),
        tensors.read(tmp_path / "out" / "mtp_heads"),
        about,
    )
    expected_NTV = logits_of(model, ids())
    assert lost == []
    for number, logits_TV in enumerate(found):
        close = {"rtol": 1e-4, "atol": 1e-3}
        np.testing.assert_allclose(logits_TV, expected_NTV[number], **close)
    assert len(found) == 3
    assert about["model_type"] == "llama"
    assert about["mtp_heads"]["n_future_tokens"] == 3


def test_linear_heads_on_a_trunk_of_one_layer_are_read_again(tmp_path):
    model = random_model(of_model={"num_layers": 1}, kind="linear")

    assert export(model, tmp_path / "out") == []

    found = open_foreign(tmp_path / "out").model
    assert (found.num_trunk_layers, found.n_future_tokens) == (1, 3)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_heads_of_every_family_compute_what_the_model_does(tmp_path, family, tied):
    """Beyond windows and first contexts, of heads of another size, from shards."""
    of_model = {**FAMILIES[family], "tie_embeddings": tied}
    of_model |= {"d_head": 6} if tied else {}
    model = random_model(norm="own", of_model=of_model)

    lost = export(model, tmp_path / "out", positions=64, shard_bytes=20_000)

    about = json.loads((tmp_path / "out" / "config.json").read_text())
    assert lost == []
    assert about["model_type"] == family
    assert about["tie_word_embeddings"] == tied
    beside = tensors.read(tmp_path / "out" / "mtp_heads")
    found_NTV = foreign.forward(about, tensors.read(tmp_path / "out") | beside, ids(40))
    assert len(found_NTV) == 3
    np.testing.assert_allclose(found_NTV, logits_of(model, ids(40)), atol=1e-4)


@pytest.mark.parametrize("kind", ["serial", "anticausal"])
def test_heads_that_do_not_fit_are_left_out_and_said(tmp_path, kind, capsys):
    model = random_model(n=2, kind=kind)

    lost = export(model, tmp_path / "out")

    assert lost == [f"drafting by {kind} heads"]
    about = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "auto_map" not in about
    found = reference.all_logits(ids(), tensors.read(tmp_path / "out"), {}, about)
    np.testing.assert_allclose(
        found[0], logits_of(model, ids())[0], rtol=1e-4, atol=1e-4
    )
    assert f"Its {kind} heads are not in this folder" in (
        tmp_path / "out" / "README.md"
    ).read_text().replace("\n", " ")


def test_a_tied_output_is_not_written_twice(tmp_path):
    model = random_model(of_model={"tie_embeddings": True})

    export(model, tmp_path / "out")

    names = header(tmp_path / "out" / "model.safetensors")
    assert "lm_head.weight" not in names
    assert names["__metadata__"] == {"format": "pt"}
    assert json.loads((tmp_path / "out" / "config.json").read_text())[
        "tie_word_embeddings"
    ]


def test_large_models_are_written_in_shards(tmp_path):
    model = random_model()

    export(model, tmp_path / "out", shard_bytes=20_000)

    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    whole = parts_of(model).llama
    assert len(files) > 2
    assert index["weight_map"].keys() == whole.keys()
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in whole.values())
    for name, file in index["weight_map"].items():
        about = header(tmp_path / "out" / file)[name]
        assert tuple(about["shape"]) == whole[name].shape


def test_weights_of_bfloat16_stay_so(tmp_path):
    model = random_model(of_model={"param_dtype": "bfloat16"})

    export(model, tmp_path / "out")

    about = header(tmp_path / "out" / "model.safetensors")["model.norm.weight"]
    assert about["dtype"] == "BF16"


def test_what_was_written_wrong_is_noticed_and_removed(tmp_path, monkeypatch):
    read = tensors.read

    def damaged(folder):
        found = dict(read(folder))
        name = "model.layers.0.self_attn.q_proj.weight"
        if name in found:
            found[name] = found[name][::-1]
        return found

    monkeypatch.setattr(tensors, "read", damaged)

    with pytest.raises(RunFailed, match=r"q_proj"):
        export(random_model(), tmp_path / "out")

    assert list(tmp_path.iterdir()) == []


def test_other_logits_are_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(importing, "_silu", np.tanh)

    with pytest.raises(RunFailed, match="other logits"):
        export(random_model(), tmp_path / "out")

    assert list(tmp_path.iterdir()) == []


def rotated(x_THK, theta):
    """Rotary positions of neighbours by complex numbers, as Meta has them."""
    t, _, k = x_THK.shape
    z = x_THK[..., 0::2] + 1j * x_THK[..., 1::2]
    angle = np.arange(t)[:, None, None] * theta ** (-np.arange(0, k, 2) / k)
    z = z * np.exp(1j * angle)
    return np.stack([z.real, z.imag], -1).reshape(x_THK.shape)


def meta_layer(x_TD, w, prefix, about):
    h, g, eps = about["n_heads"], about["n_kv_heads"], about["norm_eps"]
    t, k = len(x_TD), about["dim"] // about["n_heads"]

    def of(name):
        return w[f"{prefix}.{name}.weight"].astype(float)

    a_TD = reference.norm(x_TD, of("attention_norm"), eps)
    q = rotated((a_TD @ of("attention.wq").T).reshape(t, h, k), about["rope_theta"])
    key = rotated((a_TD @ of("attention.wk").T).reshape(t, g, k), about["rope_theta"])
    v = (a_TD @ of("attention.wv").T).reshape(t, g, k)
    read = np.zeros((t, h, k))
    for head in range(h):
        for i in range(t):
            score = key[: i + 1, head * g // h] @ q[i, head] / np.sqrt(k)
            p = np.exp(score - score.max())
            read[i, head] = p @ v[: i + 1, head * g // h] / p.sum()
    x_TD = x_TD + read.reshape(t, -1) @ of("attention.wo").T
    b_TD = reference.norm(x_TD, of("ffn_norm"), eps)
    gate = b_TD @ of("feed_forward.w1").T
    inner = gate / (1 + np.exp(-gate)) * (b_TD @ of("feed_forward.w3").T)
    return x_TD + inner @ of("feed_forward.w2").T


def test_metas_layout_is_that_of_interleaved_pairs():
    model = random_model()
    w = meta.meta_tensors(parts_of(model))
    cfg = model.config.model
    about = {
        "n_heads": cfg.num_query_heads,
        "n_kv_heads": cfg.num_kv_heads,
        "norm_eps": cfg.norm_eps,
        "dim": cfg.d_model,
        "rope_theta": cfg.rope_theta,
    }
    x_TD = w["tok_embeddings.weight"][ids()].astype(float)
    for i in range(2):
        x_TD = meta_layer(x_TD, w, f"layers.{i}", about)
    expected_NTV = logits_of(model, ids())
    for number, prefix in enumerate(["layers.2", "extra_heads.0", "extra_heads.1"]):
        y_TD = meta_layer(x_TD, w, prefix, about)
        y_TD = reference.norm(y_TD, w["norm.weight"], about["norm_eps"])
        logits_TV = y_TD @ w["output.weight"].T

        close = {"rtol": 1e-4, "atol": 1e-3}
        np.testing.assert_allclose(logits_TV, expected_NTV[number], **close)


def test_fast_llms_names_are_those_of_its_models(tmp_path):
    model = random_model(norm="own")

    assert export(model, tmp_path / "out", format="fastllm") == []

    w = {k: x.astype(float) for k, x in tensors.read(tmp_path / "out").items()}
    about = json.loads((tmp_path / "out" / "config.json").read_text())
    assert about["prediction_heads"] == 3
    assert about["num_hidden_layers"] == 3
    trunk_TD = reference.streams(ids(), w, about | {"num_hidden_layers": 2})[-1]
    expected_NTV = logits_of(model, ids())
    layers = ["model.layers.2.", "model.mtp_heads.0.", "model.mtp_heads.1."]
    for number, prefix in enumerate(layers):
        y_TD = reference.layer(trunk_TD, w, prefix, about)
        norm_D = w[f"model.mtp_norms.{number}.weight"]
        y_TD = reference.norm(y_TD, norm_D, about["rms_norm_eps"])
        close = {"rtol": 1e-4, "atol": 1e-3}
        np.testing.assert_allclose(
            y_TD @ w["lm_head.weight"].T, expected_NTV[number], **close
        )


def test_a_drafter_reads_the_hidden_state_alone(tmp_path):
    model = random_model()

    lost = export(model, tmp_path / "out", format="eagle3")

    assert lost[-1] == "head 3"
    w = tensors.read(tmp_path / "out")
    d = model.config.model.d_model
    parts = parts_of(model)
    for name in ("q_proj", "k_proj", "v_proj"):
        wide = w[f"midlayer.self_attn.{name}.weight"]
        own = parts.heads[f"heads.0.layers.0.self_attn.{name}.weight"]
        assert not wide[:, :d].any()
        np.testing.assert_array_equal(wide[:, d:], own)
    about = json.loads((tmp_path / "out" / "config.json").read_text())
    assert about["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [2]


def test_ggufs_are_read_again(tmp_path):
    gguf = pytest.importorskip("gguf")
    model = random_model()

    lost = export(model, tmp_path / "out", format="gguf")

    assert lost == ["heads 2 to 3"]
    reader = gguf.GGUFReader(str(tmp_path / "out" / "model.gguf"))
    found = {x.name: x for x in reader.tensors}
    k, h = 4, 4
    rows = np.asarray(found["blk.0.attn_q.weight"].data)
    ours = parts_of(model).llama["model.layers.0.self_attn.q_proj.weight"]
    for head in range(h):
        for j in range(k // 2):
            for half in (0, 1):
                np.testing.assert_array_equal(
                    rows[head * k + 2 * j + half], ours[head * k + half * k // 2 + j]
                )
    assert reader.fields["llama.block_count"].contents() == 3


@pytest.mark.parametrize(
    ("format", "fields", "message"),
    [
        ("meta", {"kind": "linear"}, "config.heads.kind is linear"),
        ("meta", {"norm": "own"}, "one norm for all heads"),
        ("meta", {"of_model": FAMILIES["qwen2"]}, "has others"),
        ("fastllm", {"markov_rank": 2}, "markov_rank is 2"),
        ("eagle3", {"n": 1}, "the model has one head"),
    ],
)
def test_models_that_a_format_cannot_hold_are_refused(
    tmp_path, format, fields, message
):
    with pytest.raises(UserError, match=message):
        export(random_model(**fields), tmp_path / "out", format=format)

    assert list(tmp_path.iterdir()) == []


def test_the_verb_knows_every_format():
    assert get_args(Format) == verb._FORMATS


@pytest.mark.parametrize("place", ["text.txt/out", "text.txt/deep/out", "/proc/out"])
def test_a_place_where_no_folder_can_be_is_refused(tmp_path, place):
    (tmp_path / "text.txt").write_text("mine")

    with pytest.raises(UserError, match=r"out: no folder can be made there \("):
        export(random_model(), tmp_path / place)

    assert [x.name for x in tmp_path.iterdir()] == ["text.txt"]


def test_a_folder_that_is_not_empty_is_refused(tmp_path, refusal):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")

    with pytest.raises(UserError, match="is not empty"):
        export(random_model(), tmp_path / "out")
    nowhere = [f"--workdir={tmp_path / 'none'}", f"--output={tmp_path / 'new'}"]
    assert "no such folder" in refusal("export", *nowhere)

    assert [x.name for x in tmp_path.iterdir()] == ["out"]
