"""Benchmarks as data: `TASKS` has them by name, a file a kind."""

from mtp_jax.eval.tasks.answers import GSM8K, NQ, SUMMARIES, TRIVIAQA
from mtp_jax.eval.tasks.choices import CHOICES
from mtp_jax.eval.tasks.code import APPS, HUMANEVAL, MBPP
from mtp_jax.eval.tasks.kinds import Form, Task, TextTask

BITS_PER_BYTE = TextTask(
    name="bits_per_byte",
    files=("text.jsonl", "test.jsonl", "dev.jsonl"),
    forms=(
        Form(("text",), lambda row: row["text"]),
        Form(("story",), lambda row: row["story"]),
    ),
)

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        HUMANEVAL,
        MBPP,
        APPS,
        GSM8K,
        *CHOICES,
        TRIVIAQA,
        NQ,
        SUMMARIES,
        BITS_PER_BYTE,
    )
}
