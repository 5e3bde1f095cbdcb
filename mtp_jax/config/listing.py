"""A config with every field and its comment, as a file that `train` takes."""

import ast
import functools
import inspect
import io
import tokenize
import types
import typing

from mtp_jax.config import heads, init, layer, loss, model, optim, rope, sections
from mtp_jax.config.section_tree import fields_of, sections_of
from mtp_jax.config.sections import Config


def config_to_python(cfg: Config) -> str:
    """Every field of a config with its value and its comment, as a config file.

    Where a value is not the default, the comment ends with the default.
    """
    lines = [
        '"""Every field of a run, as `mtp-jax train --print_config` found them."""',
        "",
        "from mtp_jax.config import default",
        "",
        "",
        "def get_config():",
        "    c = default()",
    ]
    defaults = sections_of(Config())
    for section, values in sections_of(cfg).items():
        usual = defaults[section]
        lines += ["", f"    # {section}: {_first_line(type(usual))}"]
        hints = typing.get_type_hints(type(usual))
        for field in fields_of(values):
            value = getattr(values, field.name)
            notes = [_comments()[type(usual).__name__].get(field.name, "")]
            if typing.get_origin(hints[field.name]) is typing.Literal:
                notes.append("; ".join(typing.get_args(hints[field.name])).join("()"))
            if value != getattr(usual, field.name):
                notes.append(f"(default: {getattr(usual, field.name)!r})")
            note = " ".join(filter(None, notes))
            assignment = f"    c.{section}.{field.name} = {value!r}"
            lines.append(f"{assignment}  # {note}" if note else assignment)
    return "\n".join([*lines, "    return c"])


def _first_line(cls: type) -> str:
    return (cls.__doc__ or "").partition("\n")[0]


@functools.cache
def _comments() -> dict[str, dict[str, str]]:
    """The comment of each field of each section, from the source of `sections`."""
    found: dict[str, dict[str, str]] = {}
    for module in (sections, model, heads, layer, rope, loss, optim, init):
        found |= _comments_in(module)
    return found


def _comments_in(module: types.ModuleType) -> dict[str, dict[str, str]]:
    source = inspect.getsource(module)
    by_line = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    found: dict[str, dict[str, str]] = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef):
            found[node.name] = {
                field.target.id: " ".join(
                    by_line[line]
                    for line in range(field.lineno, (field.end_lineno or 0) + 1)
                    if line in by_line
                )
                for field in node.body
                if isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
            }
    return found
