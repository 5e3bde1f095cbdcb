"""Tasks whose answers the model writes: grade-school maths, closed books, summaries.

Prompts, stop strings and metrics are those of lm-evaluation-harness 0.4.13 where it has
the task.
"""

import re
import string

from mtp_jax.errors import UserError
from mtp_jax.eval.tasks.kinds import AnswerTask, Form, Question, Row

_STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")
_FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")


def _gsm8k(row: Row) -> Question:
    """Cobbe et al. 2021, arXiv:2110.14168."""
    answer = row["answer"]
    prompt = f"Question: {row['question']}\nAnswer:"
    return Question(prompt, (answer.split("#### ")[-1],), f" {answer}")


def _number_score(text: str, answers: tuple[str, ...]) -> dict[str, float]:
    """The number after ####, and the last number of all, against the right one."""
    strict = _STRICT.search(text)
    numbers = ["".join(groups) for groups in _FLEXIBLE.findall(text)]
    right = {_bare(answer) for answer in answers}
    return {
        "exact_match": float(strict is not None and _bare(strict[1]) in right),
        "exact_match_flexible": float(bool(numbers) and _bare(numbers[-1]) in right),
    }


def _bare(number: str) -> str:
    return re.sub(r"\.$", "", number.strip().replace(",", "").replace("$", "").lower())


GSM8K = AnswerTask(
    name="gsm8k",
    files=("gsm8k.jsonl", "test.jsonl", "train.jsonl"),
    forms=(Form(("question", "answer"), _gsm8k),),
    score=_number_score,
    main="exact_match",
    stop=("Question:", "</s>", "<|im_end|>"),
    max_new_tokens=256,
    shots=8,
    repeated=True,
)

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(?:The |the |An |A |The |a |an )")


def _triviaqa(row: Row) -> Question:
    """Joshi et al. 2017, arXiv:1705.03551; without its documents."""
    answers = (*row["answer"]["aliases"], row["answer"]["value"])
    prompt = f"Question: {row['question']}?\nAnswer:"
    return Question(prompt, answers, f" {row['answer']['value']}")


def _closed_book(row: Row) -> Question:
    """Rows with a whole context, an answer and its aliases."""
    return Question(
        row["context"], (row["answer"], *row["aliases"]), f" {row['answer']}"
    )


def _nq(row: Row) -> Question:
    """Kwiatkowski et al. 2019; the open form of Lee et al. 2019, arXiv:1906.00300."""
    answers = row["answer"]
    answers = (answers,) if isinstance(answers, str) else tuple(answers)
    return Question(f"Q: {row['question']}?\nA:", answers, f" {answers[0]}")


def _match(text: str, answers: tuple[str, ...]) -> dict[str, float]:
    """1 for an answer, whatever its case and punctuation."""
    right = {_plain(answer) for answer in answers}
    return {"exact_match": float(_plain(text) in right)}


def _match_without_articles(text: str, answers: tuple[str, ...]) -> dict[str, float]:
    """1 for an answer, whatever its case, punctuation and articles."""
    without = tuple(_ARTICLES.sub("", answer) for answer in answers)
    return _match(_ARTICLES.sub("", text.strip()), without)


def _plain(text: str) -> str:
    return text.strip().lower().translate(_PUNCTUATION)


TRIVIAQA = AnswerTask(
    name="triviaqa",
    files=("triviaqa.jsonl", "triviaqa_sm_sub.jsonl"),
    forms=(
        Form(("context", "answer", "aliases"), _closed_book),
        Form(("question", "answer"), _triviaqa),
    ),
    score=_match,
    main="exact_match",
    stop=("\n", ".", ","),
    max_new_tokens=64,
)
NQ = AnswerTask(
    name="nq",
    files=("nq.jsonl", "nq_open.jsonl", "natural_questions_closed.jsonl"),
    forms=(
        Form(("context", "answer", "aliases"), _closed_book),
        Form(("question", "answer"), _nq),
    ),
    score=_match_without_articles,
    main="exact_match",
    stop=("\n", ".", ","),
    max_new_tokens=64,
    before="Answer these questions:\n\n",
    between="\n",
)


def rouge(text: str, answers: tuple[str, ...]) -> dict[str, float]:
    """ROUGE-1, 2, L and Lsum, F1 with stems, of the reference that fits best.

    By the package rouge-score (Lin 2004, "ROUGE: A Package for Automatic Evaluation of
    Summaries"). Its words are of a-z and 0-9 alone, so texts of other alphabets have 0.
    A line is a sentence to Lsum.

    Raises:
      UserError: the package is not installed.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise UserError(
            "summaries are scored by rouge-score, which is not installed; "
            "pip install 'mtp-jax[eval]'."
        ) from None
    names = ["rouge1", "rouge2", "rougeL", "rougeLsum"]
    scorer = RougeScorer(names, use_stemmer=True)
    found = [scorer.score(answer, text) for answer in answers]
    return {name: max(one[name].fmeasure for one in found) for name in names}


def _summary(document: str, summaries: str) -> Form[Question]:
    """Rows with a document and one summary or several, each a text or its sentences."""

    def make(row: Row) -> Question:
        text, right = row[document], row[summaries]
        text = text if isinstance(text, str) else " ".join(text)
        answers = (right,) if isinstance(right, str) else tuple(right)
        return Question(f"{text.strip()}\nTL;DR:", answers, f" {answers[0]}")

    return Form((document, summaries), make)


SUMMARIES = AnswerTask(
    name="summaries",
    files=("summaries.jsonl", "test.jsonl", "dev.jsonl"),
    forms=(
        _summary("document", "summary"),
        _summary("article", "highlights"),
        _summary("dialogue", "summary"),
        _summary("text", "summary"),
        _summary("source", "target"),
    ),
    score=rouge,
    main="rougeL",
    stop=("\n",),
    max_new_tokens=128,
)
