"""Star graphs by a second implementation, how paths are graded, and shares of seeds."""

import numpy as np
import pytest

from mtp_jax.eval.outputs import HeadOutputs
from mtp_jax.studies import runner, star_graph
from mtp_jax.studies.star_graph import EDGE, EQUALS, NAMES, QUERY
from mtp_jax.studies.study import Study, Trial


def trial(tmp_path, arm, size="tiny", **changed):
    return Trial(
        arm=arm, seed=0, size=size, folder=tmp_path, shared=tmp_path, **changed
    )


def paths_by_search(tokens):
    """All paths from source to goal of a question, its edges read one by one."""
    after, at = {}, 0
    while True:
        a, b, sign = tokens[at : at + 3]
        assert a < NAMES and b < NAMES and sign in (EDGE, QUERY)
        after.setdefault(a, []).append(b)
        at += 3
        if sign == QUERY:
            break
    source, goal, equals = tokens[at:]
    assert equals == EQUALS
    found, open_paths = [], [[source]]
    while open_paths:
        path = open_paths.pop()
        assert len(path) == len(set(path))
        found += [path] if path[-1] == goal else []
        open_paths += [[*path, node] for node in after.get(path[-1], [])]
    return found, after


def assert_stars(seed, count, nodes):
    questions, paths = star_graph.graphs(np.random.default_rng(seed), count, nodes)
    edges = star_graph.BRANCHES * (nodes - 1)
    assert questions.shape == (count, 3 * edges + 3)
    for question, path in zip(questions.tolist(), paths.tolist(), strict=True):
        found, after = paths_by_search(question)
        assert found == [path] and len(path) == nodes
        assert len(after[path[0]]) == star_graph.BRANCHES
        others = [node for node in after if node != path[0]]
        assert all(len(after[node]) == 1 for node in others)
        named = {*after, *(b for ends in after.values() for b in ends)}
        assert len(named) == edges + 1  # a tree


@pytest.mark.parametrize("nodes", [3, 4, 6])
def test_stars_have_one_path_each_by_search(nodes):
    assert_stars(0, 300, nodes)


@pytest.mark.slow
@pytest.mark.parametrize("nodes", [3, 4, 5, 6])
def test_many_stars_have_one_path_each(nodes):
    assert_stars(1, 25_000, nodes)


def test_nothing_but_the_edges_tells_the_path():
    """Names and places in the list of edges fall equally on path and decoy."""
    questions, paths = star_graph.graphs(np.random.default_rng(0), 20_000, 4)
    edges = questions[:, :18].reshape(-1, 6, 3)
    first = (edges[..., :2] == paths[:, None, :2]).all(axis=-1)  # source to the path
    assert (first.sum(axis=1) == 1).all()
    np.testing.assert_allclose(first.mean(axis=0), 1 / 6, atol=0.012)
    from_source = edges[..., 0] == paths[:, None, 0]
    earlier = np.argmax(from_source, axis=1) == np.argmax(first, axis=1)
    assert abs(earlier.mean() - 0.5) < 0.015
    for node in range(4):
        counts = np.bincount(paths[:, node], minlength=NAMES) / len(paths)
        np.testing.assert_allclose(counts, 1 / NAMES, atol=0.008)


def test_no_graph_of_the_test_is_one_of_training():
    def lines(rng, count):
        return {row.tobytes() for row in star_graph.graphs(rng, count, 4)[0]}

    tests = lines(np.random.default_rng([2**31, 4]), 2048)
    for seed in range(3):
        # The numbers that `fit` gives to the rows of a step.
        assert not tests & lines(np.random.default_rng([seed, 7]), 50_000)


