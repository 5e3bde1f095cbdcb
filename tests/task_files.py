"""Small files of tasks."""

import json

WORDS = ("def", "class", "import", "return", "while")


def task_files(folder):
    """A folder with a file of each of a few tasks."""
    folder.mkdir()
    rows = {
        "piqa": [
            {"goal": f"{w} it", "sol1": w, "sol2": w[::-1] + "xy", "label": i % 2}
            for i, w in enumerate(WORDS)
        ],
        "mbpp": [
            {
                "task_id": 11 + i,
                "text": f"Write {w}_it.",
                "code": f"def {w}_it(x): return x",
                "test_list": [f"assert {w}_it(1) == 1"],
            }
            for i, w in enumerate(WORDS)
        ],
        "triviaqa": [
            {"context": f"{w}?", "answer": w, "aliases": [w.upper()]} for w in WORDS
        ],
        "text": [{"text": f"{w} " * (1 + 9 * i)} for i, w in enumerate(WORDS)],
    }
    for name, of_task in rows.items():
        text = "".join(json.dumps(row) + "\n" for row in of_task)
        (folder / f"{name}.jsonl").write_text(text)
    return folder
