"""Chats as transformers renders them: real templates, ids, and what is learned.

The templates are those that trl trains with, and the ones that they are made of.
"""

import importlib.util
import itertools
import pathlib

import chats
import json_tokenizers
import pytest
from json_tokenizers import BEGIN, END, MARKED, PLAIN
from test_json_tokenizer import gpt2

from mtp_jax.data.chat import encode_conversation, prompt_ids
from mtp_jax.data.chat_template import TemplateProblem, template_of
from mtp_jax.data.conversations import NoConversation, conversation_of
from mtp_jax.data.json_tokenizer import JsonTokenizer
from mtp_jax.data.tokenizer import load_tokenizer

pytestmark = pytest.mark.packages

CONVERSATIONS = 1000


def trl_templates():
    """Templates of trl by name; none where it is not installed."""
    found = importlib.util.find_spec("trl")
    if found is None or found.origin is None:
        return {}
    folder = pathlib.Path(found.origin).parent / "chat_templates"
    return {path.stem: path.read_text() for path in sorted(folder.glob("*.jinja"))}


TEMPLATES = {"marked": MARKED, "plain": PLAIN, **trl_templates()}
TRAINING = [name for name in TEMPLATES if name.endswith("_training")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """GPT-2's vocabulary with the special tokens of those templates."""
    made = gpt2()
    made.add_special_tokens(
        ["<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|start_header_id|>",
         "<|end_header_id|>", "<start_of_turn>", "<end_of_turn>", "<think>", "</think>"]
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("tokenizer")
    return json_tokenizers.write(folder, made, pad_token=END)


def theirs_of(folder, template):
    transformers = pytest.importorskip("transformers")
    found = transformers.AutoTokenizer.from_pretrained(folder)
    found.chat_template = template
    return found


def ours_of(folder, template):
    files = dict(load_tokenizer(folder).files)
    return JsonTokenizer({**files, "chat_template.jinja": template.encode()}, "ours")


def in_parts(messages):
    """The messages with their content as a list of one text."""
    return [
        {**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages
    ]


def outcome(function, *errors):
    """What a function gives, or None if it refuses."""
    try:
        return function()
    except errors:
        return None


def compare(folder, template, conversations):
    """Compares ids and masks; returns how many both took."""
    import jinja2

    theirs, ours = theirs_of(folder, template), ours_of(folder, template)
    compiled = template_of(ours)
    took = 0
    for messages in conversations:
        expected = outcome(
            lambda m=messages: theirs.apply_chat_template(
                m, return_dict=True, return_assistant_tokens_mask=True
            ),
            jinja2.TemplateError, TypeError, KeyError,
        )  # fmt: skip
        conversation = conversation_of({"messages": messages})[1]
        found = outcome(
            lambda c=conversation: encode_conversation(c, ours, compiled),
            NoConversation,
        )
        if expected is None:
            assert found is None
            continue
        if not any(expected["assistant_masks"]):
            continue
        assert found is not None
        assert found.ids.tolist() == expected["input_ids"]
        assert found.learned.tolist() == [bool(x) for x in expected["assistant_masks"]]
        took += 1
    return took


def test_masks_of_a_thousand_conversations_are_those_of_transformers(folder):
    assert compare(folder, MARKED, chats.drawn(CONVERSATIONS)) == CONVERSATIONS


@pytest.mark.parametrize("name", TRAINING or ["none"])
def test_masks_of_templates_that_others_train_with_are_theirs(folder, name):
    if name == "none":
        pytest.skip("trl is not installed")
    some = [*chats.drawn(30, seed=1, system=False), *chats.drawn(30, seed=2)]
    took = compare(folder, TEMPLATES[name], some)
    if not took:  # a template for images, which takes lists of texts alone
        took = compare(folder, TEMPLATES[name], list(map(in_parts, some)))
    assert took >= 20


@pytest.mark.parametrize("name", TEMPLATES)
def test_prompts_are_those_of_transformers(folder, name):
    import jinja2

    theirs = theirs_of(folder, TEMPLATES[name])
    ours = ours_of(folder, TEMPLATES[name])
    compiled, took = template_of(ours), 0
    several = chats.drawn(20, seed=3)
    # Other templates would write a list as Python does; ours gets a text there.
    if "image" in TEMPLATES[name] or "'content'] is string" in TEMPLATES[name]:
        several += [in_parts(messages) for messages in several[:5]]
    for messages in several:
        asked = messages[:-1]
        expected = outcome(
            lambda m=asked: theirs.apply_chat_template(
                m, add_generation_prompt=True, return_dict=True
            )["input_ids"],
            jinja2.TemplateError, TypeError, KeyError,
        )  # fmt: skip
        found = outcome(
            lambda m=asked: prompt_ids(m, None, ours, compiled), TemplateProblem
        )
        assert (None if found is None else found.tolist()) == expected
        took += expected is not None
    assert took


@pytest.mark.parametrize("name", ["llama3", "phi3", "gemma", "cohere"])
def test_templates_without_marks_give_the_masks_of_those_with_them(folder, name):
    """Of pairs whose marks begin where `add_generation_prompt` ends."""
    if name not in TEMPLATES:
        pytest.skip("trl is not installed")
    pair = [ours_of(folder, TEMPLATES[name + end]) for end in ("", "_training")]
    templates = [template_of(ours) for ours in pair]
    assert [template.marked for template in templates] == [False, True]
    for messages in chats.drawn(20, seed=4, system=False):
        conversation = conversation_of({"messages": messages})[1]
        plain, marked = (
            encode_conversation(conversation, ours, template)
            for ours, template in zip(pair, templates, strict=True)
        )
        assert plain.ids.tolist() == marked.ids.tolist()
        assert not (marked.learned & ~plain.learned).any()
        # Marks may leave out the line feed after the end of a turn.
        more = plain.ids[plain.learned & ~marked.learned]
        assert set(pair[0].decode(more)) <= {"\n"}


def test_begin_of_text_stands_once_where_the_template_writes_it(folder):
    ours = ours_of(folder, MARKED)
    for messages in itertools.islice(chats.drawn(20), 20):
        found = prompt_ids(messages[:-1], None, ours, template_of(ours))
        assert found.tolist().count(ours.bos_id) == 1
        assert ours.text_of(int(found[0])) == BEGIN
