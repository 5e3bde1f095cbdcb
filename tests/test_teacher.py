"""Another model as the teacher of heads 2 to n, and which ones are refused."""

import dataclasses

import jax
import jax.numpy as jnp
import naive
import naive_heads
import naive_losses
import numpy as np
import pytest
from head_cases import model_of
from models import (
    TINY,
    mesh_of,
    placed_batch,
    placed_params,
    random_params,
    tiny_config,
)
from test_taught import assert_near, taught_logits

from mtp_jax.checkpoint.restore import Restored
from mtp_jax.config import ComputeConfig, Config, LossConfig
from mtp_jax.data.tokenizer import ByteTokenizer
from mtp_jax.errors import UserError
from mtp_jax.run import teacher as teachers
from mtp_jax.training.train_step import make_gradients, make_step

N, T, ROWS = 2, 12, 8
MODEL = dataclasses.replace(TINY, num_layers=3, n_future_tokens=N)
# Wider than the model, with more heads and of another kind.
OTHER = dataclasses.replace(model_of("serial, normed, own norms", 3), d_ff=40)
LOSS = LossConfig(kind="kl", soft_mix=0.5, teacher="elsewhere")


@pytest.mark.parametrize("mesh", [(1, 1, 1), (1, 2, 2, 2)], ids=str)
def test_heads_learn_from_the_laws_of_another_model(mesh):
    cfg = dataclasses.replace(
        tiny_config(), model=MODEL, loss=LOSS, compute=ComputeConfig(chunk_tokens=5)
    )
    rng = np.random.default_rng(0)
    rows = naive.packed_rows(rng, ROWS, T + N, 32, padding=2)
    with jax.set_mesh(mesh_of(*mesh)):
        params, other = random_params(MODEL), random_params(OTHER, seed=1)
        found = jax.jit(make_gradients(cfg, OTHER))(
            placed_params(MODEL, params),
            placed_batch(rows, 1),
            teacher=placed_params(OTHER, other),
        )

    target_NBT, valid_NBT = naive.targets(rows["tokens"], rows["segments"], N)
    inputs = [rows[k][:, :-N] for k in ("tokens", "segments", "positions")]

    @jax.value_and_grad
    def value_and_grad(params, first_1BTV):
        logits_NBTV = naive_heads.all_logits(MODEL, params, inputs, None, xp=jnp)
        taught_NBTV = taught_logits(jnp.concatenate([first_1BTV] * N), jnp)
        return naive_losses.total(
            LOSS, logits_NBTV, taught_NBTV, target_NBT, valid_NBT, (1, 1), jnp, None
        )

    with jax.enable_x64(True), jax.numpy_rank_promotion("allow"):
        params64, other64 = jax.tree.map(
            lambda x: np.asarray(x, np.float64), (params, other)
        )
        before = np.zeros((3, ROWS, T), np.int32)  # head 1 reads none of them
        first_1BTV = naive_heads.all_logits(OTHER, other64, inputs, before)[:1]
        value, grads = jax.device_get(jax.jit(value_and_grad)(params64, first_1BTV))
    np.testing.assert_allclose(found[0], value, rtol=1e-5)
    jax.tree.map_with_path(assert_near, jax.device_get(found[2]), grads)


@pytest.mark.parametrize(
    ("vocab_size", "fingerprint", "words"),
    [
        (64, None, "has a vocabulary of 64, and config.model.vocab_size is 32"),
        (32, "another", "has another tokenizer"),
    ],
)
def test_a_teacher_of_other_words_is_refused(
    monkeypatch, vocab_size, fingerprint, words
):
    model = dataclasses.replace(MODEL, vocab_size=vocab_size)
    tokenizer = ByteTokenizer()
    theirs = type("T", (), {"fingerprint": fingerprint or tokenizer.fingerprint})()
    found = Restored(Config(model=model), {}, None, 1, theirs)
    monkeypatch.setattr(teachers, "restore_model", lambda *_, **__: found)

    with pytest.raises(UserError, match=words) as error:
        teachers.load_teacher(Config(model=MODEL, loss=LOSS), None, tokenizer)

    assert "config.loss.teacher=elsewhere" in str(error.value)


def test_a_run_that_is_not_there_teaches_nothing(tmp_path):
    loss = dataclasses.replace(LOSS, teacher=str(tmp_path / "nowhere"))
    cfg = Config(model=MODEL, loss=loss)

    with pytest.raises(UserError, match="nowhere"):
        teachers.load_teacher(cfg, None, ByteTokenizer())
    with pytest.raises(UserError, match="only train reads"):
        make_step(cfg)
    plain = Config(model=MODEL)
    assert teachers.load_teacher(plain, None, ByteTokenizer()) is None
