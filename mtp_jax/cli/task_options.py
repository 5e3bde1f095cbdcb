"""Options of `evaluate --tasks`."""

import argparse

from mtp_jax.cli.args import positive_int

TASK_OPTIONS = (
    "limit",
    "samples",
    "k",
    "temperature",
    "top_p",
    "seed",
    "shots",
    "max_new_tokens",
    "batch_size",
    "decoder",
    "reference",
    "allow_unsafe_execution",
)
# Those that results depend on: a file of results has them in its name.
_NAMED = ("step", "heads", "limit", "samples", "temperature", "top_p", "seed", "shots",
          "max_new_tokens")  # fmt: skip


def add_task_options(parser: argparse._ArgumentGroup) -> None:
    """Adds them to a group of a parser's options."""
    add = parser.add_argument
    add("--tasks", type=_names, metavar="A,B",
        help="humaneval, mbpp, ..., or FILE.py with a task")  # fmt: skip
    add("--limit", type=positive_int, metavar="L", help="the first so many examples")
    add("--samples", type=positive_int, metavar="S", help="texts an example (1)")
    add("--k", type=_whole_numbers, metavar="K,K", help="of pass@k (1, 10, 100)")
    add("--temperature", type=_temperatures, metavar="T,T",
        help="0: greedy; several: each, and the best (0; 0.8 for samples)")  # fmt: skip
    add("--top_p", type=_share, metavar="P", help="(0.95 where texts are drawn)")
    add("--seed", type=int, metavar="N", help="of what is drawn (0)")
    add("--shots", type=_count, metavar="N", help="examples in the prompt")
    add("--max_new_tokens", type=positive_int, metavar="N", help="of a text")
    add("--batch_size", type=positive_int, metavar="B", help="rows at a time (16)")
    add("--decoder", metavar="NAME",
        help="how texts are written; the faster of plain and drafts")  # fmt: skip
    add("--reference", action="store_true",
        help="judge the solutions of the data instead of a model's")  # fmt: skip
    add("--allow_unsafe_execution", action="store_true",
        help="run programs of the model without a sandbox: they can read, write and "
        "send whatever you can")  # fmt: skip


def file_stem(task: str, args: argparse.Namespace, of_use: set[str]) -> str:
    """The name of a task's file of results, without an ending.

    Args:
      task: its name.
      args: options; those that are given and of use to the task are in the name.
      of_use: names from `settings_of_use`.
    """
    parts = [task]
    for name in _NAMED:
        value = getattr(args, name)
        setting = "temperatures" if name == "temperature" else name
        if value is not None and (setting in of_use or name in ("step", "heads")):
            values = value if isinstance(value, tuple) else (value,)
            parts.append(name + ",".join(f"{x:g}" for x in values))
    if args.decoder is not None and "decoder" in of_use:
        parts.append("".join(c if c.isalnum() else "_" for c in args.decoder))
    return "-".join(parts)


def _names(text: str) -> tuple[str, ...]:
    names = tuple(name for name in text.split(",") if name)
    if not names:
        raise argparse.ArgumentTypeError("no task is named")
    return names


def _whole_numbers(text: str) -> tuple[int, ...]:
    return tuple(positive_int(part) for part in text.split(","))


def _temperatures(text: str) -> tuple[float, ...]:
    values = tuple(_number(part) for part in text.split(","))
    if any(not 0 <= x < float("inf") for x in values) or len(set(values)) < len(values):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no list of different numbers >= 0"
        )
    return values


def _share(text: str) -> float:
    if not 0 < (value := _number(text)) <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not above 0 and at most 1")
    return value


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number") from None


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(text)
