"""Trees chosen from measured acceptances, against counting one position at a time."""

import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from head_cases import model_of
from models import all_logits, placed_params, random_params
from test_decode import init, on_mesh, one_device, tiny

from mtp_jax.checkpoint.restore import Restored
from mtp_jax.cli import calibrate as verb
from mtp_jax.config import Config, DataConfig
from mtp_jax.data.prompts import heldout_passages
from mtp_jax.data.tokenizer import ByteTokenizer
from mtp_jax.decode import calibrate
from mtp_jax.decode.batch import DecodeBatch
from mtp_jax.decode.decode_model import unstack
from mtp_jax.decode.decoders.blockwise import Blockwise
from mtp_jax.decode.decoders.plain import Plain
from mtp_jax.decode.decoders.sampling import Sampling
from mtp_jax.decode.decoders.token_tree import read_tree
from mtp_jax.decode.programs import Programs
from mtp_jax.errors import UserError
from mtp_jax.model.language_model import model_builder


def test_ranks_are_those_of_sorted_logits():
    cfg, mesh = tiny(3, 4), one_device()
    params = init(cfg, mesh)
    rows = np.random.default_rng(2).integers(0, 16, (11, 9)).astype(np.int32)
    ranks_XM = calibrate.measure_ranks(cfg, params, list(rows), mesh)

    with jax.set_mesh(mesh):
        _, build = model_builder(cfg)
        tokens_BT = on_mesh(rows)
        positions_BT = jnp.arange(9)[None] + 0 * tokens_BT
        logits = jax.jit(
            lambda p: all_logits(build(p), tokens_BT, 0 * tokens_BT, positions_BT)
        )
        logits_NBTV = np.asarray(logits(params))
    expected = []
    for b, t in itertools.product(range(11), range(9 - 2)):
        path = []
        for i in (1, 2):
            predicted = logits_NBTV[0, b, t + i].argmax()
            order = np.argsort(-logits_NBTV[i, b, t], kind="stable").tolist()
            path.append(order.index(predicted))
        expected.append(path)
    np.testing.assert_array_equal(ranks_XM, expected)
    assert len({tuple(path) for path in expected}) > 10


