"""The verb `generate`: continues prompts with a trained model."""

import argparse
import dataclasses
import json
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from mtp_jax.cli.args import (
    Parser,
    add_data,
    add_draft_cache,
    output_file,
    positive_int,
    unescape,
)
from mtp_jax.errors import UserError, counted, on_terminal


def main(argv: list[str]) -> int:
    """Prints or writes continuations; with --compare, 1 if exact decoders disagree.

    Raises:
      UserError: a flag, a prompt file, or a run directory that does not fit.
    """
    args, options = _parse(argv)

    # Not before the flags are known to be good: these import JAX.
    from mtp_jax.checkpoint import restore
    from mtp_jax.cli import decoder_args
    from mtp_jax.data.prompts import heldout_prompts
    from mtp_jax.decode.decoders.sampling import Sampling
    from mtp_jax.decode.fitting import default_decoder
    from mtp_jax.decode.generator import Generator
    from mtp_jax.decode.questions import questions_of
    from mtp_jax.reports.texts import length_warning, summary

    decoder = _decoder_from(args, options)
    sampling = Sampling(
        temperature=args.temperature, top_k=args.top_k, top_p=args.top_p,
        repetition_penalty=args.repetition_penalty, seed=args.seed,
    )  # fmt: skip
    prompts = [] if args.chat else _prompts_from(args)
    asked = _asked_from(args) if args.chat else None
    restored = restore.restore_model(args.workdir, step=args.step, heads=args.heads)
    restored = restored.with_draft_cache(args.draft_cache)
    if args.heads is None and args.decoder == "plain" and not args.compare:
        restored = restored.needed_for_one()  # the others would only take memory
    run = restored.config
    if args.heldout:
        sources = restored.with_data(args.data).config.data.sources
        prompts = heldout_prompts(sources, args.heldout, args.prompt_tokens)
    questions = None
    if asked is not None:
        questions = questions_of(asked, restored.tokenizer, system=args.system,
                                 template=args.chat_template)  # fmt: skip
        prompts = [question.prompt for question in questions]
    generator = Generator.from_restored(restored)
    if args.max_prompt_tokens is not None:
        generator.max_prompt_tokens = args.max_prompt_tokens
    settings = {
        "max_new_tokens": args.max_new_tokens,
        "stop": [unescape(text) for text in args.stop],
        "adaptive": args.adaptive,
    }
    trained = run.context
    if warning := length_warning(generator, prompts, args.max_new_tokens, trained):
        print(f"mtp-jax: {warning}", file=sys.stderr)
    if args.compare:
        settings |= {"sampling": sampling, "batch_size": args.batch_size}
        return _compare(generator, args, decoder, prompts, settings)
    if decoder is None:
        default = default_decoder(run.model.n_future_tokens)
        decoder = decoder_args.decoder_of(default)
    name = type(decoder).__name__.lower()
    settings |= {"decoder": decoder, "sampling": sampling}
    if args.output is not None:
        settings |= {"step": restored.step, "batch_size": args.batch_size}
        return _write(generator, args.output, prompts, settings, questions)
    if args.stream:
        results = [_stream(generator, prompts[0], settings)]
    else:
        results = generator.generate(prompts, batch_size=args.batch_size, **settings)
        _print(generator, results, args, questions)
    if args.html is not None:
        _write_page(args.html, generator, results, f"{args.workdir}, {name}")
    if not args.json:
        if args.html is not None:
            print(f"{args.html}: a page of which head said what")
        print(summary(name, results))
    return 0


def _decoder_from(args: argparse.Namespace, options: list[str]) -> Any:
    """The decoder that was asked for, None if none was.

    Raises:
      UserError: options without a decoder, or --adaptive for one that cannot adapt.
    """
    from mtp_jax.cli import decoder_args
    from mtp_jax.decode.fitting import needs_heads

    if args.decoder is None and options:
        raise UserError(
            f"unknown option {options[0]}; see mtp-jax generate --help, and give "
            "--decoder=NAME with what is an option of one."
        )
    decoder = args.decoder and decoder_args.decoder_of(args.decoder, options)
    adapts = not decoder or (not decoder.lossy and needs_heads(decoder))
    if args.adaptive and not (adapts or args.compare):
        raise UserError(
            f"--adaptive is for exact decoders that draft; {args.decoder} is not one."
        )
    return decoder


