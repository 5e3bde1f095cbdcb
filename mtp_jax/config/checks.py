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
