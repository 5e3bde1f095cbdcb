"""Decoders on a trained model: speed to plain's, tokens a forward pass, their quotient.

The columns of arXiv:2404.19737, tables S2 and S3. Prompts are held-out text; everything
is compiled before it is timed. Where torch and transformers are installed, plain is
compared with their `generate` on the same weights (trunk and head 1) and prompts, in
float32 with as many threads.

python -m benchmarks.decode --workdir=runs/quickstart --batch_sizes 1 4 16

Where drafts are worth least: `--shuffled=1`, prompts without any order, and
`--text=FILE`, prompts of another kind than what the model has learned.

A decoder with options is one argument, `tree:tree=FILE`.

Adaptive depth asks the heads again ever more rarely, and compiles what that takes when
it first does: `--warm=4` runs everything so often before it is timed.
"""

import importlib.util
import os
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from benchmarks.timing import (
    interleaved,
    options,
    print_environment,
    print_table,
    ratio,
    script,
    show_ratio,
)
from mtp_jax.checkpoint.restore import Restored, restore_model
from mtp_jax.cli.decoder_args import decoder_of
from mtp_jax.data.prompts import heldout_prompts
from mtp_jax.decode.decoders.state import Decoder
from mtp_jax.decode.generator import Generator
from mtp_jax.errors import UserError
from mtp_jax.interop.hf_llama import llama_of

_ADAPTIVE = "+adaptive"  # behind a decoder's name


@script
def main(argv: list[str]) -> int:
    """Prints a row for each batch size and decoder."""
    args = options(
        argv,
        "Speed of decoders to plain's, tokens a forward pass, and their quotient.",
        workdir="runs/quickstart",
        decoders=["blockwise", "blockwise" + _ADAPTIVE, "tree"],
        batch_sizes=[1, 4, 16],
        prompt_tokens=64,
        max_new_tokens=256,
        prompts=16,
        text="",
        shuffled=0,
        rounds=5,
        warm=1,
    )
    names = ("plain", *args.decoders)
    decoders = {name: decoder_of(name.removesuffix(_ADAPTIVE)) for name in names}
    restored = restore_model(args.workdir)
    prompts = _prompts(restored, args)
    print_environment(args.rounds)
    rows = []
    for size in args.batch_sizes:
        rows += _rows(restored, prompts, size, decoders, args)
    print_table(
        ("batch, decoder", "tokens/s", "speed", "tokens/forward", "quotient"), *rows
    )
    return 0


def _prompts(restored: Restored, args: Any) -> list[np.ndarray]:
    """Prompts of held-out text, or of `--text=FILE`; `--shuffled=1`: in no order."""
    if args.text:
        ids = restored.tokenizer.encode(_text_of(args.text))
        starts = np.linspace(0, len(ids) - args.prompt_tokens, args.prompts).astype(int)
        prompts = [
            np.asarray(ids[i : i + args.prompt_tokens], np.int32) for i in starts
        ]
    else:
        sources = restored.config.data.sources
        prompts = heldout_prompts(sources, args.prompts, args.prompt_tokens)
    if args.shuffled:
        rng = np.random.default_rng(0)
        prompts = [rng.permutation(prompt) for prompt in prompts]
    return prompts


def _text_of(path: str) -> str:
    try:
        return pathlib.Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--text={path} cannot be read: {error}.") from None


def _rows(
    restored: Restored,
    prompts: Sequence[np.ndarray],
    size: int,
    decoders: dict[str, Decoder],
    args: Any,
) -> list[tuple[str, ...]]:
    generator = Generator.from_restored(restored)
    found: dict[str, list[Any]] = {}

    def ours(name: str) -> Callable[[], None]:
        def run() -> None:
            found[name] = generator.generate(
                prompts,
                max_new_tokens=args.max_new_tokens,
                decoder=decoders[name],
                adaptive=name.endswith(_ADAPTIVE),
                batch_size=size,
            )

        return run

    functions = {name: ours(name) for name in decoders}
    if all(map(importlib.util.find_spec, ("torch", "transformers"))):
        functions["transformers"] = _theirs(restored, prompts, size, args)
    seconds = interleaved(functions, args.rounds, args.warm)
    rows = []
    for name, taken in seconds.items():
        speed = ratio(seconds["plain"], taken)
        made = len(prompts) * args.max_new_tokens
        figures: tuple[str, ...] = ("", "")
        if name in found:
            forwards = sum(r.forwards for r in found[name])
            made = sum(round(r.tokens_per_forward * r.forwards) for r in found[name])
            each = made / forwards
            figures = (f"{each:.2f}", f"{speed[0] / each:.3f}")
        per_s = made / float(np.median(taken))
        rows.append((f"{size}, {name}", f"{per_s:.0f}", show_ratio(speed), *figures))
    return rows


def _theirs(
    restored: Restored, prompts: Sequence[np.ndarray], size: int, args: Any
) -> Callable[[], None]:
    """The function that runs transformers' generate: greedy, cached, no end of text."""
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    positions = args.prompt_tokens + 1 + args.max_new_tokens
    params = jax.device_get(restored.params)
    llama = llama_of(restored.config.model, params, positions)
    begin = restored.tokenizer.bos_id
    ids = np.stack([[begin, *map(int, prompt)] for prompt in prompts])

    def run() -> None:
        with torch.inference_mode():
            for start in range(0, len(ids), size):
                now = torch.from_numpy(ids[start : start + size])
                llama.generate(
                    now,
                    attention_mask=torch.ones_like(now),
                    do_sample=False,
                    max_new_tokens=args.max_new_tokens,
                    pad_token_id=0,
                )

    return run


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
