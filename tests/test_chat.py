"""Conversations as tokens: forms, templates, and what of them is learned."""

import chats
import json_tokenizers
import numpy as np
import pytest
from json_tokenizers import BEGIN, END, MARKED, PLAIN, TURN, byte_level, loaded

from mtp_jax.data.chat import encode_conversation, prompt_ids
from mtp_jax.data.chat_template import TemplateProblem, template_of
from mtp_jax.data.conversations import (
    NoConversation,
    conversation_of,
    messages_of,
)
from mtp_jax.data.sentencepiece_tokenizer import (
    SentencePieceTokenizer,
    train_sentencepiece,
)
from mtp_jax.data.tokenizer import ByteTokenizer, with_template
from mtp_jax.errors import UserError

USER = {"role": "user", "content": "hi"}
ANSWER = {"role": "assistant", "content": "Hello world"}
# With the token that the tokenizer has for it instead of a text of its own.
ENDED = MARKED.replace(TURN, "{{ eos_token }}")


@pytest.fixture(scope="module")
def made():
    return byte_level([chats.VOCABULARY])


def encoded(tokenizer, record, form=None):
    conversation = conversation_of(record, form)[1]
    template = None if conversation.texts else template_of(tokenizer)
    return encode_conversation(conversation, tokenizer, template)


@pytest.mark.parametrize("template", [MARKED, PLAIN], ids=["marked", "plain"])
def test_masks_of_a_thousand_conversations_are_those_of_another_renderer(
    made, template
):
    tokenizer = loaded(made, template)
    for messages in chats.drawn(1000):
        found = encoded(tokenizer, {"messages": messages})

        ids, learned = chats.expected(messages, made, tokenizer)
        assert found.ids.tolist() == ids, messages
        assert found.learned.tolist() == learned, messages
        assert ids.count(made.token_to_id(BEGIN)) == 1
        assert found.turn_end == made.token_to_id(TURN)


def without_the_end(found, tokenizer):
    """The error of leaving out the token that ends a turn."""
    return found.learned & (found.ids != found.turn_end)


def by_parts(messages, tokenizer):
    """The error of encoding turn by turn: other ids where turns meet."""
    parts = [(tokenizer.encode(text), said) for text, said in chats.parts_of(messages)]
    ids = np.concatenate([ids for ids, _ in parts])
    return ids, np.concatenate([np.full(len(ids), said) for ids, said in parts])


def last_answer_alone(messages, found, made, tokenizer):
    """The error of learning one answer of several."""
    before, _ = chats.expected(messages[:-1], made, tokenizer)
    return found.learned & (np.arange(len(found.ids)) >= len(before))


def test_naive_masks_are_caught(made):
    tokenizer = loaded(made, MARKED)
    caught = {"end": 0, "parts": 0, "last": 0}
    for messages in chats.drawn(200):
        found = encoded(tokenizer, {"messages": messages})
        _, learned = chats.expected(messages, made, tokenizer)
        caught["end"] += without_the_end(found, tokenizer).tolist() != learned
        ids, mask = by_parts(messages, tokenizer)
        caught["parts"] += (
            ids.tolist() != found.ids.tolist() or mask.tolist() != learned
        )
        last = last_answer_alone(messages, found, made, tokenizer)
        caught["last"] += last.tolist() != learned
    assert caught["end"] == 200 and caught["last"] > 100 and caught["parts"] > 10


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_other_tokenizers_have_special_tokens_in_templates_too(kind):
    model = train_sentencepiece(iter([chats.VOCABULARY]), 340)
    tokenizer = ByteTokenizer()
    if kind == "sentencepiece":
        tokenizer = SentencePieceTokenizer(model, "m")
    tokenizer = with_template(tokenizer, ENDED)
    for messages in chats.drawn(50):
        found = encoded(tokenizer, {"messages": messages})

        said = [m["content"] + "\n" for m in messages if m["role"] == "assistant"]
        assert tokenizer.decode(found.ids[found.learned]) == "".join(said)
        assert found.ids.tolist().count(tokenizer.bos_id) == 1
        assert found.ids[0] == tokenizer.bos_id
        assert (found.ids == tokenizer.eos_id).sum() == len(messages)
        ends = found.learned[found.ids == tokenizer.eos_id]
        assert ends.tolist() == [m["role"] == "assistant" for m in messages]


def forms():
    """Records of the same conversation, by form."""
    return {
        "messages": {"messages": [USER, ANSWER]},
        "sharegpt": {
            "conversations": [
                {"from": "human", "value": "hi"},
                {"from": "gpt", "value": "Hello world"},
            ]
        },
        "alpaca": {"instruction": "hi", "input": "", "output": "Hello world"},
        "prompt_completion": {"prompt": [USER], "completion": [ANSWER]},
    }


