"""Comparison of what was written with the model, by the readers of imports.

Axes: N heads, T positions, V vocabulary.
"""

import pathlib

import numpy as np

from mtp_jax.errors import RunFailed
from mtp_jax.eval.outputs import head_outputs
from mtp_jax.exporting.parts import Parts
from mtp_jax.interop.formats import open_foreign
from mtp_jax.interop.reference import reference_logits

_CHECKED_TOKENS = 12
# Relative to the largest logit: what products of so few terms lose, by the type in
# which the model computes.
_CLOSE = {"float32": 1e-4, "bfloat16": 5e-2}


def checked_ids(parts: Parts) -> np.ndarray:
    """Ids of a text to compare on, the same ones at each call, [T]."""
    rng = np.random.default_rng(0)
    return rng.integers(0, parts.plain.vocab_size, _CHECKED_TOKENS)


def expected_logits(parts: Parts) -> np.ndarray:
    """Logits of every head of the model on that text, float32 [N, T, V]."""
    ids_T = checked_ids(parts)
    return np.asarray(head_outputs(parts.model, ids_T[None]).logits_NBTV)[:, 0]


def check_as_import(parts: Parts, path: pathlib.Path) -> None:
    """Opens what was written as an import would, and compares the logits of its heads.

    Raises:
      RunFailed: they are not those of the model.
    """
    found = reference_logits(open_foreign(path), checked_ids(parts))
    expected_NTV = expected_logits(parts)
    for number, logits_TV in enumerate(found):
        compare_logits(parts, path, number, logits_TV, expected_NTV[number])


def compare_logits(
    parts: Parts,
    where: pathlib.Path,
    number: int,
    found_TV: np.ndarray,
    expected_TV: np.ndarray,
) -> None:
    """Compares logits of a head, counted from 0, on the positions that tell of it.

    Raises:
      RunFailed: they differ by more than rounding.
    """
    # The token before the predicted one is not known of the last positions.
    known = slice(0, len(found_TV) - number)
    error = np.abs(found_TV[known] - expected_TV[known]).max()
    size = max(1.0, np.abs(expected_TV).max())
    if not error <= _CLOSE[parts.cfg.compute_dtype] * size:
        raise RunFailed(
            f"{where} computes other logits than the model: those of head "
            f"{number + 1} differ by {error:.2g}"
        )
