"""Acceptance of drawn drafts, in evaluation, against definitions and a decoder.

Axes: N heads, B texts, T tokens, V vocabulary.
"""

import dataclasses

import jax
import naive_losses
import numpy as np
import pytest
from models import TINY, mesh_of, placed_batch, placed_params, random_params

from mtp_jax.checkpoint.restore import Restored
from mtp_jax.config import ComputeConfig, Config, HeadsConfig
from mtp_jax.data.tokenizer import ByteTokenizer
from mtp_jax.decode.decoders.sampling import Sampling
from mtp_jax.decode.generator import Generator
from mtp_jax.eval.outputs import head_outputs
from mtp_jax.loss.batch_loss import head_sums
from mtp_jax.loss.metrics import summarize
from mtp_jax.model.language_model import model_builder

N, B, NEW = 3, 48, 60
BYTES = ByteTokenizer()
MODEL = dataclasses.replace(
    TINY, vocab_size=BYTES.vocab_size, num_layers=4, n_future_tokens=N
)


def alphas_of(logits_NBTV):
    """Acceptance of the draft of head i at t by head 1 at t + i - 1, [N, B, T - n]."""
    p_NBTV = naive_losses.softmax(np.asarray(logits_NBTV, np.float64), np)
    n, _, t, _ = p_NBTV.shape
    last = t - n + 1  # the positions from which all of those lie in the text
    return np.stack(
        [
            np.minimum(p_NBTV[i, :, :last], p_NBTV[0, :, i : i + last]).sum(-1)
            for i in range(n)
        ]
    )


def restored(model, mesh):
    params = placed_params(model, random_params(model))
    return Restored(Config(model=model), params, mesh, 0, BYTES)


def rows_of(tokens_BS):
    """Texts as rows of one document each."""
    b, s = tokens_BS.shape
    return {
        "tokens": tokens_BS.astype(np.int32),
        "segments": np.ones((b, s), np.int32),
        "positions": np.tile(np.arange(s, dtype=np.int32), (b, 1)),
    }


def evaluated(model, params, tokens_BS):
    _, build = model_builder(model)
    rows = {k: x[0] for k, x in placed_batch(rows_of(tokens_BS), 1).items()}
    run = jax.jit(lambda p, r: head_sums(build(p), r, ComputeConfig()))
    return jax.device_get(summarize(run(params, rows)))


CASES = {
    "one device": ((1, 1, 1), HeadsConfig()),
    "all axes": ((1, 2, 2, 2), HeadsConfig()),
    "anticausal": ((1, 1, 1), HeadsConfig(kind="anticausal")),
}


@pytest.mark.parametrize("case", CASES)
def test_evaluation_has_the_overlap_of_laws_and_its_products(case):
    shape, heads = CASES[case]
    model = dataclasses.replace(MODEL, heads=heads)
    tokens_BS = np.random.default_rng(0).integers(1, 200, (8, 16 + N))
    with jax.set_mesh(mesh_of(*shape)):
        params = placed_params(model, random_params(model))
        means = evaluated(model, params, tokens_BS)
    mesh = mesh_of(1, 1, 1)
    with jax.set_mesh(mesh):
        logits = head_outputs(restored(model, mesh), tokens_BS[:, :-N]).logits_NBTV
        alpha_NBT = alphas_of(jax.device_get(logits))

    alpha_NBT[0] = 1
    taken_NBT = np.cumprod(alpha_NBT, axis=0)
    np.testing.assert_allclose(means["alpha_N"], alpha_NBT.mean((1, 2)), rtol=1e-5)
    np.testing.assert_allclose(means["taken_N"], taken_NBT.mean((1, 2)), rtol=1e-5)
    length = 1 + taken_NBT[1:].mean((1, 2)).sum()
    np.testing.assert_allclose(means["sampled_length"], length, rtol=1e-5)


@pytest.mark.slow
def test_speculative_decoding_accepts_what_evaluation_of_its_text_says(one_device):
    model = restored(MODEL, one_device)
    generator = Generator(MODEL, model.params, BYTES, one_device)
    starts = np.random.default_rng(1).integers(1, 200, (B, 2))
    made = generator.generate(
        list(starts),
        max_new_tokens=NEW,
        decoder="speculative",
        sampling=Sampling(temperature=1.0, seed=7),
    )
    texts = [[*g.prompt_tokens, *g.tokens] for g in made]
    whole = [b for b, g in enumerate(made) if len(g.tokens) == NEW]
    assert len(whole) > B / 2
    tokens_BT = np.array([texts[b] for b in whole])
    logits = jax.device_get(head_outputs(model, tokens_BT).logits_NBTV)
    alpha_NBT = alphas_of(logits)
    means = evaluated(MODEL, model.params, tokens_BT)

    # A pass verifies drafts from the slot before the last committed token.
    accepted, expected = [], []
    for row, b in enumerate(whole):
        passes, heads = np.array(made[b].passes), np.array(made[b].heads)
        prompt = len(made[b].prompt_tokens)
        for number in range(1, passes.max() + 1):
            first = np.flatnonzero(passes == number)[0]
            slot = prompt + first - 2
            if slot < alpha_NBT.shape[2]:
                accepted.append(heads[first] == 2)
                expected.append(alpha_NBT[1, row, slot])
    accepted, expected = np.array(accepted, float), np.array(expected)
    error = np.sqrt((expected * (1 - expected)).sum()) / len(expected)
    assert abs(accepted.mean() - expected.mean()) < 3 * error < 0.06
    assert expected.std() > 0.02  # not the same everywhere
    assert abs(means["alpha_N"][1] - alpha_NBT[1, :, : 1 - N].mean()) < 0.02
