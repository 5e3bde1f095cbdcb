"""The settings of `verify`: prompts, lengths, and what may differ by rounding."""

import dataclasses
from typing import Literal

from mtp_jax.errors import UserError

NEAR_TIES = {"float32": 1e-4, "bfloat16": 0.25}  # logits that rounding may reorder


@dataclasses.dataclass(frozen=True, kw_only=True)
class VerifySettings:
    """The settings of a verification; the defaults are those of the command line.

    Raises:
      UserError: a number out of range, or an unknown dtype.
    """

    prompts: int = 16  # held-out prompts
    prompt_tokens: tuple[int, ...] = (8, 64)  # their lengths, in turn
    # Greedy texts.
    max_new_tokens: int = 64
    batch_sizes: tuple[int, ...] = (1, 4, 16)
    dtype: Literal["float32", "bfloat16"] = "float32"  # to decode in
    # Logits no further apart may change places by rounding; None: that of the dtype.
    near_tie: float | None = None
    allow_near_ties: bool = False  # texts that part at a near-tie do not fail
    # Sampled texts.
    temperature: float = 1.0
    top_k: int = 2
    distribution_tokens: int = 3  # first new tokens whose distribution is compared
    distribution_prompts: int = 2  # prompts that this is done for
    distribution_tolerance: float = 1e-5  # sum |p - q| that rounding may make
    samples: int = 2048  # texts drawn for the chi-square test
    least_p: float = 1e-4  # p-value below which it fails

    def __post_init__(self):
        if self.dtype not in NEAR_TIES:
            known = " or ".join(NEAR_TIES)
            raise UserError(f"dtype is {self.dtype!r}; give {known}.")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int and value < 1:
                raise UserError(f"{field.name} is {value}; give at least 1.")
        for name in ("prompt_tokens", "batch_sizes"):
            values = getattr(self, name)
            if not values or min(values) < 1:
                raise UserError(f"{name} is {values}; give numbers of at least 1.")

    @property
    def tie(self) -> float:
        """Two logits no further apart are a near-tie."""
        return NEAR_TIES[self.dtype] if self.near_tie is None else self.near_tie
