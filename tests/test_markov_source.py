"""Heads of every kind on a source whose entropies are known: an absolute test.

Text is a Markov chain of four states. Head i at t can know x_t alone, or, if it reads
the token before its own, x_{t+i-1}: the law of x_{t+i} given that is a power of the
chain's matrix, and its entropy the least loss. Losses are taken under that law, so that
nothing but the model is estimated.

Axes: B rows, T positions, N heads, V states.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import all_logits, mesh_of
from usual_cases import named

from mtp_jax.config import (
    Config,
    DataConfig,
    HeadsConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)
from mtp_jax.model.language_model import model_builder
from mtp_jax.training.batches import batch_of
from mtp_jax.training.train_step import make_init, make_step

# Entropies .828 1.154 1.274 1.300 after one to four steps; a second draft by its exact
# marginal law is accepted with probability .712.
CHAIN_VV = np.array(
    [
        [0.784, 0.000, 0.008, 0.208],
        [0.329, 0.074, 0.429, 0.168],
        [0.074, 0.771, 0.070, 0.085],
        [0.093, 0.067, 0.537, 0.303],
    ]
)
N, T, ROWS, STEPS = 4, 32, 64, 600
PARALLEL_ACCEPTANCE = 0.712
KINDS = {
    "parallel": {},
    "linear": {"kind": "linear"},
    "residual": {"kind": "residual"},
    "causal": {"kind": "causal"},
    "anticausal": {"kind": "anticausal"},
    "serial": {"kind": "serial"},
    "repeated": {"kind": "serial", "shared": True},
    "parallel, bias": {"markov_rank": 4},
    "linear, bias": {"kind": "linear", "markov_rank": 4},
    "parallel, 2 layers, own": {"layers": 2, "unembedding": "own", "norm": "own"},
}
QUICK = ("parallel, bias",)


def text(rng, rows, length):
    """Rows of the chain, each from its stationary law, int32 [rows, length]."""
    values, vectors = np.linalg.eig(CHAIN_VV.T)
    law_V = np.real(vectors[:, np.argmax(np.real(values))])
    steps_VV = np.cumsum(CHAIN_VV, axis=1)
    tokens = np.zeros((rows, length), np.int32)
    tokens[:, 0] = rng.choice(4, rows, p=law_V / law_V.sum())
    for t in range(1, length):
        draw = rng.random((rows, 1))
        tokens[:, t] = np.minimum((draw > steps_VV[tokens[:, t - 1]]).sum(1), 3)
    return tokens


def config_of(heads):
    heads = HeadsConfig(**heads)
    model = ModelConfig(
        vocab_size=4,
        d_model=32,
        num_layers=1 + heads.counted_layers(N),
        n_future_tokens=N,
        num_query_heads=2,
        num_kv_heads=2,
        d_head=16,
        d_ff=64,
        heads=heads,
    )
    optim = OptimConfig(peak_lr=1e-2, warmup_steps=20, weight_decay=0.0, b2=0.99)
    data = DataConfig(seq_len=T, batch_size=ROWS)
    return Config(model=model, data=data, optim=optim, train=TrainConfig(steps=STEPS))


def trained(cfg):
    """Logits [N, B, T, V] of a trained model on other text, and that text."""
    rng = np.random.default_rng(0)
    state = make_init(cfg)(jax.random.key(0))
    step = make_step(cfg)
    for _ in range(STEPS):
        state, _ = step(state, batch_of(text(rng, ROWS, T + N)))
    _, build = model_builder(cfg.model)
    tokens_BT = batch_of(text(rng, 256, T + N))["tokens"][0]

    @jax.jit
    def logits(params, tokens_BT):
        positions_BT = jnp.arange(tokens_BT.shape[1])[None] + 0 * tokens_BT
        return all_logits(build(params), tokens_BT, 0 * tokens_BT, positions_BT)

    return np.asarray(logits(state.params, tokens_BT), np.float64), np.asarray(
        tokens_BT
    )


@pytest.mark.parametrize("name", named(KINDS, QUICK))
def test_every_head_reaches_the_entropy_of_what_it_can_know(name):
    cfg = config_of(KINDS[name])
    waits = cfg.model.heads.wait_for_tokens(N)
    with jax.set_mesh(mesh_of()):
        logits_NBTV, tokens_BT = trained(cfg)

    logits_NBTV = logits_NBTV[:, :, 1:T]  # a first position may know less
    log_q_NBTV = logits_NBTV - np.log(np.exp(logits_NBTV).sum(-1, keepdims=True))
    for i in range(1, N + 1):
        law_VV = CHAIN_VV if waits else np.linalg.matrix_power(CHAIN_VV, i)
        known = i - 1 if waits else 0
        p_BTV = law_VV[tokens_BT[:, 1 + known : T + known]]
        safe_BTV = np.where(p_BTV > 0, p_BTV, 1.0)
        above = (p_BTV * (np.log(safe_BTV) - log_q_NBTV[i - 1])).sum(-1).mean()
        assert 0 <= above < 0.01, (name, i, above)

    p_BTV, q_BTV = np.exp(log_q_NBTV[0][:, 1:]), np.exp(log_q_NBTV[1][:, :-1])
    acceptance = np.minimum(p_BTV, q_BTV).sum(-1).mean()
    if waits:
        assert acceptance > 0.97
    else:
        assert acceptance == pytest.approx(PARALLEL_ACCEPTANCE, abs=0.01)