def _prompts_from(args: argparse.Namespace) -> Sequence[Any]:
    """Prompts of the command line or of a file; none yet with --heldout.

    Raises:
      UserError: a file that is no list of prompts, or a text that is none.
    """
    from mtp_jax.data.prompts import is_text, read_prompts

    prompts: Sequence[Any] = [] if args.prompt is None else [args.prompt]
    if args.prompts is not None:
        prompts = read_prompts(args.prompts)
    for text in [*prompts, *args.stop]:
        if not is_text(text):
            raise UserError(f"{text!r} is not valid Unicode text; give it in UTF-8.")
    if prompts == [""]:
        raise UserError("--prompt is empty; give some text to continue.")
    if args.stream and len(prompts) != 1 and args.heldout != 1:
        raise UserError("--stream shows one text as it is written; give one prompt.")
    return prompts


def _asked_from(args: argparse.Namespace) -> list[Any]:
    """Messages of the command line or of a file, each list with its tools.

    Raises:
      UserError: a file that is no list of messages, or a text that is none.
    """
    from mtp_jax.data.prompts import is_text, read_questions

    texts = (args.prompt, args.system, *args.stop)
    for text in texts:
        if text is not None and not is_text(text):
            raise UserError(f"{text!r} is not valid Unicode text; give it in UTF-8.")
    if args.prompts is not None:
        found = read_questions(args.prompts)
    else:
        found = [([{"role": "user", "content": args.prompt}], None)]
    if args.stream and len(found) != 1:
        raise UserError("--stream shows one text as it is written; give one prompt.")
    return found


