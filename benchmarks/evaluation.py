"""Speed of an evaluation: samples that are written, and programs that are judged.

Samples are those of a batch of 16 at temperature 0.8 and top_p 0.95, as for pass@k: by
plain decoding, with drafts, and by transformers' `generate` on the weights of trunk and
head 1. Programs are small ones, each with a judge, in sandboxes on all processors.

python -m benchmarks.evaluation --workdir=runs/quickstart
"""

import importlib.util
import sys
import time
from collections.abc import Callable
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
from mtp_jax.data.prompts import heldout_prompts
from mtp_jax.decode.decoders.sampling import Sampling
from mtp_jax.decode.generator import Generator
from mtp_jax.interop.hf_llama import llama_of
from mtp_jax.sandbox.programs import FunctionTests, Program, processors
from mtp_jax.sandbox.sandbox import Sandbox

_WARM = Sampling(temperature=0.8, top_p=0.95)


@script
def main(argv: list[str]) -> int:
    """Prints samples a second of each way to write them, and programs a second."""
    args = options(
        argv,
        "Samples a second beside transformers' generate, and programs a second.",
        rounds=5,
        workdir="runs/quickstart",
        batch_size=16,
        prompt_tokens=64,
        max_new_tokens=128,
        programs=200,
    )
    print_environment(args.rounds)
    model = restore_model(args.workdir)
    ways = _ways(model, args)
    made: dict[str, list[int]] = {name: [] for name in ways}

    def counted(name: str) -> Callable[[], None]:
        return lambda: made[name].append(ways[name]())

    seconds = interleaved({name: counted(name) for name in ways}, args.rounds)
    last = list(ways)[-1]
    per_token = {
        name: [s / n for s, n in zip(taken, made[name][1:], strict=True)]
        for name, taken in seconds.items()
    }
    rows = []
    for name, taken in per_token.items():
        speed = 1 / (float(np.median(taken)) * args.max_new_tokens)
        found = show_ratio(ratio(per_token[last], taken))
        rows.append((name, f"{speed:.2f}", found))
    print_table((f"writes {args.max_new_tokens} tokens", "samples/s", "ratio"), *rows)
    print(f"{_programs_per_s(args.programs):.1f} sandboxed programs a second on "
          f"{processors()} processors")  # fmt: skip
    return 0


def _ways(model: Restored, args: Any) -> dict[str, Callable[[], int]]:
    """Functions that write a batch and return its number of tokens."""
    generator = Generator.from_restored(model)
    prompts = heldout_prompts(
        model.config.data.sources, args.batch_size, args.prompt_tokens
    )

    def ours(decoder: str) -> Callable[[], int]:
        def write() -> int:
            results = generator.generate(
                prompts,
                max_new_tokens=args.max_new_tokens,
                decoder=decoder,
                sampling=_WARM,
            )
            return round(sum(r.tokens_per_forward * r.forwards for r in results))

        return write

    names = (
        ["plain"] if model.config.model.n_future_tokens == 1 else ["plain", "blockwise"]
    )
    ways = {name: ours(name) for name in names}
    if importlib.util.find_spec("transformers") is None:
        print("transformers is not installed: pip install '.[bench]'", file=sys.stderr)
        return ways
    return ways | {"transformers": _transformers(model, prompts, args)}


def _transformers(model: Restored, prompts: list[np.ndarray], args: Any) -> Any:
    """A function that writes the batch with transformers."""
    import torch

    params = jax.tree.map(np.asarray, model.params)
    most = args.prompt_tokens + args.max_new_tokens + 1
    llama = llama_of(model.config.model, params, most)
    begin = model.tokenizer.bos_id
    ids = torch.tensor(np.array([[begin, *prompt] for prompt in prompts]))

    def write() -> int:
        with torch.no_grad():
            out = llama.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                temperature=_WARM.temperature,
                top_p=_WARM.top_p,
                top_k=0,
                min_new_tokens=args.max_new_tokens,
                max_new_tokens=args.max_new_tokens,
                pad_token_id=model.tokenizer.eos_id,
            )
        return (out.shape[1] - ids.shape[1]) * out.shape[0]

    return write


def _programs_per_s(count: int) -> float:
    """Programs that are judged in a second."""
    tests = FunctionTests(("assert f(3) == 6", "assert f(0) == 0"), ("f",))
    programs = [Program(f"def f(x): return 2 * x  # {i}", tests) for i in range(count)]
    sandbox = Sandbox()
    began = time.perf_counter()
    verdicts = sandbox.run_all(programs)
    taken = time.perf_counter() - began
    assert all(verdict.passed for verdict in verdicts)
    return count / taken


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
