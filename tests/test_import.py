"""Models of other people as workdirs: logits, known texts, refusals."""

import dataclasses
import functools
import hashlib
import json

import foreign
import jax
import llamas
import numpy as np
import pytest

from mtp_jax.checkpoint.checkpoints import Checkpoints
from mtp_jax.checkpoint.restore import restore_model
from mtp_jax.cli.import_model import main
from mtp_jax.config import HeadsConfig, LayerConfig
from mtp_jax.decode.generator import Generator
from mtp_jax.errors import RunFailed, UserError
from mtp_jax.eval.outputs import head_outputs
from mtp_jax.interop import hf_config
from mtp_jax.interop.fast_llm import from_fast_llm, to_fast_llm
from mtp_jax.interop.gguf_file import gguf_names
from mtp_jax.interop.hf_names import hf_names
from mtp_jax.interop.meta import NAMES as META
from mtp_jax.interop.meta import from_meta, to_meta
from mtp_jax.interop.places import from_file, places_of, to_file
from mtp_jax.model.language_model import model_builder
from mtp_jax.run import import_model as importing
from mtp_jax.run.goodput import Goodput
from mtp_jax.run.import_model import import_model
from mtp_jax.run.start import restore_or_init

IDS = np.random.default_rng(0).integers(0, foreign.V, 40)


def of_heads(n):
    """A config of Fast-LLM's with n heads."""
    plain = {**foreign.CONFIGS["llama"], "model_type": "mtp_llama"}
    return {**plain, "prediction_heads": n, "attention_bias": False, "mlp_bias": False}


CONFIGS = {**foreign.CONFIGS, "mtp_llama": of_heads(3)}


@pytest.mark.parametrize("other", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_workdir_says_what_the_file_says(name, other, tmp_path):
    """Beyond windows and first contexts; tied and untied, in shards and in one file."""
    config = CONFIGS[name]
    tied = config["tie_word_embeddings"] != other
    config = {**config, "tie_word_embeddings": tied}
    config |= {"head_dim": 6} if other else {}  # which is not width / heads
    tensors = foreign.tensors_of(config)
    shards = 3 if name in ("llama", "qwen2") or other else 1
    folder = foreign.write_folder(tmp_path / "hf", config, tensors, shards)

    report = import_model(folder, tmp_path / "run", tokenizer="bytes")

    model = restore_model(tmp_path / "run")
    assert len(jax.devices()) == model.mesh.size == 8  # parts are read of tensors
    logits_NBTV = head_outputs(model, IDS[None]).logits_NBTV
    exact_NTV = foreign.forward(config, tensors, IDS)
    np.testing.assert_allclose(logits_NBTV[:, 0], exact_NTV, atol=1e-4)
    assert exact_NTV.std() > 0.3
    assert sorted(report.used) == sorted(tensors) and not report.ignored
    assert report.tied == tied
    assert len(report.sha256) == shards
    assert report.largest_difference < 1e-4


class Ids(llamas.Ids):
    """Ids of the 512, whose text nobody asks for."""

    def decode(self, ids):
        return str(list(ids))


def test_the_verb_tells_what_became_of_the_tensors(tmp_path, capsys):
    config = {**CONFIGS["llama"], "tie_word_embeddings": True}
    tensors = foreign.tensors_of(config)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, "f4")
    folder = foreign.write_folder(tmp_path / "hf", config, tensors)
    argv = [f"--from={folder}", f"--workdir={tmp_path / 'run'}", "--tokenizer=bytes"]

    assert main(argv) == 0

    said = capsys.readouterr().out
    assert f"used: {len(tensors) - 2} tensors of 1 file" in said
    assert "lm_head.weight: equals model.embed_tokens.weight" in said
    assert "rotary_emb.inv_freq: follows from the config" in said
    written = json.loads((tmp_path / "run" / "import.json").read_text())
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert written["sha256"] == {"model.safetensors": digest}
    assert written["tied"] and written["context"] == 64


