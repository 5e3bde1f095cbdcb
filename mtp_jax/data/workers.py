"""How many processes may help to read data."""

import os

from mtp_jax.errors import UserError

_OF_A_CORE = 16


def check_workers(name: str, count: int) -> None:
    """Refuses more processes than this machine can bear.

    All of them are started at once, and each takes memory, whether it has work or not.

    Raises:
      UserError: `count`, a setting called `name`, is more than 16 times the cores.
    """
    cores = os.cpu_count() or 1
    if count > _OF_A_CORE * cores:
        raise UserError(
            f"{name} is {count}; at most {_OF_A_CORE * cores} processes are started on "
            f"this machine, {_OF_A_CORE} a core."
        )
