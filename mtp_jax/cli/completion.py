"""Shell completion of verbs and their options, by argcomplete."""

import argparse
import contextlib
import importlib
import os
from collections.abc import Mapping

from mtp_jax.errors import UserError


def complete(modules: Mapping[str, str]) -> None:
    """Answers a shell's question how the command line could go on, and exits.

    Only the module of the verb that stands there is imported: its parser answers, when
    it is asked to parse (`args.Parser`).

    Args:
      modules: by verb, the module with its `main(argv)`.
    """
    import argcomplete

    line, point = os.environ["COMP_LINE"], int(os.environ["COMP_POINT"])
    _, _, _, words, _ = argcomplete.split_line(line, point)
    start = int(os.environ["_ARGCOMPLETE"])  # `mtp-jax`, counted from 1
    verb = words[start] if len(words) > start else None
    if verb is None:
        parser = argparse.ArgumentParser()
        parser.add_argument("verb", choices=[*modules, "--version"])
        argcomplete.autocomplete(parser)
    elif verb in modules:
        os.environ["_ARGCOMPLETE"] = str(start + 1)
        with contextlib.suppress(UserError):
            importlib.import_module(modules[verb]).main([])
    raise SystemExit(1)