@functools.cache
def known():
    return json.loads((llamas.FOLDER / "known_answers.json").read_text())


def stories_folder(folder):
    """stories260K as a Hugging Face folder."""
    w = llamas.stories_weights()
    config = {
        "model_type": "llama", "vocab_size": 512, "hidden_size": 64,
        "intermediate_size": 172, "num_hidden_layers": 5, "num_attention_heads": 8,
        "num_key_value_heads": 4, "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": True,
    }  # fmt: skip
    tensors = {
        "model.embed_tokens.weight": w["w_embedding"],
        "model.norm.weight": w["norm"],
    }
    for i in range(5):
        tensors |= {
            f"model.layers.{i}.{name}.weight": x
            for name, x in {
                "input_layernorm": w["norm_attention"][i],
                "self_attn.q_proj": llamas.half_split(w["w_q"])[i].reshape(64, 64),
                "self_attn.k_proj": llamas.half_split(w["w_k"])[i].reshape(32, 64),
                "self_attn.v_proj": w["w_v"][i],
                "self_attn.o_proj": w["w_o"][i],
                "post_attention_layernorm": w["norm_mlp"][i],
                "mlp.gate_proj": w["w_gate"][i],
                "mlp.up_proj": w["w_up"][i],
                "mlp.down_proj": w["w_down"][i],
            }.items()
        }
    return foreign.write_folder(folder, config, tensors)


def stories_gguf(folder):
    """stories260K as a GGUF file."""
    gguf = pytest.importorskip("gguf")
    w = llamas.stories_weights()
    folder.mkdir()
    out = gguf.GGUFWriter(folder / "stories.gguf", "llama")
    out.add_context_length(512)
    out.add_embedding_length(64)
    out.add_block_count(5)
    out.add_feed_forward_length(172)
    out.add_head_count(8)
    out.add_head_count_kv(4)
    out.add_layer_norm_rms_eps(1e-5)
    out.add_rope_freq_base(10000.0)
    out.add_vocab_size(512)
    out.add_tensor("token_embd.weight", w["w_embedding"].copy())
    out.add_tensor("output_norm.weight", w["norm"].copy())
    names = {
        "norm_attention": "attn_norm", "w_q": "attn_q", "w_k": "attn_k",
        "w_v": "attn_v", "w_o": "attn_output", "norm_mlp": "ffn_norm",
        "w_gate": "ffn_gate", "w_up": "ffn_up", "w_down": "ffn_down",
    }  # fmt: skip
    for i in range(5):
        for ours, theirs in names.items():
            out.add_tensor(f"blk.{i}.{theirs}.weight", w[ours][i].copy())
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return folder / "stories.gguf"


STORIES = {
    "llama2.c": lambda folder: llamas.FOLDER / "stories260K.bin",
    "llama2.c, version 1": lambda folder: llamas.FOLDER / "stories260K_v1.bin",
    "hf": stories_folder,
    "gguf": stories_gguf,
}


@pytest.mark.parametrize("form", STORIES)
def test_stories260k_tells_its_known_story(form, tmp_path):
    if not llamas.FOLDER.exists():
        pytest.skip(f"{llamas.FOLDER} is not there")
    source = STORIES[form](tmp_path / "theirs")

    import_model(source, tmp_path / "run", tokenizer="bytes")

    model = restore_model(tmp_path / "run")
    with_ids = dataclasses.replace(model, tokenizer=Ids())
    [result] = Generator.from_restored(with_ids).generate(
        [np.array([], np.int32)], max_new_tokens=256, decoder="plain"
    )
    greedy = known()["greedy_from_bos_ids"]
    assert [1, *result.tokens] == greedy and len(greedy) == 257


