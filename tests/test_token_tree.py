"""Trees themselves, the files they come from, and the options of their decoders."""

import itertools

import numpy as np
import pytest

from mtp_jax.cli.decoder_args import decoder_of, description
from mtp_jax.config import ModelConfig
from mtp_jax.decode.decoders.token_tree import default_tree, read_tree, tree_of
from mtp_jax.decode.decoders.tree import Tree
from mtp_jax.decode.decoders.typical import Typical
from mtp_jax.decode.fitting import fitting
from mtp_jax.errors import UserError


def test_the_built_in_tree_has_the_nodes_that_its_assumption_gives():
    nodes = [
        (p, r)
        for depth in range(1, 5)
        for p in itertools.product(range(8), repeat=depth)
        if (r := 0.6**depth / np.prod([(k + 1.0) ** 2 for k in p])) >= 0.02
    ]
    assert default_tree(4).paths == ((), *(p for p, _ in nodes))
    assert default_tree(0).paths == ((),)
    # Its depth has an end, so a model of many heads does not run all of them.
    assert Tree().heads(32) == 8


def test_a_tree_knows_its_parents_paths_and_ancestors():
    tree = tree_of([[2, 1, 0], [0], [2], [2, 1]])
    assert tree.paths == ((), (0,), (2,), (2, 1), (2, 1, 0))
    assert tree.parent_W.tolist() == [-1, 0, 0, 2, 3]
    assert tree.path_WP.tolist() == [
        [0, 0, 0, 0], [0, 1, 1, 1], [0, 2, 2, 2], [0, 2, 3, 3], [0, 2, 3, 4],
    ]  # fmt: skip
    for w, path in enumerate(tree.paths):
        for u, other in enumerate(tree.paths):
            assert tree.ancestors_WW[w, u] == (path[: len(other)] == other)
    assert tree.cut(2, 2).paths == ((), (0,))
    assert tree.cut(2, 9).paths == ((), (0,), (2,), (2, 1))


@pytest.mark.parametrize(
    "text,message",
    [
        ("{", "is not JSON"),
        ("[" * 5000, "is not JSON"),
        ("[]", 'no list "nodes"'),
        ('{"nodes": []}', 'no list "nodes"'),
        ('{"nodes": {"path": [0]}}', 'no list "nodes"'),
        ('{"nodes": [{"path": [0]}, 3]}', r'nodes\[1\] has no "path"'),
        ('{"nodes": [{"path": []}]}', r'nodes\[0\] has no "path"'),
        ('{"nodes": [{"path": [0]}, {"path": [0, -1]}]}', r"nodes\[1\].*has -1"),
        ('{"nodes": [{"path": [true]}]}', "has True"),
        ('{"nodes": [{"path": [0.0]}]}', "has 0.0"),
        ('{"nodes": [{"path": [1]}, {"path": [1]}]}', r"nodes\[1\] is \[1\] again"),
        ('{"nodes": [{"path": [0]}, {"path": [1, 0]}]}', r"parent \[1\] is not there"),
    ],
)
def test_a_wrong_tree_file_is_one_line(tmp_path, text, message):
    file = tmp_path / "tree.json"
    file.write_text(text)
    for decoder in (Tree, Typical):
        with pytest.raises(UserError, match=message) as error:
            decoder(tree=str(file))
        assert str(file) in str(error.value)


def test_a_tree_file_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        Tree(str(tmp_path / "none.json"))
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="is not JSON"):
        read_tree(str(tmp_path / "binary"))


def test_a_file_written_anew_is_another_tree(tree_file):
    first, same = (Tree(tree_file([[0]])) for _ in range(2))
    second = Tree(tree_file([[0], [1]]))
    assert first.tree == second.tree
    assert first == same != second  # programs are kept by decoder


@pytest.mark.parametrize("changes", [{"epsilon": -0.1}, {"delta": 2.0}])
def test_typical_refuses_wrong_thresholds(changes):
    with pytest.raises(UserError, match=f"{next(iter(changes))} is"):
        Typical(**changes)


def test_command_lines_give_the_options_and_nothing_else(tree_file):
    file = tree_file([[1], [0]])
    assert (
        decoder_of("tree") == Tree() == fitting(ModelConfig(n_future_tokens=4))["tree"]
    )
    assert decoder_of("tree", [f"--tree={file}"]) == Tree(file)
    options = ["--epsilon=0.2", "--delta=0.5", f"--tree={file}"]
    assert decoder_of("typical", options) == Typical(0.2, 0.5, file)
    with pytest.raises(UserError, match="the options of --decoder=tree are --tree,"):
        decoder_of("tree", ["--given=3"])
    assert "given" not in description().replace("if not given", "")
    assert (
        fitting(ModelConfig(n_future_tokens=1))["tree"]
        == "there are no heads to draft with"
    )
