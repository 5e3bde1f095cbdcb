"""A static tree of drafts, and its file.

The root is the last committed token. A node of depth d is a candidate of head d + 1,
whatever its parent is: heads do not read each other. The ranks of the candidates from
the root on name a node, as in Medusa (arXiv:2401.10774, section 2.1.2).

Axes: W nodes with the root, P nodes of a path with the root.
"""

import dataclasses
import functools
import json
import pathlib
from typing import Any

import numpy as np

from mtp_jax.errors import UserError

_FIRST = 0.6  # assumed: how often the best candidate of a head is accepted
_LEAST = 0.02  # a node of the built-in tree is accepted at least so often


@dataclasses.dataclass(frozen=True)
class TokenTree:
    """Nodes by depth, then by path; parents come before their children."""

    paths: tuple[tuple[int, ...], ...]  # ranks, 0 is the most likely; () is the root

    @property
    def depth_W(self) -> np.ndarray:
        """Distance from the root, int32."""
        return np.array([len(path) for path in self.paths], np.int32)

    @property
    def rank_W(self) -> np.ndarray:
        """Rank among the candidates of its head, int32; 0 for the root."""
        return np.array([path[-1] if path else 0 for path in self.paths], np.int32)

    @functools.cached_property
    def parent_W(self) -> np.ndarray:
        """Number of the parent, int32; -1 for the root."""
        number = {path: w for w, path in enumerate(self.paths)}
        parents = [number[path[:-1]] if path else -1 for path in self.paths]
        return np.array(parents, np.int32)

    @functools.cached_property
    def path_WP(self) -> np.ndarray:
        """The nodes from the root to each, then itself again and again, int32."""
        path_WP = np.tile(np.arange(len(self.paths))[:, None], (1, self.depth + 1))
        for w, parent in enumerate(self.parent_W):
            if parent >= 0:
                depth = len(self.paths[parent])
                path_WP[w, : depth + 1] = path_WP[parent, : depth + 1]
        return path_WP.astype(np.int32)

    @functools.cached_property
    def ancestors_WW(self) -> np.ndarray:
        """Ancestors of nodes, bool: [w, u] is true if w is u or descends from it."""
        ancestors_WW = np.eye(len(self.paths), dtype=bool)
        for w, parent in enumerate(self.parent_W):
            if parent >= 0:
                ancestors_WW[w] |= ancestors_WW[parent]
        return ancestors_WW

    @property
    def depth(self) -> int:
        """Nodes of the longest path without the root."""
        return len(self.paths[-1])

    @property
    def ranks(self) -> int:
        """The most candidates of a head that are used."""
        return 1 + int(self.rank_W.max())

    def cut(self, depth: int, ranks: int) -> "TokenTree":
        """The nodes down to a depth, with ranks below `ranks`, in the same order."""
        kept = (p for p in self.paths if len(p) <= depth and all(r < ranks for r in p))
        return TokenTree(tuple(kept))


def tree_of(paths: Any) -> TokenTree:
    """The tree of some paths, given without the root and in any order."""
    return TokenTree(tuple(sorted({(), *map(tuple, paths)}, key=lambda p: (len(p), p))))


def default_tree(depth: int) -> TokenTree:
    """The built-in tree: all nodes that are accepted often enough, if heads were alike.

    The r-th candidate of a head, counted from 1, is assumed to be accepted with
    probability 0.6 / r^2, given that the path before it is.
    """

    def grown(path: tuple[int, ...], likely: float) -> list[tuple[int, ...]]:
        nodes, rank = [path], 0
        while len(path) < depth and (p := likely * _FIRST / (rank + 1) ** 2) >= _LEAST:
            nodes += grown((*path, rank), p)
            rank += 1
        return nodes

    return tree_of(grown((), 1.0))


def read_tree(file: str) -> TokenTree:
    """The tree of a file: `{"nodes": [{"path": [0, 2]}, ...]}`, anything else ignored.

    Raises:
      UserError: it cannot be read, or the nodes are no tree.
    """
    try:
        content = json.loads(pathlib.Path(file).read_text("utf-8"))
    except OSError as error:
        raise UserError(f"tree {file} cannot be read: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"tree {file} is not JSON ({error}); `mtp-jax calibrate` writes one."
        ) from None
    nodes = content.get("nodes") if isinstance(content, dict) else None
    if not isinstance(nodes, list) or not nodes:
        raise UserError(
            f'tree {file} has no list "nodes"; right is {{"nodes": [{{"path": [0]}}]}}.'
        )
    paths: set[tuple[int, ...]] = set()
    for i, node in enumerate(nodes):
        path = _path(node, f"tree {file}: nodes[{i}]")
        if path in paths:
            raise UserError(
                f"tree {file}: nodes[{i}] is {list(path)} again; once will do."
            )
        paths.add(path)
    for i, node in enumerate(nodes):
        before = tuple(node["path"][:-1])
        if before and before not in paths:
            raise UserError(
                f"tree {file}: nodes[{i}] is {node['path']}, but its parent "
                f"{list(before)} is not there; add it."
            )
    return tree_of(paths)


def _path(node: Any, where: str) -> tuple[int, ...]:
    """The path of a node in a file; raises UserError if it has none."""
    path = node.get("path") if isinstance(node, dict) else None
    if not isinstance(path, list) or not path:
        raise UserError(f'{where} has no "path"; right is {{"path": [0, 2]}}.')
    for rank in path:
        if type(rank) is not int or rank < 0:
            raise UserError(
                f"{where}: path {path} has {rank!r}; ranks are 0 (the most likely "
                "candidate), 1, 2 ..."
            )
    return tuple(path)
