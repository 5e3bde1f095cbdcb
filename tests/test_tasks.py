"""Tasks: what becomes of rows, how answers count, files that are refused."""

import gzip
import json

import pytest
from runs import SHARED
from test_sandbox import working_sandbox

from mtp_jax.errors import UserError
from mtp_jax.eval.task_data import TaskSettings, check_of_use, load_task
from mtp_jax.eval.tasks import TASKS
from mtp_jax.eval.tasks.answers import rouge
from mtp_jax.eval.tasks.rows import find_data, read_rows, task_named
from mtp_jax.sandbox.programs import ScriptTests

CHOICES = {
    "arc_easy": (
        {
            "question": "Why?",
            "choices": {"text": ["so", "no"], "label": ["A", "B"]},
            "answerKey": "B",
        },
        ("Question: Why?\nAnswer:", [" so", " no"], 1),
    ),
    "piqa": (
        {"goal": "Open it", "sol1": "pull", "sol2": "push", "label": 0},
        ("Question: Open it\nAnswer:", [" pull", " push"], 0),
    ),
    "siqa": (
        {
            "context": "Al ran.",
            "question": "Why?",
            "answerA": "a",
            "answerB": "b",
            "answerC": "c",
            "label": "3",
        },
        ("Q: Al ran. Why?\nA:", [" a", " b", " c"], 2),
    ),
    "copa": (
        {
            "premise": "It broke.",
            "question": "cause",
            "choice1": "It fell.",
            "choice2": "It stood.",
            "label": 0,
        },
        ("It broke because", [" it fell.", " it stood."], 0),
    ),
    "openbookqa": (
        {
            "question_stem": "Sun is",
            "choices": {"text": ["hot", "cold"], "label": ["A", "B"]},
            "answerKey": "A",
        },
        ("Sun is", [" hot", " cold"], 0),
    ),
    "hellaswag": (
        {
            "activity_label": "Cooking",
            "ctx_a": "A man [x] stands.",
            "ctx_b": "he",
            "endings": ["cuts [title] it.", "sings."],
            "label": "1",
        },
        ("Cooking: A man stands. He", [" cuts. it.", " sings."], 1),
    ),
}


def written(folder, rows, name="rows.jsonl"):
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def loaded(folder, task, rows, **settings):
    path = written(folder, rows)
    return load_task(TASKS[task], str(path), TaskSettings(**settings))


@pytest.mark.parametrize("task", CHOICES)
def test_rows_of_the_authors_become_the_prompts_of_the_harness(tmp_path, task):
    row, (context, continuations, gold) = CHOICES[task]

    [choice] = loaded(tmp_path, task, [row]).examples

    assert set(choice.contexts) == {context}
    assert list(choice.continuations) == continuations
    assert choice.gold == gold
    assert [n + 1 for n in choice.lengths] == [len(x) for x in continuations]


def test_winogrande_has_one_end_and_several_beginnings(tmp_path):
    row = {"sentence": "Al met Bo as _ ran.", "option1": "Al", "option2": "Bo"}

    [choice] = loaded(tmp_path, "winogrande", [row | {"answer": "2"}]).examples

    assert choice.contexts == ("Al met Bo as Al", "Al met Bo as Bo")
    assert choice.continuations == (" ran.", " ran.")
    assert choice.gold == 1


def test_rows_with_a_query_are_read_too(tmp_path):
    row = {"query": "Question: Why?\n", "choices": ["so", "no"], "gold": 1}

    [asked] = loaded(tmp_path, "piqa", [row]).examples
    [bare] = loaded(tmp_path, "openbookqa", [row | {"query": "Sun is"}]).examples

    assert asked.contexts[0] == "Question: Why?\nAnswer:"
    assert bare.contexts[0] == "Sun is"


@pytest.mark.parametrize(
    ("text", "strict", "flexible"),
    [
        (" so it is\n#### 1,234", 1, 1),
        (" #### $1234", 0, 1),
        (" the answer is 1234.", 0, 1),
        (" #### 1234.0", 0, 0),
        (" #### 7 and 1234", 0, 1),
        ("", 0, 0),
    ],
)
def test_numbers_of_grade_school_maths(text, strict, flexible):
    score = TASKS["gsm8k"].score(text, ("1,234",))

    assert score == {"exact_match": strict, "exact_match_flexible": flexible}


def test_eight_examples_stand_before_a_question_of_maths(tmp_path):
    rows = [{"question": f"q{i}", "answer": f"a\n#### {i}"} for i in range(10)]

    data = loaded(tmp_path, "gsm8k", rows)

    assert data.numbers == ["9", "10"]
    assert data.shown.startswith("Question: q0\nAnswer: a\n#### 0\n\nQuestion: q1")
    assert data.shown.endswith("Question: q7\nAnswer: a\n#### 7\n\n")
    assert data.examples[0].prompt == "Question: q8\nAnswer:"


