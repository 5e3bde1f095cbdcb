"""Conversations drawn at random, and a renderer of them that shares no code."""

import json
import random

from json_tokenizers import BEGIN, TURN

WORDS = (
    *("yes", "no", "Hello", "world", "naïve", "日本語", "🙂", "x = 1", "a  b", "12345"),
    *("\n\n", "\t", "don't", "<b>", "assistant", "user:", "}", "é", "…", " "),
)
VOCABULARY = "".join(f"{word} " for word in WORDS) * 30 + "<user>\n<assistant>\n" * 30


def drawn(count, seed=0, system=True):
    """Conversations of one to four rounds, of words of several scripts."""
    draw = random.Random(seed)

    def text():
        return " ".join(draw.choices(WORDS, k=draw.randint(1, 12)))

    found = []
    for _ in range(count):
        messages = []
        if system and draw.random() < 0.3:
            messages.append({"role": "system", "content": text()})
        for _ in range(draw.randint(1, 4)):
            messages.append({"role": "user", "content": text()})
            messages.append({"role": "assistant", "content": text()})
        found.append(messages)
    return found


def parts_of(messages):
    """(text, True if the assistant says it) of `json_tokenizers.MARKED`, by hand."""
    parts = [(BEGIN, False)]
    for message in messages:
        said = message["role"] == "assistant"
        parts.append((f"<{message['role']}>\n", False))
        parts.append((f"{message['content']}{TURN}\n", said))
    return parts


def expected(messages, made, tokenizer):
    """Ids of the whole text, and which are learned, by the bytes that each stands for.

    Args:
      messages: of a conversation.
      made: the library's tokenizer.
      tokenizer: ours, of which only the sizes of pieces are used.
    """
    text = "".join(part for part, _ in parts_of(messages))
    flags = [said for part, said in parts_of(messages) for _ in part.encode()]
    ids = made.encode(text, add_special_tokens=False).ids
    sizes = tokenizer.piece_bytes()
    learned, at = [], 0
    for i in ids:
        size = int(sizes[i]) or len(made.id_to_token(i).encode())
        learned.append(any(flags[at : at + size]))
        at += size
    assert at == len(flags)
    return ids, learned


def write(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path
