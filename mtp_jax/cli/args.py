"""Arguments, types and errors that the command lines of the verbs share."""

import argparse
import json
import os
import pathlib
import re
import sys
from collections.abc import Callable
from typing import Any, NoReturn, get_args

import absl.flags
from ml_collections import ConfigDict, config_flags

from mtp_jax.cli.overrides import plain_overrides, whole
from mtp_jax.config import Config, as_tree, config_from_json, freeze
from mtp_jax.config.heads import DraftCache
from mtp_jax.config.names import did_you_mean, fields_meant
from mtp_jax.errors import UserError
from mtp_jax.storage import workdir_at


class Parser(argparse.ArgumentParser):
    """argparse that takes no abbreviations and raises instead of exiting.

    `help_at` is the command that shows the help, if it is not --help.
    """

    def __init__(
        self,
        prog: str,
        description: str,
        epilog: str | None = None,
        help_at: str | None = None,
    ):
        super().__init__(
            prog=prog, description=description, epilog=epilog, allow_abbrev=False
        )
        self._help_at = help_at or f"{prog} --help"
        self._completing = False

    def parse_known_args(self, args=None, namespace=None):
        """Parses, as argparse does; where a shell asks, completes and exits instead."""
        if "_ARGCOMPLETE" in os.environ and not self._completing:
            import argcomplete

            self._completing = True  # argcomplete asks this parser, too
            argcomplete.autocomplete(self)
        for option in sys.argv[1:] if args is None else args:
            if option.startswith("--") and option.endswith("=--"):
                self.error(f"{option}: -- is no value")  # argparse makes it a list
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Raises UserError with argparse's text and where help is.

        Raises:
          UserError: always.
        """
        raise UserError(f"{self.prog}: {message}; see {self._help_at}.")


def positive_int(text: str) -> int:
    """An argparse type: a whole number of at least 1, which may be written 1e3."""
    digits = whole(text)
    if not digits.isdecimal() or int(digits) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(digits)


def add_data(parser: argparse.ArgumentParser) -> None:
    """Adds --data, the corpora to use instead of those of the run."""
    parser.add_argument(
        "--data",
        action="append",
        metavar="DIR",
        help="another corpus than the run's own; may be repeated",
    )


def add_draft_cache(parser: argparse.ArgumentParser) -> None:
    """Adds --draft_cache, the caches of serial heads to use instead of the run's."""
    parser.add_argument(
        "--draft_cache",
        choices=(caches := get_args(DraftCache)),
        metavar="C",
        help=f"{' or '.join(caches)}, of serial heads",
    )


def unescape(text: str) -> str:
    """A text with `\\n`, `\\t` and `\\\\` as the characters they stand for."""
    parts = text.split("\\\\")
    return "\\".join(p.replace("\\n", "\n").replace("\\t", "\t") for p in parts)


def output_file(option: str, path: str) -> pathlib.Path:
    """Returns the path of an output option, checked before the work is done.

    Raises:
      UserError: it is a folder, or in none that exists.
    """
    file = pathlib.Path(path)
    if file.is_dir() or not file.parent.is_dir():
        raise UserError(f"--{option}={file} is no file in a folder that exists.")
    return file


def config_from(path: str, overrides: list[str]) -> Config:
    """Returns the frozen config of `--config=FILE[:ARGUMENT]`, edited.

    Args:
      path: FILE or FILE:ARGUMENT.
      overrides: `--config.section.field=value`, what argparse left over.

    Raises:
      UserError: no such file, an unknown field, a wrong type, anything else left over.
    """
    if not pathlib.Path(path.partition(":")[0]).is_file():
        raise UserError(f"--config={path} is not a file; configs/tiny.py is one.")
    argv = ["mtp-jax", f"--config={path}", *plain_overrides(overrides)]

    def define(flags: absl.flags.FlagValues) -> None:
        config_flags.DEFINE_config_file("config", flag_values=flags, sys_argv=argv)

    return freeze(_parsed(define, argv, path, overrides))