@pytest.mark.parametrize("arm", ["n=3", "n=1, reverse"])
def test_paths_alone_are_learned(tmp_path, monkeypatch, arm):
    rows = []

    def fit(cfg, make_rows, seed):
        rows.append(make_rows(np.random.default_rng(0)))
        raise KeyboardInterrupt

    monkeypatch.setattr(star_graph, "fit", fit)
    with pytest.raises(KeyboardInterrupt):
        star_graph.measure(trial(tmp_path, arm))

    [(tokens, segments, learned)] = rows
    n = star_graph._ARMS[arm].n
    assert tokens.shape == segments.shape == learned.shape == (4, 25 + n)
    assert learned.sum(axis=1).tolist() == [4] * 4 and learned[:, 21:25].all()
    for row in tokens.tolist():
        [path], _ = paths_by_search(row[:21])
        assert row[21:25] == (path[::-1] if "reverse" in arm else path)


@pytest.mark.parametrize(("arm", "turn"), [("n=1", 1), ("n=1, reverse", 2)])
def test_paths_are_graded_at_their_places(tmp_path, monkeypatch, arm, turn):
    def outputs(model, tokens):
        """The right token after each, but for every fourth row's first step."""
        logits = np.zeros((2, *tokens.shape, star_graph.VOCABULARY))
        for row, of_row in enumerate(tokens):
            for t, token in enumerate(of_row[1:]):
                wrong = row % 4 == 0 and t == 20 + turn
                logits[0, row, t, (token + 1) % NAMES if wrong else token] = 1.0
        return HeadOutputs(None, logits)

    monkeypatch.setattr(star_graph, "head_outputs", outputs)
    monkeypatch.setattr(star_graph, "fit", lambda *of: None)
    figures = star_graph.measure(trial(tmp_path, arm))

    assert figures["solved"] == figures["branch"] == 0.75
    assert figures["by_node"][turn] == 0.75 and sum(figures["by_node"]) == 3.75
    assert figures["solved_seeds"] == 0.0


def test_heads_leave_the_way_to_head_1_as_deep(tmp_path):
    depths = {}
    for arm in star_graph.STUDY.arms("full"):
        for size in ("tiny", "quick", "full"):
            cfg = star_graph.config_of(trial(tmp_path, arm, size))
            depths[arm] = cfg.model.num_layers - cfg.model.n_future_tokens + 1
    assert {d for arm, d in depths.items() if "deeper" not in arm} == {4}
    deeper, three = (
        star_graph.config_of(trial(tmp_path, arm)) for arm in ("n=1, deeper", "n=3")
    )
    assert deeper.model.num_layers == three.model.num_layers
    detached = star_graph.config_of(trial(tmp_path, "n=3, detached"))
    assert detached.loss.trunk_gradient == (1.0, 0.0, 0.0)


def test_seeds_that_solve_it_are_a_share_with_its_exact_interval(tmp_path, monkeypatch):
    made = Study(
        about="x.",
        arms=lambda size: ("a",),
        measure=lambda trial: {"x": float(trial.seed > 0)},
        shown=("x",),
        shares=("x",),
        seeds=lambda size: 5,
    )
    monkeypatch.setattr(runner, "find_study", lambda name: made)

    page = runner.study("toy", tmp_path).page

    assert "0.8000 (0.2836..0.9949)" in page  # of a table, 4 of 5


@pytest.mark.slow
def test_graphs_are_learned_from(tmp_path):
    figures = star_graph.measure(trial(tmp_path, "n=3", steps=4))

    assert 0 <= figures["solved"] <= figures["branch"] <= 1
    assert figures == star_graph.measure(trial(tmp_path, "n=3", steps=4))


def test_claims_read_what_they_say():
    def solved(share):
        return {"solved": share, "solved_seeds": float(share > star_graph.SOLVED)}

    arms = {
        **{arm: solved(0.5) for arm in star_graph.STUDY.arms("full")},
        **{"n=2": solved(0.7), "n=3": solved(0.9), "L=6, n=3": solved(0.6)},
        "L=5, n=3": solved(0.75),
    }
    found = [claim.of(arms) for claim in star_graph.STUDY.claims]

    expected = [0.5, 0.0, 0.2, -0.15, -0.4, -0.4, 0.5, 0.5]
    np.testing.assert_allclose(found, expected)
