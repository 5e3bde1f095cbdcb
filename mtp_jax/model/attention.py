"""Attention, and the choice of the kernel that carries it out on every device.

Axes: B batch, T queries, S keys, H query heads, G key-value heads, K head width.

Where rows are split over devices (context parallel), every device gathers the keys and
values of its rows and reads them with its own queries. With grouped queries, keys are
the smaller part by far.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from mtp_jax.config import Attention, Config
from mtp_jax.errors import UserError
from mtp_jax.model import kernels
from mtp_jax.model.block import Attend
from mtp_jax.model.blockwise import blockwise
from mtp_jax.parallel import zigzag
from mtp_jax.parallel.sharding import (
    axes_of,
    on_one_cpu,
    shards_of,
    spec,
    spec_like,
    time_parts,
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowContext:
    """Positions and documents of packed rows, which every layer needs beside x."""

    angles_BTk: jax.Array  # rotary angles of the positions, float32
    # Document of each position, int32; 0 is padding. Not split over devices that share
    # a row, and in its order.
    segments_BT: jax.Array
    # True if `few_documents` holds.
    few: bool = dataclasses.field(default=False, metadata={"static": True})


def attend_within(rows: RowContext, kernel: Attention, window: int = 0) -> Attend:
    """Causal attention within the documents, which keeps nothing."""

    def attend(q_BTHK, k_BTGK, v_BTGK):
        read_BTHK = causal_attention(
            q_BTHK, k_BTGK, v_BTGK, rows.segments_BT, kernel, rows.few, window
        )
        return read_BTHK, None

    return attend


def causal_attention(
    q_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGK: jax.Array,
    segments_BT: jax.Array,
    kernel: Attention = "auto",
    few: bool = False,
    window: int = 0,
) -> jax.Array:
    """Each position reads itself and what came before it in its document.

    Args:
      q_BTHK, k_BTGK, v_BTGK: queries, keys and values of packed rows. Their time may
        be split over devices, and is then in the order of `zigzag`.
      segments_BT: number of the document each position belongs to; padding, 0, is a
        document like any other, so that no query is without a key. Not split, and in
        the order of the rows.
      kernel: which one; `check_attention` says beforehand whether it can.
      few: True if `few_documents` holds.
      window: positions that a query reads at most, itself the last; 0: all before it.

    Returns:
      [B, T, H, K], in the dtype of the queries.
    """
    if kernel == "auto":
        kernel = _best(q_BTHK)
    run: Callable[..., jax.Array] = {
        "splash": kernels.splash,
        "cudnn": kernels.cudnn,
        "xla": _masked,
    }[kernel]
    further: tuple[int, ...] = (window,)
    if kernel == "cudnn" and few and not window:
        run, further = kernels.cudnn_of_few, ()
    by_head, time = spec_like(q_BTHK, "heads", None), axes_of("time")
    parts = time_parts(q_BTHK)

    def local(q_bthk, k_btgk, v_btgk, segments_bS):
        if parts == 1:
            return run(q_bthk, k_btgk, v_btgk, segments_bS, 0, *further)
        k_bSgk, v_bSgk = (
            zigzag.restore(lax.all_gather(x, time, axis=1, tiled=True), parts, axis=1)
            for x in (k_btgk, v_btgk)
        )
        part = lax.axis_index(time)
        return run(q_bthk, k_bSgk, v_bSgk, segments_bS, part, *further)

    return jax.shard_map(
        local,
        in_specs=(by_head, by_head, by_head, spec("batch", None)),
        out_specs=by_head,
        # A Pallas kernel does not say over which axes its results differ. They differ
        # over all that split rows, heads and time, as the specs say.
        check_vma=kernel != "splash",
    )(q_BTHK, k_BTGK, v_BTGK, segments_BT)


def few_documents(segments_BT: jax.Array, cfg: Config) -> jax.Array | None:
    """True if every row has so few documents that a faster kernel can take them.

    Returns:
      bool [], and None where no kernel asks: then there is one program for all rows.
    """
    t, kernel = segments_BT.shape[1], cfg.compute.attention
    mesh = jax.sharding.get_abstract_mesh()
    if kernel not in ("auto", "cudnn") or shards_of("time", mesh) > 1:
        return None
    windows = {*cfg.model.trunk_windows, cfg.model.heads_window}
    if 0 not in windows:  # the faster kernel has none
        return None
    if kernels.why_not(
        "cudnn",
        mesh.abstract_device,
        seq_len=t,
        shards=1,
        d_head=cfg.model.d_head,
        dtype=cfg.model.compute_dtype,
    ) or not kernels.takes_lengths(jax.local_devices()[0]):
        return None
    count_B = jnp.sum(kernels.document_begins(segments_BT), axis=1)
    return jnp.max(count_B) <= kernels.most_documents(t)


def check_attention(cfg: Config, mesh: jax.sharding.Mesh) -> None:
    """Refuses a kernel that the devices or the shapes of a run rule out.

    Raises:
      UserError: naming the kernel, what it asks for and what there is.
    """
    kernel = cfg.compute.attention
    reason = kernels.why_not(
        kernel,
        mesh.abstract_mesh.abstract_device,
        seq_len=cfg.data.seq_len,
        shards=shards_of("time", mesh),
        d_head=cfg.model.d_head,
        dtype=cfg.model.compute_dtype,
    )
    if reason:
        raise UserError(
            f"config.compute.attention is {kernel}, which {reason}; with auto, a "
            "kernel that can run is chosen."
        )


def _best(q_BTHK: jax.Array) -> Attention:
    """The kernel for the devices of the mesh in force and for these queries."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    _, t, _, k = q_BTHK.shape
    choices: tuple[Attention, ...] = ("splash", "cudnn")
    for kernel in choices:
        if not kernels.why_not(
            kernel,
            device,
            seq_len=t,
            shards=time_parts(q_BTHK),
            d_head=k,
            dtype=q_BTHK.dtype.name,
        ):
            return kernel
    return "xla"


def _masked(q_BTHK, k_BSGK, v_BSGK, segments_BS, part, window=0):
    if on_one_cpu():
        return blockwise(q_BTHK, k_BSGK, v_BSGK, segments_BS, window)
    mask_BTS = kernels.causal_mask(segments_BS, q_BTHK.shape[1], part, window)
    return kernels.xla(q_BTHK, k_BSGK, v_BSGK, mask_BTS)