def test_a_run_goes_on_from_the_model(tmp_path):
    config = CONFIGS["qwen3"]
    folder = foreign.write_folder(tmp_path / "hf", config, foreign.tensors_of(config))
    import_model(folder, tmp_path / "run", tokenizer="bytes")
    model = restore_model(tmp_path / "run")

    with jax.set_mesh(model.mesh):
        checkpoints = Checkpoints(tmp_path / "run")
        start = restore_or_init(model.config, checkpoints, None, Goodput(), [])
        checkpoints.close()

    assert start.step == 0 and start.rows == 0
    for one, other in zip(
        jax.tree.leaves(start.state.params), jax.tree.leaves(model.params), strict=True
    ):
        np.testing.assert_array_equal(one, other)
    moments = jax.tree.leaves(start.state.opt_state)
    assert all(not np.any(x) for x in moments)


def test_a_model_that_says_something_else_is_no_import(tmp_path, monkeypatch):
    config = CONFIGS["llama"]
    folder = foreign.write_folder(tmp_path / "hf", config, foreign.tensors_of(config))
    right = importing.read_params

    def wrong(*args):
        params = right(*args)
        params["trunk"]["w_q"] = params["trunk"]["w_q"] * 1.1
        return params

    monkeypatch.setattr(importing, "read_params", wrong)

    with pytest.raises(RunFailed, match="says something else"):
        import_model(folder, tmp_path / "run", tokenizer="bytes")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "names",
    [
        hf_names("llama"),
        hf_names("phi3"),
        META,
        gguf_names("llama"),
        gguf_names("phi3"),
    ],
)
def test_places_go_both_ways(names, one_device):
    cfg = hf_config.from_hf(foreign.CONFIGS["mistral"], "config.json")[0]
    cfg = dataclasses.replace(cfg, layer=LayerConfig())
    shapes = jax.eval_shape(model_builder(cfg)[0], jax.random.key(0))
    rng = np.random.default_rng(0)
    for place in places_of(cfg, names, shapes):
        entry = rng.normal(size=place.shape)

        rows = to_file(place, entry)

        assert rows.shape == place.file_shape
        np.testing.assert_array_equal(from_file(place, rows), entry)
        if place.path[-1] == "w_q":
            turned = 2 if names.interleaved else 1  # row 1 of head 0, of K = 6
            np.testing.assert_array_equal(
                rows[1], entry[:, 0, 3] if turned == 2 else entry[:, 0, 1]
            )


@pytest.mark.parametrize("name", foreign.CONFIGS)
def test_configs_go_both_ways(name):
    config = foreign.CONFIGS[name]
    model, tied = hf_config.from_hf(config, "config.json")
    model = dataclasses.replace(model, tie_embeddings=tied)

    again = hf_config.to_hf(model, 64, family=name)

    assert again["model_type"] == name
    back, back_tied = hf_config.from_hf(again, "config.json")
    assert dataclasses.replace(back, tie_embeddings=back_tied) == model
    if name != "phi3":  # whose layers are Mistral's, in other tensors
        assert hf_config.family_of(model) == name


def test_configs_of_heads_go_both_ways():
    model, _ = from_fast_llm(CONFIGS["mtp_llama"], "config.json")
    assert model.n_future_tokens == 3 and model.num_trunk_layers == 2
    assert from_fast_llm(to_fast_llm(model, 64), "config.json")[0] == model

    shared = dataclasses.replace(model, heads=HeadsConfig())
    with pytest.raises(UserError, match="norm each"):
        to_fast_llm(shared, 64)

    params = {"dim": 32, "n_layers": 5, "n_heads": 4, "vocab_size": 99,
              "multiple_of": 16, "norm_eps": 1e-5, "n_future_tokens": 4}  # fmt: skip
    model = from_meta(params, "params.json")
    assert (model.d_ff, model.num_trunk_layers, model.num_kv_heads) == (96, 1, 4)
    assert from_meta(to_meta(model, 4096), "params.json") == model
    with pytest.raises(UserError, match="moe"):
        from_meta({**params, "moe": {"num_experts": 8}}, "params.json")