@pytest.mark.parametrize("form", forms())
def test_forms_are_found_and_mean_the_same(made, form):
    tokenizer = loaded(made, MARKED)
    name, _ = conversation_of(forms()[form])
    found = encoded(tokenizer, forms()[form])

    assert name == form
    ids, learned = chats.expected([USER, ANSWER], made, tokenizer)
    assert (found.ids.tolist(), found.learned.tolist()) == (ids, learned)


def test_fields_of_each_form_become_messages():
    call = '{"name": "f", "arguments": {"x": 1}}'
    turns = [("system", "S"), ("human", "q"), ("function_call", call),
             ("observation", "1"), ("gpt", "a")]  # fmt: skip
    record = {"conversations": [{"from": a, "value": b} for a, b in turns],
              "tools": '[{"name": "f"}]'}  # fmt: skip
    _, found = conversation_of(record)
    assert [m["role"] for m in found.messages] == [
        "system", "user", "assistant", "tool", "assistant",
    ]  # fmt: skip
    [tool_call] = found.messages[2]["tool_calls"]
    assert tool_call["function"] == {"name": "f", "arguments": {"x": 1}}
    assert found.tools == ({"name": "f"},)

    record = {"instruction": "do", "input": "this", "output": "done", "system": "S",
              "history": [["q", "a"]]}  # fmt: skip
    _, found = conversation_of(record)
    assert [m["content"] for m in found.messages] == ["S", "q", "a", "do\nthis", "done"]


def test_a_prompt_and_its_completion_stay_as_they_are(made):
    framed = loaded(json_tokenizers.with_begin(byte_level([chats.VOCABULARY])))
    found = encoded(framed, {"prompt": "Hello ", "completion": "world yes"})

    begin, end = framed.bos_id, framed.eos_id
    plain = framed.encode("Hello world yes").tolist()
    assert found.ids.tolist() == [begin, *plain, end]
    assert framed.decode(found.ids[found.learned]).strip() == "world yes"
    assert found.learned[-1] and not found.learned[0]


def test_a_continuation_that_was_generated_is_a_completion(made):
    tokenizer = loaded(made)
    row = {"prompt": "Hello ", "text": "world", "tokens": [1], "finish": "eos"}
    name, _ = conversation_of(row)
    assert name == "prompt_completion"
    ended = encoded(tokenizer, row)
    cut = encoded(tokenizer, {**row, "finish": "length"})
    assert ended.ids.tolist() == [*cut.ids.tolist(), tokenizer.eos_id]
    assert tokenizer.decode(cut.ids[cut.learned]).strip() == "world"
    assert (ended.turn_end, cut.turn_end) == (tokenizer.eos_id, None)


def test_completions_of_messages_alone_are_learned(made):
    tokenizer = loaded(made, MARKED)
    record = {"prompt": [USER, ANSWER, USER], "completion": [ANSWER]}
    for template in (MARKED, PLAIN):
        found = encoded(loaded(made, template), record)
        whole, _ = chats.expected([*record["prompt"], ANSWER], made, tokenizer)
        assert found.ids.tolist() == whole
        first = [*record["prompt"], {"role": "assistant", "content": ""}]
        begin = len(chats.expected(first, made, tokenizer)[0]) - 2  # the end of a turn
        assert found.learned.tolist() == [i >= begin for i in range(len(whole))]


@pytest.mark.parametrize("template", [MARKED, PLAIN], ids=["marked", "plain"])
def test_an_answer_that_was_cut_off_has_no_end(made, template):
    tokenizer = loaded(made, template)
    record = {"messages": [USER, ANSWER], "finish": "length"}
    found = encoded(tokenizer, record)
    whole = encoded(tokenizer, {"messages": [USER, ANSWER]})

    kept = len(found.ids)
    assert found.ids.tolist() == whole.ids[:kept].tolist()
    assert found.learned.tolist() == whole.learned[:kept].tolist()
    assert tokenizer.decode(found.ids[found.learned]) == "Hello world"
    assert found.turn_end is None and whole.turn_end is not None


@pytest.mark.parametrize(
    ("record", "kind", "message"),
    [
        ({"text": "a"}, "of no known form", "it has text"),
        ({"messages": [USER]}, "without an answer", "nothing to learn"),
        ({"messages": []}, "without an answer", "nothing to learn"),
        ({"messages": [{"role": "user"}]}, "damaged", "user without text"),
        ({"messages": ["hi"]}, "damaged", "without a role"),
        ({"conversations": [{"from": "me", "value": "x"}]}, "damaged", "from 'me'"),
        ({"conversations": [1]}, "damaged", "without from and value"),
        ({"instruction": 1, "output": "x"}, "damaged", "'instruction'"),
        ({"prompt": "a", "completion": ""}, "without an answer", "empty completion"),
        ({"prompt": "a", "completion": [ANSWER]}, "damaged", "not both"),
        ({"messages": [USER, ANSWER], "tools": "{"}, "damaged", "not a list"),
    ],
)
def test_records_without_a_conversation_are_refused(record, kind, message):
    with pytest.raises(NoConversation, match=message) as found:
        conversation_of(record)
    assert found.value.kind == kind


