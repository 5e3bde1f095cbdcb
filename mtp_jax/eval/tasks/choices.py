"""Choice tasks, with the prompts of lm-evaluation-harness 0.4.13.

Each reads the columns of the set as its authors publish it. Most also read the form
`query`, `choices`, `gold`, in which files of several benchmarks go around; where that
has a prompt of its own, figures are those of that prompt.
"""

import re
from typing import Any

from mtp_jax.eval.tasks.kinds import Choice, ChoiceTask, Form, Row


def _choice(context: str, choices: list[str], gold: int) -> Choice:
    """A context that a space divides from its choices."""
    return Choice(
        contexts=(context,) * len(choices),
        continuations=tuple(f" {text}" for text in choices),
        gold=gold,
        lengths=tuple(map(len, choices)),
    )


def _texts(choices: dict[str, Any]) -> tuple[list[str], list[str]]:
    return choices["text"], choices["label"]


def _arc(row: Row) -> Choice:
    """Clark et al. 2018, arXiv:1803.05457."""
    texts, labels = _texts(row["choices"])
    context = f"Question: {row['question']}\nAnswer:"
    return _choice(context, texts, labels.index(row["answerKey"]))


def _asked(row: Row) -> Choice:
    """Rows whose query is the question without "Answer:"."""
    context = f"{row['query'].rstrip()}\nAnswer:"
    return _choice(context, row["choices"], row["gold"])


def _continued(row: Row) -> Choice:
    """Rows whose query is the whole context."""
    return _choice(row["query"], row["choices"], row["gold"])


def _piqa(row: Row) -> Choice:
    """Bisk et al. 2020, arXiv:1911.11641."""
    context = f"Question: {row['goal']}\nAnswer:"
    return _choice(context, [row["sol1"], row["sol2"]], int(row["label"]))


def _siqa(row: Row) -> Choice:
    """Sap et al. 2019, arXiv:1904.09728."""
    context = f"Q: {row['context']} {row['question']}\nA:"
    answers = [row["answerA"], row["answerB"], row["answerC"]]
    return _choice(context, answers, int(row["label"]) - 1)


def _copa(row: Row) -> Choice:
    """Roemmele et al. 2011, as in SuperGLUE."""
    word = {"cause": "because", "effect": "therefore"}[row["question"]]
    context = f"{row['premise'].strip()[:-1]} {word}"
    choices = [row["choice1"], row["choice2"]]
    return _choice(context, [x[0].lower() + x[1:] for x in choices], row["label"])


def _openbookqa(row: Row) -> Choice:
    """Mihaylov et al. 2018, arXiv:1809.02789."""
    texts, labels = _texts(row["choices"])
    return _choice(row["question_stem"], texts, labels.index(row["answerKey"].strip()))


def _winogrande(row: Row) -> Choice:
    """Sakaguchi et al. 2019, arXiv:1907.10641: the same end after each option."""
    before, _, after = row["sentence"].partition("_")
    options = [row["option1"], row["option2"]]
    return _ends([before + x for x in options], after.strip(), int(row["answer"]) - 1)


def _same_end(row: Row) -> Choice:
    """Rows whose choices are contexts of one continuation."""
    return _ends(row["context_options"], row["continuation"], row["gold"])


def _ends(contexts: list[str], end: str, gold: int) -> Choice:
    n = len(contexts)
    return Choice(tuple(contexts), (f" {end}",) * n, gold, (len(end),) * n)


def _hellaswag(row: Row) -> Choice:
    """Zellers et al. 2019, arXiv:1905.07830."""
    context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return _choice(
        _clean(context), [_clean(x) for x in row["endings"]], int(row["label"])
    )


def _clean(text: str) -> str:
    """A text without the marks that are left of WikiHow's pages."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


_QUERY = ("query", "choices", "gold")
_ARC = (Form(("question", "choices", "answerKey"), _arc), Form(_QUERY, _asked))

CHOICES = (
    ChoiceTask("arc_easy", ("arc_easy.jsonl",), _ARC, main="acc_norm"),
    ChoiceTask("arc_challenge", ("arc_challenge.jsonl",), _ARC, main="acc_norm"),
    ChoiceTask(
        "piqa",
        ("piqa.jsonl",),
        (Form(("goal", "sol1", "sol2", "label"), _piqa), Form(_QUERY, _asked)),
        main="acc_norm",
    ),
    ChoiceTask(
        "siqa",
        ("siqa.jsonl",),
        (
            Form(
                ("context", "question", "answerA", "answerB", "answerC", "label"), _siqa
            ),
            Form(_QUERY, _continued),
        ),
    ),
    ChoiceTask(
        "copa",
        ("copa.jsonl",),
        (
            Form(("premise", "question", "choice1", "choice2", "label"), _copa),
            Form(_QUERY, _continued),
        ),
    ),
    ChoiceTask(
        "openbookqa",
        ("openbookqa.jsonl", "openbook_qa.jsonl"),
        (
            Form(("question_stem", "choices", "answerKey"), _openbookqa),
            Form(_QUERY, _continued),
        ),
        main="acc_norm",
    ),
    ChoiceTask(
        "winogrande",
        ("winogrande.jsonl",),
        (
            Form(("sentence", "option1", "option2", "answer"), _winogrande),
            Form(("context_options", "continuation", "gold"), _same_end),
        ),
    ),
    ChoiceTask(
        "hellaswag",
        ("hellaswag.jsonl",),
        (
            Form(("activity_label", "ctx_a", "ctx_b", "endings", "label"), _hellaswag),
            Form(_QUERY, _continued),
        ),
        main="acc_norm",
    ),
)
