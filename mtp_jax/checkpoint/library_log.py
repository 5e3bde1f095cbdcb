"""Logs of Orbax, as far as they are news: a warning in a line, and no tracebacks."""

import logging

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


def _one_line(record: logging.LogRecord) -> bool:
    """Shortens a warning; returns False for an error."""
    record.msg, record.args = " ".join(record.getMessage().split())[:_LONGEST], ()
    return record.levelno < logging.ERROR


def _not_of_a_lost_task(record: logging.LogRecord) -> bool:
    """Returns False for the tasks of a failed read: the first of them was raised."""
    return "exception was never retrieved" not in str(record.msg)
