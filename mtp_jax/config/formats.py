"""Configs in files, with a format number: those of older versions stay readable.

A checkpoint and `run.json` hold the config of their run. Whoever changes the meaning or
the name of a field adds 1 to `FORMAT` and a function to `_MIGRATIONS`; a new field with
a default that leaves old runs as they were needs neither.
"""

from collections.abc import Callable
from typing import Any

from mtp_jax.config.section_tree import as_tree
from mtp_jax.config.sections import Config
from mtp_jax.config.tree import freeze
from mtp_jax.errors import UserError

Tree = dict[str, Any]

FORMAT = 1


def config_to_json(cfg: Config) -> Tree:
    """The config as plain JSON, with the number of its format under "format"."""
    return {"format": FORMAT, **as_tree(cfg)}


def config_from_json(tree: Tree, where: str) -> Config:
    """The config that some version of this program wrote with `config_to_json`.

    Args:
      tree: JSON; without a number it is of format 0.
      where: the file it is from, for errors.

    Raises:
      UserError: it is of a later format than this version knows, or it is no config.
    """
    if not isinstance(tree, dict):
        raise UserError(f"{where} holds no config.")
    sections = dict(tree)
    number = sections.pop("format", 0)
    if not isinstance(number, int) or not 0 <= number <= FORMAT:
        raise UserError(
            f"{where} has a config of format {number!r}, and this version of mtp_jax "
            f"reads 0 to {FORMAT}; use the version that wrote it, or a later one."
        )
    for migrate in _MIGRATIONS[number:]:
        sections = migrate(sections)
    try:
        return freeze(sections)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def _from_0(sections: Tree) -> Tree:
    """Format 0 had no number, and the fields of format 1."""
    return sections


# The i-th turns the sections of format i into those of format i + 1.
_MIGRATIONS: tuple[Callable[[Tree], Tree], ...] = (_from_0,)
