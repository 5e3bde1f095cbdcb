"""How many heads pay in decoding on a chip: measured acceptance, cost by roofline.

A pass takes at least the time of reading its weights once and that of its arithmetic,
whichever is longer. Few texts wait for memory, so a draft is nearly free; many wait for
arithmetic, where each drafted token costs as much as another text.
"""

import dataclasses
from collections.abc import Sequence

from mtp_jax.config import ModelConfig
from mtp_jax.model.heads import kind_of
from mtp_jax.model.heads.base import layer_entries
from mtp_jax.model.sizes import drafting_entries, first_entries
from mtp_jax.parallel.chips import Chip

_ITEMSIZE = {"float32": 4, "bfloat16": 2}


@dataclasses.dataclass(frozen=True)
class Drafting:
    """Decoding with some of a model's heads, on a chip, with so many texts at once."""

    n: int  # heads
    tokens: float  # a pass commits of each text, on average
    pass_s: float  # at the least
    speed_up: float  # to plain decoding, head 1 alone


def by_heads(
    cfg: ModelConfig, accepted: Sequence[float], chip: Chip, batch_size: int
) -> list[Drafting]:
    """Decoding with 1 to n heads, blockwise, at the roofline of a chip.

    Caches, activations and the embedding's rows are left out, as in `costs.breakeven`.
    The heads that remain are those of the model, as deep as they are.

    Args:
      cfg: the model.
      accepted: share of passes in which the drafts of heads 2, 3 ... and all before
        them are accepted, n - 1 of them, as `Calibration.accepted` has them.
      chip: the device.
      batch_size: texts decoded at once.
    """
    n = cfg.n_future_tokens
    assert len(accepted) == n - 1
    made: list[Drafting] = []
    for count in range(cfg.heads.least_kept(n), n + 1):
        kept = cfg.keep_heads(count)
        seconds = least_pass_s(kept, chip, batch_size)
        tokens = 1.0 + sum(accepted[: count - 1])
        plain_s = least_pass_s(kept, chip, batch_size, drafts=False)
        made.append(Drafting(count, tokens, seconds, tokens * plain_s / seconds))
    return made


def pays_most(found: Sequence[Drafting]) -> Drafting:
    """The decoding that is fastest, the one with the fewest heads of equal ones."""
    return max(found, key=lambda each: (each.speed_up, -each.n))


def least_pass_s(
    cfg: ModelConfig, chip: Chip, batch_size: int, drafts: bool = True
) -> float:
    """The least time of a forward pass of decoding, in seconds.

    Args:
      cfg: the model.
      chip: the device.
      batch_size: texts decoded at once.
      drafts: verify n - 1 drafts of each text and make as many; else head 1 alone, one
        token a text.
    """
    read = drafting_entries(cfg) if drafts else first_entries(cfg)
    products = pass_products(cfg) if drafts else first_entries(cfg)
    memory_s = read * _ITEMSIZE[cfg.compute_dtype] / chip.hbm_bytes_per_s
    return max(memory_s, 2.0 * batch_size * products / chip.peak_flops)


def pass_products(cfg: ModelConfig) -> int:
    """Products with matrix entries in a pass that verifies drafts and drafts again.

    Of one text. The trunk and head 1 work at n positions, the last committed token and
    its n - 1 drafts. Of the other heads, those that read the trunk and the last of a
    chain make keys and values at all of them and the rest at one; those that another
    one reads work at all; serial heads at `HeadsConfig.lookback` more, and with one
    cache from head 3 on at one alone.
    """
    n, heads, wiring = cfg.n_future_tokens, cfg.heads, cfg.heads.wiring
    table = cfg.vocab_size * (cfg.d_model + heads.markov_rank)
    found = n * first_entries(cfg) + (n - 1) * table
    if wiring.reads == "after":
        return found  # drafting heads are on the way to head 1
    body = kind_of(cfg).entries(cfg)
    if not wiring.layered:
        return found + (n - 1) * body
    read = n + heads.lookback(n)
    keys_and_values = 2 * cfg.d_model * cfg.num_kv_heads * cfg.d_head
    rest = layer_entries(cfg) - keys_and_values  # of the last layer
    one_cache = heads.draft_cache == "shared"
    for head in range(2, n + 1):
        if one_cache and head > 2:
            found += body
        elif wiring.reads == "trunk" or one_cache or head == n:
            found += (body - rest) * read + rest
        else:
            found += body * read
    return found
