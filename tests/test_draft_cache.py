"""One checkpoint of a serial module decoded with either cache, by the verbs."""

import json

import jax
import pytest
from head_cases import model_of
from models import placed_params, random_params
from test_decode import one_device

from mtp_jax.checkpoint.restore import Restored
from mtp_jax.cli import calibrate, generate, verify
from mtp_jax.config import Config, DataConfig
from mtp_jax.data.tokenizer import ByteTokenizer
from mtp_jax.errors import UserError


@pytest.fixture
def restored(monkeypatch, corpus_dir):
    """Takes the place of a checkpoint of a model with heads of some kind."""

    def use(name):
        cfg = model_of(name, vocab_size=264)
        with jax.set_mesh(one_device()):
            params = placed_params(cfg, random_params(cfg))
        config = Config(model=cfg, data=DataConfig(sources=(str(corpus_dir),)))
        model = Restored(config, params, one_device(), 7, ByteTokenizer())
        monkeypatch.setattr(
            "mtp_jax.checkpoint.restore.restore_model", lambda *_, **__: model
        )

    return use


def test_a_text_is_the_same_with_either_cache_and_its_drafts_are_not(
    restored, tmp_path, capsys
):
    restored("serial, shared, one cache")
    texts, shares = [], []
    for cache in ("per_depth", "shared"):
        flag = f"--draft_cache={cache}"
        arguments = ["--workdir=w", "--prompt=ab", "--max_new_tokens=30", "--json"]
        assert generate.main([*arguments, "--decoder=blockwise", flag]) == 0
        texts.append(json.loads(capsys.readouterr().out)["text"])
        output = tmp_path / f"{cache}.json"
        assert calibrate.main(["--workdir=w", f"--output={output}", flag]) == 0
        shares.append(json.loads(output.read_text())["heads"])
        capsys.readouterr()
    assert texts[0] == texts[1]
    # Head 2 reads the text in both; head 3 reads other keys.
    assert shares[0][0] == shares[1][0]
    assert shares[0][1] != shares[1][1]


def test_verify_decodes_with_the_cache_that_is_asked_for(restored, monkeypatch):
    restored("serial, shared, one cache")
    used = []

    def spy(model, **_):
        used.append(model.config.model.heads.draft_cache)
        return []

    monkeypatch.setattr("mtp_jax.verification.verifier.verify", spy)
    for flags in (["--draft_cache=per_depth"], ["--draft_cache=shared"], []):
        assert verify.main(["--workdir=w", "--json", *flags]) == 0
    assert used == ["per_depth", "shared", "shared"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("causal", "draft_cache=shared: .* the model has causal heads[.]"),
        ("serial", "the model has serial heads with weights of their own[.]"),
    ],
)
def test_heads_without_the_choice_are_told_so(restored, name, message):
    restored(name)
    with pytest.raises(UserError, match=message):
        generate.main(["--workdir=w", "--prompt=ab", "--draft_cache=shared"])
