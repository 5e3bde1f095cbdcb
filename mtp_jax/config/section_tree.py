"""The sections of a config by name, and a config as a tree of plain values.

Parts of the model are sections of their own for who writes a config: `cfg.model.heads`
is `config.heads` in every file and on every command line.
"""

import dataclasses
from typing import Any

from mtp_jax.config.model import ModelConfig
from mtp_jax.config.sections import Config

PARTS_OF_MODEL = tuple(
    field.name
    for field in dataclasses.fields(ModelConfig)
    if dataclasses.is_dataclass(field.default)
)


def sections_of(cfg: Config) -> dict[str, Any]:
    """The dataclass of each section, in the order in which they are written."""
    found: dict[str, Any] = {}
    for name in (field.name for field in dataclasses.fields(cfg)):
        section = found[name] = getattr(cfg, name)
        for field in dataclasses.fields(section):
            if dataclasses.is_dataclass(getattr(section, field.name)):
                found[field.name] = getattr(section, field.name)
    return found


def fields_of(section: Any) -> list[dataclasses.Field]:
    """The fields of a section that hold plain values."""
    return [
        field
        for field in dataclasses.fields(section)
        if not dataclasses.is_dataclass(getattr(section, field.name))
    ]


def as_tree(cfg: Config) -> dict[str, dict[str, Any]]:
    """The config as sections of plain values, which `freeze` makes a config of."""
    return {
        name: {field.name: getattr(section, field.name) for field in fields_of(section)}
        for name, section in sections_of(cfg).items()
    }