def test_closed_books_ignore_case_punctuation_and_articles():
    match = TASKS["triviaqa"].score
    nq = TASKS["nq"].score

    assert match(" Dik-Dik!", ("dikdik",)) == {"exact_match": 1}
    assert match(" the cat", ("cat",)) == {"exact_match": 0}
    assert nq(" the cat", ("A cat",)) == {"exact_match": 1}
    assert nq(" cats", ("cat",)) == {"exact_match": 0}


def test_summaries_are_scored_by_their_words():
    pytest.importorskip("rouge_score")

    scores = rouge("the cat sat", ("the cat ran away", "a dog"))

    assert scores["rouge1"] == pytest.approx(2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4))
    assert scores["rouge2"] == pytest.approx(2 * (1 / 2) * (1 / 3) / (1 / 2 + 1 / 3))
    assert rouge("", ("the cat",))["rougeL"] == 0


def test_without_its_package_summaries_are_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "rouge_score.rouge_scorer", None)

    with pytest.raises(UserError, match=r"pip install 'mtp-jax\[eval\]'"):
        loaded(tmp_path, "summaries", [{"document": "a", "summary": "b"}])


def test_mbpp_shows_problems_2_3_4_and_leaves_out_1_to_10(tmp_path):
    rows = [
        {
            "task_id": i,
            "text": f"Write f{i}.",
            "code": f"import math\r\ndef f{i}(x):\r\n  return x",
            "test_list": [f"assert f{i}({j}) == {j}" for j in range(3)],
        }
        for i in (1, 2, 3, 4, 11, 12)
    ]

    data = loaded(tmp_path, "mbpp", rows)
    alone = loaded(tmp_path, "mbpp", rows[4:], shots=0)

    assert data.numbers == ["11", "12"]
    assert data.shown.count("[DONE]\n\n") == 3 and "f1(" not in data.shown
    program = alone.examples[0].program("def f11(x): return x")
    assert program.tests.names == ("f11",)
    assert program.tests.setup.startswith("import math")
    with pytest.raises(UserError, match="the problems with task_id 2, 3 and 4"):
        loaded(tmp_path, "mbpp", rows[4:])


def test_apps_has_scripts_and_calls(tmp_path):
    rows = [
        {
            "question": "Double it.",
            "input_output": json.dumps({"inputs": ["2\n"], "outputs": ["4\n"]}),
        },
        {
            "question": "Double it.",
            "starter_code": "class Solution:\n    def double(self, x):",
            "input_output": {"fn_name": "double", "inputs": [[2]], "outputs": [4]},
        },
    ]

    script, call = loaded(tmp_path, "apps", rows).examples

    assert script.prompt.endswith("\nUse Standard Input format\nANSWER:\n")
    assert script.program("x").tests == ScriptTests((("2\n", "4\n"),))
    assert "class Solution" in call.prompt and "Call-Based" in call.prompt
    assert call.program("x").tests.names == ("Solution", "double")


@pytest.mark.parametrize(
    ("which", "code", "passed"),
    [
        (0, "print(2 * int(input()))", True),
        (0, "print(int(input()))", False),
        (1, "class Solution:\n    def double(self, x): return 2 * x", True),
        (1, "def double(x): return [2 * x]", False),
        (1, "def double(x): return 2 * x", True),
        (1, "def other(x): return 2 * x", False),
        (2, "def pair(a, b): return (a, b)", True),  # a tuple for a list
        (2, "def pair(a, b): return [b, a]", False),
    ],
)
def test_apps_solutions_run(tmp_path, which, code, passed):
    sandbox = working_sandbox(None)
    tests = [
        {"inputs": ["2\n", "-3"], "outputs": ["4\n", "-6"]},
        {"fn_name": "double", "inputs": [[2], [3]], "outputs": [4, [6]]},
        {"fn_name": "pair", "inputs": [[1, 2]], "outputs": [[1, 2]]},
    ]
    rows = [{"question": "q", "input_output": x} for x in tests]
    problem = loaded(tmp_path, "apps", rows).examples[which]

    verdict = sandbox.run(problem.program(code))

    assert verdict.passed == passed, verdict.why


def test_files_may_be_packed_and_lists_and_have_other_line_ends(tmp_path):
    row = {"text": "a\u2028b"}
    packed = tmp_path / "rows.jsonl.gz"
    packed.write_bytes(gzip.compress(json.dumps(row, ensure_ascii=False).encode()))
    listed = tmp_path / "rows.json"
    listed.write_text(json.dumps([row, row], indent=1))
    plain = tmp_path / "book.txt"
    plain.write_text("a\nb")
    task = TASKS["bits_per_byte"]

    assert read_rows(task, packed)[1] == [row]
    assert read_rows(task, listed)[1] == [row, row]
    assert read_rows(task, plain)[1] == [{"text": "a\nb"}]


