"""Tokenizers as Hugging Face folders have them, made here."""

import json

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from mtp_jax.data.json_tokenizer import JsonTokenizer

BEGIN, END, TURN = "<|begin|>", "<|end|>", "<|turn|>"
SPECIALS = (BEGIN, END, TURN)
# As ChatML: the assistant's words, and the end of its turn, between marks.
MARKED = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>\n"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|turn|>\n"
    "{% endgeneration %}{% else %}{{ m.content }}<|turn|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>\n{% endif %}"
)
PLAIN = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")


def byte_level(texts, size=400):
    """A byte-level BPE with letters, digits and punctuation apart, as Llama 3's."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.ByteLevel(trim_offsets=True)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=list(SPECIALS),
        show_progress=False,
    )
    made.train_from_iterator(texts, trainer)
    return made


def with_begin(made):
    """Puts begin of text in front of every text, as Llama's files do."""
    made.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", special_tokens=[(BEGIN, made.token_to_id(BEGIN))]
    )
    return made


def sentencepiece_like(texts, size=400):
    """A BPE over characters with bytes for the others, as Llama 2's and Mistral's."""
    bytes_of = [f"<0x{b:02X}>" for b in range(256)]
    made = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<unk>", *SPECIALS, *bytes_of],
        show_progress=False,
    )
    made.train_from_iterator(texts, trainer)
    # The trainer makes special tokens of the bytes, which they are not in models.
    rules = json.loads(made.to_str())
    rules["added_tokens"] = rules["added_tokens"][: 1 + len(SPECIALS)]
    return tokenizers.Tokenizer.from_str(json.dumps(rules))


def files_of(made, template=None, **config):
    """The content of a folder's files by their names."""
    config = {"bos_token": BEGIN, "eos_token": END, **config}
    config = {key: value for key, value in config.items() if value is not None}
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    found = {
        "tokenizer.json": made.to_str().encode(),
        "tokenizer_config.json": json.dumps(config).encode(),
    }
    return found if template is None else {**found, "chat_template.jinja": template}


def loaded(made, template=None, **config):
    if template is not None:
        template = template.encode()
    return JsonTokenizer(files_of(made, template, **config), "made here")


def write(folder, made, template=None, **config):
    """Writes a folder; its path as a text."""
    folder.mkdir(parents=True, exist_ok=True)
    if template is not None:
        template = template.encode()
    for name, content in files_of(made, template, **config).items():
        (folder / name).write_bytes(content)
    return str(folder)