def _parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The general options, and those left for the decoder."""
    parser = Parser("mtp-jax generate", "Continues prompts with a trained model.")
    parser.usage = "mtp-jax generate --workdir=D --prompt=TEXT [options]"
    add = parser.add_argument
    add("--workdir", required=True, metavar="D", help="directory of the run")
    add("--step", type=int, metavar="S", help="checkpoint; the latest if not given")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", metavar="TEXT", help="a text to continue")
    source.add_argument("--prompts", metavar="FILE",
        help="a line each, or .jsonl with `prompt`; -: stdin")  # fmt: skip
    source.add_argument("--heldout", type=positive_int, metavar="K",
        help="K held-out beginnings")  # fmt: skip
    add("--chat", action="store_true",
        help="prompts are a user's words, or .jsonl with `messages`")  # fmt: skip
    add("--system", metavar="TEXT", help="the system's message, with --chat")
    add("--chat_template", metavar="FILE", help="another one, with --chat")
    add("--prompt_tokens", type=positive_int, default=64, metavar="N",
        help="tokens of a held-out prompt (64)")  # fmt: skip
    add_data(parser)
    add("--max_prompt_tokens", type=positive_int, metavar="N",
        help="longest prompt to accept; as long as trained on")  # fmt: skip
    add("--decoder", metavar="NAME", help="blockwise, or plain if there is 1 head; its "
        "options after it, or NAME:OPTION=VALUE,...")  # fmt: skip
    add("--decoders", action=_Decoders, nargs=0, help="list them and their options")
    add("--heads", type=positive_int, metavar="K", help="use the first so many; all")
    add_draft_cache(parser)
    add("--adaptive", action="store_true", help="use as many as is fastest")
    add("--max_new_tokens", type=positive_int, default=128, metavar="N", help="(128)")
    add("--batch_size", type=positive_int, metavar="B",
        help="prompts at a time; all, with --output 16")  # fmt: skip
    add("--stop", action="append", default=[], metavar="TEXT",
        help=r"end before it; may be repeated; \n \t \\ are known")  # fmt: skip
    add("--temperature", type=float, default=0.0, metavar="X", help="0: greedy (0)")
    add("--top_k", type=int, default=0, metavar="K", help="0: the whole vocabulary (0)")
    add("--top_p", type=float, default=1.0, metavar="P", help="(1)")
    add("--repetition_penalty", type=float, default=1.0, metavar="X", help="(1)")
    add("--seed", type=int, default=0, metavar="N", help="(0)")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--compare", action="store_true",
        help="every decoder on the same prompts")  # fmt: skip
    output.add_argument("--json", action="store_true",
        help="print a JSON object a prompt, no more")  # fmt: skip
    output.add_argument("--output", metavar="FILE",
        help="JSONL; started again, it goes on from there")  # fmt: skip
    output.add_argument("--stream", action="store_true",
        help="show one text as it is written")  # fmt: skip
    add("--html", metavar="FILE", help="also a page of which head said what")
    add("--color", choices=("auto", "always", "never"), default="auto",
        help="tokens by head (auto: in a terminal)")  # fmt: skip
    args, options = parser.parse_known_args(argv)
    if args.data and not args.heldout:
        raise UserError("--data is for --heldout; give --heldout=K, too.")
    if args.chat and args.heldout:
        raise UserError("--chat is not allowed with --heldout; give prompts.")
    if not args.chat and (args.system is not None or args.chat_template is not None):
        raise UserError("--system and --chat_template are for --chat; give it, too.")
    if "" in args.stop:
        raise UserError("--stop is empty; give the text that ends a continuation.")
    if args.html is not None:
        if args.compare or args.output is not None:
            raise UserError("--html is not allowed with --compare or --output.")
        output_file("html", args.html)
    plain_text = args.compare or args.json or args.stream or args.output is not None
    if args.color == "always" and plain_text:
        raise UserError(
            "--color=always is not allowed with --compare, --json, --output, --stream."
        )
    return args, options


class _Decoders(argparse.Action):
    """Prints the decoders and ends, as --help does."""

    def __call__(self, parser, namespace, values, option_string=None):
        from mtp_jax.cli.decoder_args import description

        print(description())
        parser.exit()


def _compare(
    generator: Any,
    args: argparse.Namespace,
    decoder: Any,
    prompts: Sequence[Any],
    settings: dict[str, Any],
) -> int:
    from mtp_jax.decode.fitting import fitting
    from mtp_jax.reports.compare import compare, header, line

    fit = fitting(generator.cfg, args.heads)
    if decoder is not None:
        name = args.decoder.partition(":")[0]
        if isinstance(fit[name], str):  # why it is left out with its own options
            del fit[name]
        fit[args.decoder] = decoder
    decoders = {name: d for name, d in fit.items() if not isinstance(d, str)}
    print(header(decoders))
    differs = False
    for name, found in compare(generator, decoders, prompts, **settings):
        differs |= not isinstance(found, str) and found.differs
        print(line(name, found, decoders), flush=True)
    for name, why in fit.items():
        if isinstance(why, str):
            print(f"left out: {name} ({why})")
    return 1 if differs else 0


def _write(
    generator: Any,
    path: str,
    prompts: Sequence[Any],
    settings: dict[str, Any],
    questions: Sequence[Any] | None,
) -> int:
    from mtp_jax.reports.jsonl_output import generate_to_file

    before = generate_to_file(generator, path, prompts, questions=questions, **settings)
    print(f"{path}: {counted(len(prompts), 'text')}, {before} of them there already")
    return 0


def _stream(generator: Any, prompt: Any, settings: dict[str, Any]) -> Any:
    """Prints a text as it is written; returns its `Generation`."""
    from mtp_jax.reports.texts import ending

    writing = generator.stream(prompt, **settings)
    print(_shown(generator.prompt_text(prompt)), end="", flush=True)
    while True:
        try:
            print(_shown(next(writing)), end="", flush=True)
        except StopIteration as end:
            print(f"\n{ending(end.value)}\n")
            return end.value


def _print(
    generator: Any,
    results: Sequence[Any],
    args: argparse.Namespace,
    questions: Sequence[Any] | None,
) -> None:
    from mtp_jax.reports.texts import ending
    from mtp_jax.reports.token_view import terminal, terminal_legend

    in_terminal = on_terminal(sys.stdout) and "NO_COLOR" not in os.environ
    coloured = args.color == "always" or (args.color == "auto" and in_terminal)
    for number, result in enumerate(results):
        if args.json:
            row = dataclasses.asdict(result)
            if questions is not None:
                row |= questions[number].answered(result.text)
            print(json.dumps(row))
            continue
        shown = _shown(f"{result.prompt}{result.text}")
        if coloured:
            shown = terminal(result, generator.tokenizer)
        print(f"{shown}\n{ending(result)}\n")
    if coloured and not args.json:
        print(terminal_legend(results))


def _shown(text: str) -> str:
    """A text as it is, but for a terminal, which it must not steer."""
    from mtp_jax.reports.printable import printable

    return printable(text) if on_terminal(sys.stdout) else text


def _write_page(path: str, generator: Any, results: Sequence[Any], title: str) -> None:
    from mtp_jax.reports.token_view import page
    from mtp_jax.storage import write_atomically

    text = page(results, generator.tokenizer, title)
    try:
        write_atomically(pathlib.Path(path), text)
    except OSError as error:
        raise UserError(f"--html={path} cannot be written: {error.strerror}.") from None