def test_data_is_found_in_folders(tmp_path):
    (tmp_path / "piqa").mkdir()
    inner = written(tmp_path / "piqa", [{}], "piqa.jsonl")

    assert find_data(TASKS["piqa"], str(tmp_path)) == inner
    outer = written(tmp_path, [{}], "arc_easy.jsonl")
    assert find_data(TASKS["arc_easy"], str(tmp_path)) == outer
    assert find_data(TASKS["copa"], str(outer)) == outer
    with pytest.raises(UserError, match="has no file of copa; it may be called copa"):
        find_data(TASKS["copa"], str(tmp_path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty; give a file with at least a row"),
        ("\n\n", "is empty"),
        ('{"goal": "a"}', "row 1 has the columns goal; piqa needs goal, sol1, sol2"),
        ("nonsense", "line 1 is not JSON"),
        ("[1]", "row 1 is not a JSON object"),
        (
            '{"goal": "a", "sol1": "b", "sol2": "c", "label": 0}\n{"goal": "a"}',
            "row 2 has no column sol1",
        ),
        (
            '{"goal": "a", "sol1": "b", "sol2": "c", "label": "x"}',
            "row 1 is not as the task needs it: ValueError",
        ),
    ],
)
def test_files_that_are_no_data_of_a_task_are_refused(tmp_path, text, message):
    path = tmp_path / "piqa.jsonl"
    path.write_text(text)

    with pytest.raises(UserError, match=message):
        load_task(TASKS["piqa"], str(path), TaskSettings())


@pytest.mark.parametrize(
    ("task", "settings", "message"),
    [
        ("apps", {"k": (2,)}, "--k=2 is more than --samples=1"),
        ("apps", {"samples": 4, "k": (1, 8)}, "--k=8 is more than --samples=4"),
        ("apps", {"samples": 4, "temperatures": (0.0,)}, "the same text 4 times"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(task, settings, message):
    with pytest.raises(UserError, match=message):
        TaskSettings(**settings).settled(TASKS[task])


def test_settings_that_no_task_uses_are_refused():
    piqa, trivia, apps = (TASKS[name] for name in ("piqa", "triviaqa", "apps"))

    check_of_use([piqa, trivia], ["shots", "limit"])
    check_of_use([piqa, trivia, apps], ["samples", "k", "decoder"])
    for tasks, name, message in [
        ([piqa], "temperatures", "--temperature is of no use to piqa"),
        ([piqa, trivia], "samples", "--samples is of no use to piqa, triviaqa"),
    ]:
        with pytest.raises(UserError, match=message):
            check_of_use(tasks, [name])
    assert TaskSettings(samples=4, k=(2,)).settled(trivia).samples == 1


def test_settings_have_the_values_of_the_papers():
    many = TaskSettings(samples=20).settled(TASKS["humaneval"])
    one = TaskSettings().settled(TASKS["humaneval"])

    assert (many.k, many.temperatures, many.top_p) == ((1, 10), (0.8,), 0.95)
    assert (one.k, one.temperatures, one.top_p) == ((1,), (0.0,), 1.0)


def test_a_task_of_ones_own_is_a_file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from mtp_jax.eval.tasks.kinds import Choice, ChoiceTask, Form\n"
        "def make(row):\n"
        "    return Choice((row['a'],) * 2, (' x', ' y'), row['g'], (1, 1))\n"
        "TASK = ChoiceTask('mine', ('mine.jsonl',), (Form(('a', 'g'), make),))\n"
    )

    assert task_named(str(path)).name == "mine"
    for text, message in [
        ("TASK = 3", "has no TASK that is one of ChoiceTask"),
        ("1 / 0", "ZeroDivisionError"),
    ]:
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            task_named(str(path))
    with pytest.raises(UserError, match="is no file"):
        task_named(str(tmp_path / "none.py"))
    with pytest.raises(UserError, match="unknown; there are humaneval, mbpp, apps"):
        task_named("humanevil")


@pytest.mark.parametrize(
    ("task", "data"),
    [(name, "evals") for name in (
        "arc_easy", "arc_challenge", "piqa", "siqa", "copa", "openbookqa", "winogrande",
        "triviaqa", "nq")] + [("gsm8k", "gsm8k"), ("mbpp", "mbpp"),
        ("humaneval", "humaneval"),
        ("bits_per_byte", "tinystories/tinystories_cased_train.jsonl")],
)  # fmt: skip
def test_real_files_are_read(task, data):
    if not (SHARED / data).exists():
        pytest.skip(f"{SHARED / data} is not there")

    found = load_task(TASKS[task], str(SHARED / data), TaskSettings())

    assert len(found.examples) == len(found.numbers) > 40
