"""Questions that a chat model asks itself (Magpie, arXiv:2406.08464, section 2.1).

python launch/own_questions.py begin WORKDIR COUNT > begin.jsonl
python -m mtp_jax generate --workdir=WORKDIR --prompts=begin.jsonl --stop='\\n' \\
    --temperature=0.8 --max_new_tokens=48 --output=users.jsonl
python launch/own_questions.py keep users.jsonl > questions.jsonl

A chat model that gets its template up to where a user speaks goes on with what a user
may say. `begin` writes that prompt COUNT times, for as many draws; `keep` takes, once
each, what came to an end as a turn of three words or more, for `generate --chat`.
"""

import json
import sys

from mtp_jax.data.chat_template import TemplateProblem, template_of
from mtp_jax.data.tokenizer import load_tokenizer
from mtp_jax.errors import UserError

_PLACE = "a place for words"
_WORDS = 3  # of a question, at the least


def beginning(workdir: str) -> str:
    """The text of a conversation up to the first words of a user.

    Raises:
      UserError: the tokenizer cannot be read, is no tokenizer.json, whose special
        tokens can be written out in a prompt, or has no template that takes a message.
    """
    tokenizer = load_tokenizer(workdir)
    if tokenizer.kind != "tokenizer.json":
        raise UserError(f"{workdir} has no tokenizer.json, and only that has turns.")
    try:
        message = {"role": "user", "content": _PLACE}
        text = template_of(tokenizer).render([message]).text
    except TemplateProblem as error:
        raise UserError(f"the chat template refuses a question: {error}.") from None
    if _PLACE not in text:
        raise UserError("the chat template leaves out what users say.")
    return text[: text.index(_PLACE)]


def kept(lines: list[str]) -> list[str]:
    """Questions, each once, of lines that `generate --output` wrote."""
    found: dict[str, None] = {}
    for line in lines:
        written = json.loads(line)
        text = written["text"].strip()
        if written["finish"] == "eos" and len(text.split()) >= _WORDS:
            found[text] = None
    return list(found)


def main(argv: list[str]) -> int:
    """Prints lines of JSON; bad input is one line, and 2."""
    try:
        if len(argv) == 3 and argv[0] == "begin" and argv[2].isdecimal():
            line = json.dumps({"prompt": beginning(argv[1])})
            print("\n".join([line] * int(argv[2])))
        elif len(argv) == 2 and argv[0] == "keep":
            with open(argv[1], encoding="utf-8") as file:
                texts = kept(file.readlines())
            if not texts:
                raise UserError(f"{argv[1]} has no question; draw more of them.")
            for text in texts:
                message = {"role": "user", "content": text}
                print(json.dumps({"messages": [message]}))
        else:
            raise UserError("give `begin WORKDIR COUNT` or `keep FILE`.")
    except UserError as error:
        print(f"own_questions: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
