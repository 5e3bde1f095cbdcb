"""Beam search against a slow one that shares none of its code."""

import functools

import jax
import numpy as np
import pytest
from models import all_logits
from test_decode import Letters, init, on_mesh, one_device, tiny

from mtp_jax.config import MeshConfig
from mtp_jax.decode.decoders.beam import Beam
from mtp_jax.decode.decoders.sampling import Sampling
from mtp_jax.decode.generator import Generator
from mtp_jax.errors import UserError
from mtp_jax.model.language_model import model_builder
from mtp_jax.parallel.sharding import make_mesh

V, NEW = 16, 12
LENGTHS = (0, 1, 3, 7, 4)


@functools.cache
def case(n):
    """A generator, prompts, and log probabilities of all heads at a row's end."""
    cfg, mesh = tiny(n, n + 1), one_device()
    params = init(cfg, mesh)
    rng = np.random.default_rng(1)
    prompts = [rng.integers(1, V, k).astype(np.int32) for k in LENGTHS]
    with jax.set_mesh(mesh):
        _, of = model_builder(cfg)

    @jax.jit
    def said(params, tokens_BT):
        positions_BT = jax.numpy.arange(tokens_BT.shape[1])[None] + 0 * tokens_BT
        logits = all_logits(of(params), tokens_BT, 0 * tokens_BT, positions_BT)
        return jax.nn.log_softmax(logits)

    @functools.cache
    def after(row):
        tokens_BT = np.zeros((1, 24), np.int32)
        tokens_BT[0, : len(row)] = row
        with jax.set_mesh(mesh):
            log_p = said(params, on_mesh(tokens_BT))
        return np.asarray(log_p, np.float64)[:, 0, len(row) - 1]

    return cfg, params, prompts, after


def generator(n, eos_id, mesh=None):
    cfg, params, _, _ = case(n)
    if mesh is None:
        return Generator(cfg, params, Letters(eos_id), one_device())
    return Generator(cfg, init(cfg, mesh), Letters(eos_id), mesh)


def slow_beams(after, prompt, beams, eos_id, limit, penalty, lookahead=0.0):
    """Tokens of the best hypothesis, one step at a time, with lists."""
    start = (0, *map(int, prompt))
    running, ended = [(0.0, start)], []
    for made in range(1, limit + 1):
        options = []
        for score, row in running:
            log_p_NV = after(row)
            ahead = lookahead * log_p_NV[1:].max(-1).sum()
            for token, log_p in enumerate(log_p_NV[0]):
                total = score + log_p
                options.append((total + ahead, total, (*row, token)))
        options = sorted(options, key=lambda x: -x[0])[: 2 * beams]
        running = []
        for rank, (_, score, row) in enumerate(options):
            if row[-1] == eos_id or made == limit:
                if rank < beams:
                    ended.append((score / made**penalty, row))
            elif len(running) < beams:
                running.append((score, row))
        ended = sorted(ended, key=lambda x: -x[0])[:beams]
        best = max((score for score, _ in running), default=-np.inf)
        if not running or (
            len(ended) == beams and best / made**penalty <= ended[-1][0]
        ):
            break
    return list(ended[0][1][len(start) :])


def check(n, eos_id, limit, lookahead=0.0, mesh=None, **options):
    _, _, prompts, after = case(n)
    decoder = Beam(lookahead=lookahead, **options)
    results = generator(n, eos_id, mesh).generate(
        prompts, max_new_tokens=limit, decoder=decoder
    )
    for result, prompt in zip(results, prompts, strict=True):
        slow = slow_beams(
            after,
            prompt,
            decoder.beams,
            eos_id,
            limit,
            decoder.length_penalty,
            lookahead,
        )
        assert result.tokens == slow[: len(slow) - (slow[-1] == eos_id)]
        assert result.finish == ("eos" if slow[-1] == eos_id else "length")
        row, deviated = (0, *map(int, prompt)), 0
        for token in slow:
            deviated += int(after(row)[0].argmax()) != token
            row = (*row, token)
        assert result.deviations == deviated
    return results


@pytest.mark.parametrize(
    "n,eos_id,limit,options",
    [
        (3, 5, NEW, {"beams": 1}),
        (3, 9, NEW, {"beams": 4, "length_penalty": 0.0}),
        (3, 5, 1, {"beams": 3, "length_penalty": 2.0}),
        (2, 5, NEW, {"beams": 2, "lookahead": 0.5}),
    ],
    ids=str,
)
def test_beams_are_those_of_a_slow_search(n, eos_id, limit, options):
    results = check(n, eos_id, limit, **options)
    assert all(1 <= r.tokens_per_forward <= n for r in results)
    if options["beams"] == 1:  # several tokens of all beams in one pass
        assert max(r.tokens_per_forward for r in results) > 1


def test_the_mesh_does_not_change_the_search():
    check(3, 5, NEW, mesh=make_mesh(MeshConfig(fsdp=4, tensor=2)), beams=2)


def test_the_weight_of_look_ahead_changes_texts():
    _, _, prompts, after = case(2)
    texts = [
        [slow_beams(after, p, 2, 5, NEW, 1.0, weight) for p in prompts]
        for weight in (0.0, 0.5)
    ]
    assert texts[0] != texts[1]


@pytest.mark.parametrize(
    "options,message",
    [
        ({"beams": 0}, "beams is 0"),
        ({"beams": 1025}, "beams is 1025"),
        ({"length_penalty": float("nan")}, "length_penalty is nan"),
        ({"lookahead": float("inf")}, "lookahead is inf"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        Beam(**options)


def test_a_search_draws_nothing():
    with pytest.raises(UserError, match="temperature"):
        generator(2, 5).generate(
            ["b"],
            max_new_tokens=2,
            decoder=Beam(),
            sampling=Sampling(temperature=1.0),
        )
