"""The settings of `verify`: prompts, lengths, and what may differ by rounding."""

import dataclasses
from typing import Any, Literal, Self

from mtp_jax.errors import UserError

NEAR_TIES = {"float32": 1e-4, "bfloat16": 0.25}  # logits that rounding may reorder


@dataclasses.dataclass(frozen=True, kw_only=True)
class VerifySettings:
    """The settings of a verification; the defaults are those of the command line.

    They are for a minute or two with a small model, most of which is compiling; those
    of `thorough` take several times as long.

    Raises:
      UserError: a number out of range, or an unknown dtype.
    """

    prompts: int = 8  # held-out prompts
    prompt_tokens: tuple[int, ...] = (8, 40)  # their lengths, in turn
    # Greedy texts.
    max_new_tokens: int = 64
    batch_sizes: tuple[int, ...] = (8,)
    dtype: Literal["float32", "bfloat16"] = "float32"  # to decode in
    # Logits no further apart may change places by rounding; None: that of the dtype.
    near_tie: float | None = None
    allow_near_ties: bool = False  # texts that part at a near-tie do not fail
    # Sampled texts.
    temperature: float = 1.0
    top_k: int = 2
    distribution_tokens: int = 3  # first new tokens whose distribution is compared
    distribution_prompts: int = 1  # prompts that this is done for
    distribution_heads: int | None = 2  # most heads that draft; None: all
    distribution_tolerance: float = 1e-5  # sum |p - q| that rounding may make
    samples: int = 2048  # texts drawn for the chi-square test
    least_p: float = 1e-4  # p-value below which it fails
    # Greedy texts at changing depths, too, and samples at a fixed one.
    every_depth: bool = False

    def __post_init__(self):
        if self.dtype not in NEAR_TIES:
            known = " or ".join(NEAR_TIES)
            raise UserError(f"dtype is {self.dtype!r}; give {known}.")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int and value < 1:
                raise UserError(f"{field.name} is {value}; give at least 1.")
        if self.distribution_heads is not None and self.distribution_heads < 2:
            raise UserError(
                f"distribution_heads is {self.distribution_heads}; give at least 2."
            )
        for name in ("prompt_tokens", "batch_sizes"):
            values = getattr(self, name)
            if not values or min(values) < 1:
                raise UserError(f"{name} is {values}; give numbers of at least 1.")

    @classmethod
    def thorough(cls, **changes: Any) -> Self:
        """Settings for everything that can be verified, and changes to them."""
        everything: dict[str, Any] = {
            "prompts": 16,
            "prompt_tokens": (8, 64),
            "batch_sizes": (1, 4, 16),
            "distribution_prompts": 2,
            "distribution_heads": None,
            "every_depth": True,
        }
        return cls(**{**everything, **changes})

    @property
    def tie(self) -> float:
        """Two logits no further apart are a near-tie."""
        return NEAR_TIES[self.dtype] if self.near_tie is None else self.near_tie
