"""Checks that the sections of a config share."""

from mtp_jax.errors import UserError


def require(ok: bool, message: str) -> None:
    """Raises UserError with the message unless `ok`."""
    if not ok:
        raise UserError(message)


def require_at_least(section: str, low: float, **fields: float) -> None:
    """Raises UserError, naming the field, if one of them is below `low`."""
    for name, value in fields.items():
        require(
            value >= low,
            f"config.{section}.{name} is {value}; it must be at least {low}.",
        )


_LARGEST = 2**31 - 1  # of an array along an axis


def require_sizes(section: str, **fields: int) -> None:
    """Sizes of arrays: above 0, and small enough to be counted in 32 bits.

    Raises:
      UserError: naming the field that is not.
    """
    require_at_least(section, 1, **fields)
    for name, value in fields.items():
        require(
            value <= _LARGEST,
            f"config.{section}.{name} is {value}; it must be at most {_LARGEST}.",
        )
