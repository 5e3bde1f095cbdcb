"""Positions of tokens within their documents.

Axes: B rows, T tokens of a row.
"""

import numpy as np


def positions_of(segments_BT: np.ndarray) -> np.ndarray:
    """Positions that count from 0 wherever another document begins, int32 [B, T].

    Args:
      segments_BT: document number of each token; padding, 0, has positions 0.
    """
    b, t = segments_BT.shape
    index_1T = np.arange(t)[None]
    begins_BT = np.ones((b, t), bool)
    begins_BT[:, 1:] = segments_BT[:, 1:] != segments_BT[:, :-1]
    first_BT = np.maximum.accumulate(np.where(begins_BT, index_1T, 0), axis=1)
    return np.where(segments_BT == 0, 0, index_1T - first_BT).astype(np.int32)