def config_of_run(workdir: str, overrides: list[str]) -> Config:
    """Returns the config with which the run in a workdir was last started, edited.

    Args:
      workdir: of the run, here or in an object store.
      overrides: as for `config_from`.

    Raises:
      UserError: no run is there, or what `config_from` raises.
    """
    path = workdir_at(workdir) / "run.json"
    try:
        written = json.loads(path.read_text(encoding="utf-8"))["config"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"{workdir} holds no run to go on with; give --config=FILE to begin one."
        ) from None
    tree = as_tree(config_from_json(written, str(path)))
    return freeze(edited(tree, str(path), overrides))


def edited(
    tree: dict[str, dict[str, Any]], where: str, overrides: list[str]
) -> dict[str, dict[str, Any]]:
    """Returns the sections of a config, with the fields of a command line.

    Args:
      tree: the sections.
      where: they are from, for errors.
      overrides: as for `config_from`.

    Raises:
      UserError: what `config_from` raises.
    """
    argv = ["mtp-jax", *plain_overrides(overrides)]

    def define(flags: absl.flags.FlagValues) -> None:
        config_flags.DEFINE_config_dict(
            "config", ConfigDict(tree).lock(), flag_values=flags, sys_argv=argv
        )

    return _parsed(define, argv, where, overrides).to_dict()


def _parsed(
    define: Callable[[absl.flags.FlagValues], None],
    argv: list[str],
    path: str,
    overrides: list[str],
) -> ConfigDict:
    """Returns what the flag `config` holds after the command line."""
    flags = absl.flags.FlagValues()
    try:
        define(flags)
        rest = flags(argv)[1:]
    except absl.flags.UnrecognizedFlagError as error:
        name = error.flagname
        meant = (
            did_you_mean(name, before="--") if fields_meant(name) else "; see --help."
        )
        raise UserError(f"unknown option --{name}{meant}") from error
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # a config is code, and may do anything
        raise UserError(_what_is_wrong(path, overrides, error)) from error
    if rest:
        raise UserError(f"unexpected argument {rest[0]!r}; see --help.")
    return flags["config"].value


def _what_is_wrong(path: str, overrides: list[str], error: BaseException) -> str:
    """One line for a config library's error, without its list of all fields."""
    text = str(error.args[0] if error.args else error).replace("\\n", " ")
    if "Error whilst parsing config file" in text:
        last = text.strip().splitlines()[-1]
        wrong = re.search(r"field '(\w+)' \(reference\)\. (.*) is of .*'(.*)'>", last)
        if wrong:
            kind = wrong[3].rpartition(".")[2]
            return f"{path}: {wrong[1]} is {wrong[2]}; it must be of type {kind}."
        if "cannot be casted to type" in last:
            kind = last.rpartition("'")[0].rpartition("'")[2]
            return (
                f"{path}: a field is set to a dict, and it must be of type {kind}; "
                "pairs of names and numbers are tuples, as (('heads', 10),)."
            )
        return f"{path}: {last}"
    if isinstance(error, absl.flags.Error):
        flag, separator, _ = text.partition(": Failed to parse ")
        if separator and "as a ConfigDict" in text:
            return f"{flag}: this is a section; set one of its fields."
        if "invalid literal for int()" in text:
            return text.partition(": invalid literal")[0] + ": must be a whole number."
        return text
    if not isinstance(error, (AttributeError, KeyError)) or "get_config" in text:
        return f"{path}: {type(error).__name__}: {error}"
    return _unknown_field(path, overrides, text)


def _unknown_field(path: str, overrides: list[str], text: str) -> str:
    """One line for a field that is not there, set by an option or in the file."""
    quoted = text.strip("\\'\"").removeprefix('Key "')
    name = quoted.partition("'")[0].partition('"')[0].strip("\\ ")
    for option in overrides:
        where, _, field = option.partition("=")[0].lstrip("-").rpartition(".")
        if name in (field, *where.split(".")):
            where = where if name == field else "config"
            return f"{where} has no field {name!r}" + did_you_mean(name, where[7:])
    first = re.search(r"fields present: \"\{\\?'(\w+)", text)
    where = "config"
    for section, fields in as_tree(Config()).items():
        if first and first[1] == next(iter(fields)):
            where = f"config.{section}"
    return f"{path}: {where} has no field {name!r}" + did_you_mean(name, where[7:])