def test_a_form_that_is_named_is_the_one_that_counts(made):
    record = {**forms()["alpaca"], "messages": [USER, ANSWER]}
    assert conversation_of(record)[0] == "messages"
    assert conversation_of(record, "alpaca")[0] == "alpaca"
    with pytest.raises(NoConversation, match="not of the form sharegpt"):
        conversation_of(record, "sharegpt")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no system') }}", "refused by .*: no system"),
        ("{{ messages[7].content }}", "undefined|no element 7"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% for m in messages %}{{ loop.last }}{{ m.content }}{% endfor %}",
         "otherwise than the whole"),
        (f"{{{{ bos_token }}}}{{{{ bos_token }}}}{MARKED[15:]}", "two begins of text"),
    ],
)  # fmt: skip
def test_templates_that_do_not_fit_are_refused(made, template, message):
    with pytest.raises(NoConversation, match=message):
        encoded(loaded(made, template), {"messages": [USER, ANSWER]})


def test_an_end_of_the_whole_conversation_is_no_end_of_a_turn(made):
    """As Phi-3's template has it: one more token after the last turn alone."""
    closed = PLAIN + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"
    tokenizer = loaded(made, closed)
    for messages in chats.drawn(50):
        found = encoded(tokenizer, {"messages": messages})
        ids, learned = chats.expected(messages, made, tokenizer)
        assert found.ids.tolist() == [*ids, tokenizer.eos_id]
        assert found.learned.tolist() == [*learned, True]


def test_marks_of_places_in_a_message_are_refused(made):
    bad = {"role": "user", "content": "\ufdd0"}
    with pytest.raises(NoConversation, match="U\\+FDD0"):
        encoded(loaded(made, MARKED), {"messages": [bad, ANSWER]})


@pytest.mark.parametrize(
    "record", [{"messages": [{**USER, "content": "\ud800"}, ANSWER]},
               {"prompt": "\udfff", "completion": "x"}],
)  # fmt: skip
def test_half_a_surrogate_pair_is_refused(made, record):
    with pytest.raises(NoConversation, match="half of a surrogate pair"):
        encoded(loaded(made, MARKED), record)


def test_no_template_and_one_that_is_no_jinja_are_refused(made):
    with pytest.raises(UserError, match="made here has no chat template; give"):
        template_of(loaded(made))
    with pytest.raises(UserError, match="template of made here is not Jinja"):
        template_of(loaded(made, "{% if %}"))


def test_a_template_of_the_configuration_counts_where_there_is_no_file(made):
    several = [
        {"name": "tool_use", "template": "x"},
        {"name": "default", "template": "d"},
    ]
    assert loaded(made, chat_template="c").chat_template == "c"
    assert loaded(made, chat_template=several).chat_template == "d"
    assert loaded(made, "f", chat_template="c").chat_template == "f"


def test_a_question_ends_where_the_answer_begins(made):
    tokenizer = loaded(made, MARKED)
    messages, tools = messages_of({"messages": [USER, ANSWER, USER, ANSWER]})
    found = prompt_ids(messages, tools, tokenizer, template_of(tokenizer))

    whole = encoded(tokenizer, {"messages": [USER, ANSWER, USER, ANSWER]})
    assert messages == [USER, ANSWER, USER] and tools is None
    assert found.tolist() == whole.ids[: len(found)].tolist()
    assert whole.learned[len(found) :].all()
    asked, _ = messages_of({"prompt": "hi"})
    assert asked == [USER]
    with pytest.raises(NoConversation, match="no message to answer"):
        messages_of({"messages": [ANSWER]})
    with pytest.raises(TemplateProblem, match="writes nothing"):
        prompt_ids([USER], None, tokenizer, template_of(loaded(made, "{{ x }}")))


def test_content_in_parts_and_empty_fields_are_read_as_text(made):
    tokenizer = loaded(made, MARKED)
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    record = {"messages": [{"role": "user", "content": parts, "name": None}, ANSWER]}
    plain = encoded(tokenizer, {"messages": [USER, ANSWER]})
    assert encoded(tokenizer, record).ids.tolist() == plain.ids.tolist()
    assert END not in encoded(tokenizer, record).text
    of_parts = MARKED.replace("{{ m.content }}", "{{ m.content[0].text }}")
    taken = encoded(loaded(made, of_parts), {
        "messages": [{**m, "content": [{"type": "text", "text": m["content"]}]}
                     for m in (USER, ANSWER)]
    })  # fmt: skip
    assert taken.text == plain.text