@pytest.mark.parametrize("name", ["serial", "serial, shared, one cache"])
def test_right_first_candidates_are_the_drafts_that_a_pass_accepts(name):
    """At every beginning of texts that head 1 wrote."""
    vocab, new = 4, 20
    cfg = model_of(name, vocab_size=vocab)
    rows = [np.array([i % vocab, i // vocab], np.int32) for i in range(12)]
    with jax.set_mesh(one_device()):
        params = placed_params(cfg, random_params(cfg))
        programs, unstacked = Programs(cfg, eos_id=vocab), unstack(cfg, params)

        def begun(decoder, rows):
            batch = DecodeBatch(programs, unstacked, decoder, rows, new, Sampling())
            batch.begin()
            return batch

        written = begun(Plain(), rows).advance(new).tokens_BE[: len(rows), : 2 + new]
        ranks_XM = calibrate.measure_ranks(
            cfg, params, [*written[:, :-1]], one_device()
        )
        # The end of a prompt commits a token of head 1 and drafts three.
        ends = [(text[:k], text[k + 1 : k + 4]) for text in written
                for k in range(1, new - 1)]  # fmt: skip
        drafts_XM = begun(Blockwise(), [text for text, _ in ends])._at().carry
    right_XM = np.asarray(drafts_XM)[: len(ends)] == [after for _, after in ends]
    accepted_X, first_X = (
        np.cumprod(found, axis=1).sum(axis=1) for found in (right_XM, ranks_XM == 0)
    )
    own_X = np.array([len(text) > 1 for text, _ in ends])  # the next token is head 1's
    np.testing.assert_array_equal(first_X[own_X], accepted_X[own_X])
    assert len(set(accepted_X[own_X])) > 2


RANKS_XM = np.random.default_rng(3).geometric(0.5, (60, 2)) - 1


@pytest.mark.parametrize("nodes", [1, 2, 3, 4])
def test_no_tree_of_as_many_nodes_is_right_more_often(nodes):
    paths = [p for d in (1, 2) for p in itertools.product(range(3), repeat=d)]

    def share(tree):
        return sum(np.mean(np.all(RANKS_XM[:, : len(p)] == p, axis=1)) for p in tree)

    best = max(
        share(tree)
        for tree in itertools.combinations(paths, nodes)
        if all(p[:-1] in {(), *tree} for p in tree)
    )
    result = calibrate.choose(RANKS_XM, nodes)
    chosen = [path for path, _ in result.nodes]
    assert all(p[:-1] in {(), *chosen} for p in chosen)
    assert len(chosen) == nodes
    np.testing.assert_allclose(share(chosen), best)
    np.testing.assert_allclose(result.tokens_per_forward, 1 + best)


def test_figures_of_a_head_are_counted_where_the_path_before_it_is_in_the_tree():
    result = calibrate.choose(RANKS_XM, 3)
    before = {path[0] for path, _ in result.nodes if len(path) == 1}
    for k in range(1, 11):
        first = [a < k for a, _ in RANKS_XM]
        second = [b < k for a, b in RANKS_XM if a in before]
        np.testing.assert_allclose(result.top_k[0][k - 1], np.mean(first))
        np.testing.assert_allclose(result.top_k[1][k - 1], np.mean(second))
    right = [int(a == 0) + int(a == 0 and b == 0) for a, b in RANKS_XM]
    np.testing.assert_allclose(result.chain, 1 + np.mean(right))


def test_there_may_be_fewer_paths_than_nodes():
    result = calibrate.choose(np.array([[0, 1, 0]] * 5), 24)
    assert result.nodes == [((0,), 1.0), ((0, 1), 1.0), ((0, 1, 0), 1.0)]
    assert result.tokens_per_forward == 4.0
    assert result.chain == 2.0


@functools.cache
def bytes_model(n):
    cfg = tiny(n, n + 1, vocab_size=264)
    return cfg, init(cfg, one_device())


@pytest.fixture
def restored(monkeypatch, corpus_dir):
    """Takes the place of a checkpoint, of a model with n heads."""

    def use(n):
        def restore_model(workdir, *, step=None):
            cfg, params = bytes_model(n)
            config = Config(model=cfg, data=DataConfig(sources=(str(corpus_dir),)))
            return Restored(config, params, one_device(), 7, ByteTokenizer())

        monkeypatch.setattr("mtp_jax.checkpoint.restore.restore_model", restore_model)

    return use


def test_the_verb_writes_a_tree_that_decoders_read(
    restored, corpus_dir, tmp_path, capsys
):
    restored(3)
    output = tmp_path / "tree.json"
    arguments = ["--workdir=w", f"--output={output}", "--nodes=5", "--passages=3"]
    assert verb.main(arguments) == 0
    content = json.loads(output.read_text())
    assert content["step"] == 7
    # Of a passage the last n - 1 tokens are nobody's position.
    passages = heldout_passages([str(corpus_dir)], count=3, least=3, most=256)
    assert len(passages) == 3
    assert content["positions"] == sum(len(passage) - 2 for passage in passages)
    paths = [tuple(node["path"]) for node in content["nodes"]]
    assert sorted(read_tree(str(output)).paths) == sorted([(), *paths])
    shares = [node["accepted"] for node in content["nodes"]]
    assert shares == sorted(shares, reverse=True)
    np.testing.assert_allclose(content["tokens_per_forward"], 1 + sum(shares))
    assert [head["head"] for head in content["heads"]] == [2, 3]
    assert "5 drafts" in capsys.readouterr().out


@pytest.mark.parametrize(
    "n,changes,message",
    [
        (1, {}, "the model has one head"),
        (3, {"--output": "/nowhere/tree.json"}, "/nowhere/tree.json is no file"),
        (3, {"--output": "."}, r"--output=\. is no file"),
        (3, {"--nodes": "0"}, "--nodes"),
        (3, {"--passages": "many"}, "--passages"),
    ],
)
def test_bad_input_is_one_line(restored, tmp_path, n, changes, message):
    restored(n)
    flags = {"--workdir": "w", "--output": str(tmp_path / "tree.json"), **changes}
    with pytest.raises(UserError, match=message):
        verb.main([f"{name}={value}" for name, value in flags.items()])
