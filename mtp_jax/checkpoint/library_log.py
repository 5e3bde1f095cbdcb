"""Orbax's log, as far as it is news: warnings in a line each, no tracebacks."""

import logging
import sys
from typing import Any

import absl.logging

_LONGEST = 300  # characters of a warning


def show_warnings_only() -> None:
    """Shows warnings of Orbax in a line each, and drops its errors.

    It logs the traceback of a failed save in every thread it passes through, and then
    raises it all the same.
    """
    absl.logging.set_verbosity(absl.logging.WARNING)
    logging.getLogger("absl").addFilter(_one_line)
    logging.getLogger("asyncio").addFilter(_not_of_a_lost_task)
    if not isinstance(sys.unraisablehook, _WithoutLostReads):
        sys.unraisablehook = _WithoutLostReads(sys.unraisablehook)


def _one_line(record: logging.LogRecord) -> bool:
    """Shortens a warning; returns False for an error."""
    record.msg, record.args = " ".join(record.getMessage().split())[:_LONGEST], ()
    record.exc_info = record.exc_text = record.stack_info = None
    return record.levelno < logging.ERROR


def _not_of_a_lost_task(record: logging.LogRecord) -> bool:
    """Returns False for the tasks of a failed read: the first of them was raised."""
    return "exception was never retrieved" not in str(record.msg)


class _WithoutLostReads:
    """A hook for exceptions that nobody can catch, which drops those of lost reads.

    Arrays are read at the same time. When one cannot be, Orbax raises that and closes
    its event loop; threads of TensorStore that end later find it closed.
    """

    def __init__(self, show: Any):
        """Passes everything else on to another hook."""
        self._show = show

    def __call__(self, found: Any) -> None:
        """Takes what `sys.unraisablehook` takes."""
        is_closed_loop = str(found.exc_value) == "Event loop is closed"
        if not (is_closed_loop and found.object is None):
            self._show(found)
