"""HumanEval, MBPP and APPS: prompts, stop strings and tests."""

import ast
import json
import warnings
from collections.abc import Sequence
from typing import Any

from mtp_jax.errors import UserError
from mtp_jax.eval.tasks.kinds import CodeTask, Form, Problem, Row
from mtp_jax.sandbox.programs import FunctionTests, Program, ScriptTests


def _humaneval(row: Row) -> Problem:
    """Chen et al. 2021, arXiv:2107.03374: complete a function from its docstring."""
    prompt, entry = row["prompt"], row["entry_point"]
    # The prompt may define helpers of the tests; the program must not replace them.
    setup = _helpers(prompt, entry)
    tests = FunctionTests((row["test"], f"check({entry})"), (entry,), setup=setup)
    return Problem(
        prompt=prompt,
        program=lambda completion: Program(prompt + completion, tests),
        reference=row.get("canonical_solution"),
        shown=row.get("canonical_solution", ""),
    )


def _helpers(prompt: str, entry: str) -> str:
    """The code of a prompt without the function that it begins."""
    before, found, _ = prompt.rpartition(f"def {entry}(")
    return before if found else prompt


HUMANEVAL = CodeTask(
    name="humaneval",
    files=("humaneval.jsonl", "HumanEval.jsonl.gz", "HumanEval.jsonl"),
    forms=(Form(("task_id", "prompt", "entry_point", "test"), _humaneval),),
    stop=("\nclass", "\ndef", "\n#", "\nif", "\nprint"),
    max_new_tokens=1024,
)


def _mbpp(row: Row) -> Problem:
    """Austin et al. 2021, arXiv:2108.07732: write a function, given three asserts.

    Code that prepares the tests stands before the program, as in the paper; that of the
    problems 367 and 927 uses a class of the program, so that nothing solves them.
    """
    text = row.get("text", row.get("prompt"))
    tests = tuple(row["test_list"])
    asked = "\n".join(tests[:3])
    code = row["code"].replace("\r\n", "\n")
    before = [*row.get("test_imports", ()), *_imports(code)]
    setup = "\n".join([*before, row.get("test_setup_code", "")])
    judged = FunctionTests(tests, _names(code, "\n".join(tests)), setup=setup)
    return Problem(
        prompt=f"You are an expert Python programmer, and here is your task: {text} "
        f"Your code should pass these tests:\n\n{asked}\n[BEGIN]\n",
        program=lambda completion: Program(completion, judged),
        reference=code,
        shown=f"{code}\n[DONE]",
    )


def _imports(code: str) -> list[str]:
    """The import statements at the top of a program."""
    found = [x for x in _parsed(code) if isinstance(x, ast.Import | ast.ImportFrom)]
    return [ast.unparse(x) for x in found]


def _names(code: str, tests: str) -> tuple[str, ...]:
    """Names that a program defines and its tests read."""
    used = {x.id for top in _parsed(tests) for x in ast.walk(top)
            if isinstance(x, ast.Name)}  # fmt: skip
    names = []
    for top in _parsed(code):
        if isinstance(top, ast.FunctionDef | ast.ClassDef):
            names.append(top.name)
        elif isinstance(top, ast.Assign):
            names += [x.id for x in top.targets if isinstance(x, ast.Name)]
    return tuple(name for name in dict.fromkeys(names) if name in used)


def _parsed(code: str) -> list[ast.stmt]:
    try:
        with warnings.catch_warnings():  # of strings in the problems
            warnings.simplefilter("ignore")
            return ast.parse(code).body
    except SyntaxError as error:
        raise UserError(f"a problem's code is not Python: {error}.") from None


def _mbpp_split(rows: Sequence[Row], shots: int) -> tuple[list[Row], list[Row]]:
    """Examples are the problems 2, 3 and 4; problems 1 to 10 are there for prompts."""
    of_id = {row["task_id"]: row for row in rows}
    chosen = [of_id[i] for i in (2, 3, 4)[:shots] if i in of_id]
    if len(chosen) < shots:
        raise UserError(
            f"mbpp shows {shots} examples, the problems with task_id 2, 3 and 4, and "
            f"the file has {len(chosen)} of them; add them, or give fewer "
            "with --shots=0."
        )
    return chosen, [row for row in rows if not 1 <= row["task_id"] <= 10]


MBPP = CodeTask(
    name="mbpp",
    files=("mbpp.jsonl", "mbpp_prompt_val_train.jsonl", "sanitized-mbpp.json"),
    forms=(
        Form(("task_id", "text", "code", "test_list"), _mbpp),
        Form(("task_id", "prompt", "code", "test_list"), _mbpp),
    ),
    stop=("[DONE]",),
    max_new_tokens=512,
    shots=3,
    split=_mbpp_split,
)


def _apps(row: Row) -> Problem:
    """Hendrycks et al. 2021, arXiv:2105.09938: whole programs, or named functions."""
    io = row["input_output"]
    io = json.loads(io) if isinstance(io, str) else io
    starter = row.get("starter_code") or ""
    called = io.get("fn_name")
    form = "Use Call-Based format" if called else "Use Standard Input format"
    start = f"\n{starter}" if starter else ""
    tests = _calls(called, io) if called else _scripts(io)
    return Problem(
        prompt=f"\nQUESTION:\n{row['question']}{start}\n{form}\nANSWER:\n",
        program=lambda completion: Program(completion, tests),
        reference=_first_solution(row),
    )


def _first_solution(row: Row) -> str | None:
    solutions = row.get("solutions") or []
    if isinstance(solutions, str):
        solutions = json.loads(solutions)
    return solutions[0] if solutions else None


def _scripts(io: dict[str, Any]) -> ScriptTests:
    """Tests by standard input and output."""
    cases = zip(io["inputs"], io["outputs"], strict=True)
    return ScriptTests(tuple((_lines(given), _lines(told)) for given, told in cases))


def _lines(text: str | list[str]) -> str:
    return text if isinstance(text, str) else "\n".join(text)


def _calls(name: str, io: dict[str, Any]) -> FunctionTests:
    """Tests by calls: a result may be right as it is, or as the first of a list."""
    setup = (
        "def plain(x):\n"
        "    return [plain(y) for y in x] if isinstance(x, (list, tuple)) else x\n"
    )
    tests = []
    for given, told in zip(io["inputs"], io["outputs"], strict=True):
        tests.append(
            f"found, told = plain(called(*{given!r})), {told!r}\n"
            "first = told[0] if isinstance(told, list) and told else told\n"
            "assert found == plain(told) or found == plain(first)"
        )
    # Many of them are methods of a class Solution.
    find = (
        "try:\n"
        f"    called = getattr(Solution(), {name!r})\n"
        "except (KeyError, NameError):\n"
        f"    called = {name}"
    )
    return FunctionTests((find, *tests), ("Solution", name), setup=setup)


APPS = CodeTask(
    name="apps",
    files=("apps.jsonl", "apps_introductory.jsonl", "test.jsonl"),
    forms=(Form(("question", "input_output"), _apps),),
    stop=("\nQUESTION", "\n---", "\nANSWER"),
    max_new_tokens=1024,
)
