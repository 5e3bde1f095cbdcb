"""From the trunk's output to each head's: how the heads are wired.

Axes: B batch, T time, D model width, N heads.

Losses and evaluation ask only for "every head's output, one at a time"; another kind of
head is another function of the signature of `scan_heads`.
"""

from collections.abc import Callable
from typing import Any

import jax

from mtp_jax.model import Attend, LanguageModel


def scan_heads(
    model: LanguageModel,
    trunk_BTD: jax.Array,
    angles_BTk: jax.Array,
    attend: Attend,
    use: Callable[[jax.Array, Any], Any],
    xs: Any,
) -> Any:
    """Runs `use(head_BTD, x)` for each head in turn; returns its results stacked.

    Parallel heads: all of them read the trunk's output (arXiv:2404.19737, section 2).
    One head runs at a time, and its backward pass computes it again, so whatever `use`
    makes of vocabulary size is alive for one head only (figure 2).

    Args:
      model: whose heads; a stack, [N, ...] in every parameter.
      trunk_BTD: the trunk's output.
      angles_BTk: rotary angles of the positions.
      attend: attention within the rows.
      use: takes a head's output [B, T, D] and that head's slice of xs.
      xs: a pytree with a leading axis N.
    """

    def one_head(_, head_and_x):
        head, x = head_and_x
        head_BTD, _ = head(trunk_BTD, angles_BTk, attend)
        return None, use(head_BTD, x)

    one_head = jax.checkpoint(one_head, prevent_cse=False)
    return jax.lax.scan(one_head, None, (model.heads, xs))[1]
