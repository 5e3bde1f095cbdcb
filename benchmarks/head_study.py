"""Kinds of heads side by side: trained alike, at nearly equal parameters.

python -m benchmarks.head_study --workdir=runs/kinds

Each kind and seed is a run of configs/quickstart.py with heads of that kind; a run that
is done is not trained again, so the command goes on where it was stopped. Prints, over
the seeds, means and bootstrap intervals of 95 %: bits per byte of head 1 on held-out
text, the length that heads agree on true text, and tokens a forward pass of drafting on
held-out prompts, greedy (blockwise) and sampled at temperature 1 (speculative).
"""

import dataclasses
import importlib.util
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.head_kinds import KINDS
from benchmarks.timing import options, print_table, script
from mtp_jax import Generator, Sampling, evaluate, restore_model, train
from mtp_jax.config import Config, HeadsConfig, freeze
from mtp_jax.data.prompts import heldout_prompts
from mtp_jax.decode.generation import totals
from mtp_jax.model.sizes import sizes_of

# The kinds that are measured unless others are named.
USUAL = [
    name for name in KINDS if name not in ("parallel, 2 layers", "parallel, own tables")
]
FIGURES = ("bits_per_byte", "agree", "greedy", "sampled")
_QUICKSTART = pathlib.Path(__file__).parent.parent / "configs" / "quickstart.py"


@script
def main(argv: list[str]) -> int:
    """Trains what is not trained yet, and prints a row for each kind."""
    args = options(
        argv,
        "Heads of every kind, trained alike.",
        workdir="runs/kinds",
        data="data/stdlib",
        kinds=USUAL,
        seeds=[0, 1, 2],
        steps=4500,
        prompts=32,
        new_tokens=256,
    )
    rows = []
    for kind in args.kinds:
        cfg = config_of(kind, args.data, args.steps)
        found = [figures_of(cfg, kind, seed, args) for seed in args.seeds]
        rows.append(
            (
                kind,
                f"{sizes_of(cfg.model).total / 1e6:.3f}",
                *(told([row[name] for row in found]) for name in FIGURES),
            )
        )
    print_table(("heads", "M parameters", *FIGURES), *rows)
    return 0


def config_of(kind: str, data: str, steps: int) -> Config:
    """The quickstart with heads of a kind, and a trunk that keeps its size, nearly."""
    spec = importlib.util.spec_from_file_location("quickstart", _QUICKSTART)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    cfg = freeze(module.get_config())
    heads, n = HeadsConfig(**KINDS[kind]), cfg.model.n_future_tokens
    counted = heads.counted_layers(n)
    models = [
        dataclasses.replace(cfg.model, num_layers=counted + trunk, heads=heads)
        for trunk in range(1, cfg.model.num_layers + 1)
    ]
    aim = sizes_of(cfg.model).total
    model = min(models, key=lambda model: abs(sizes_of(model).total - aim))
    return dataclasses.replace(
        cfg,
        model=model,
        data=dataclasses.replace(cfg.data, sources=(data,)),
        train=dataclasses.replace(cfg.train, steps=steps),
        eval=dataclasses.replace(cfg.eval, every=0),
    )


def figures_of(cfg: Config, kind: str, seed: int, args: Any) -> dict[str, float]:
    """The figures of one run, from its file if they are there."""
    name = f"{kind.replace(', ', '-').replace(' ', '-')}-seed{seed}"
    workdir = pathlib.Path(args.workdir) / name
    file = workdir / "study.json"
    if file.exists():
        return json.loads(file.read_text())
    cfg = dataclasses.replace(
        cfg,
        train=dataclasses.replace(cfg.train, seed=seed),
        data=dataclasses.replace(cfg.data, seed=seed),
    )
    train(cfg, workdir)
    restored = restore_model(workdir)
    held_out = evaluate(restored)
    prompts = heldout_prompts(cfg.data.sources, args.prompts, 64)
    generator = Generator.from_restored(restored)

    def tokens_a_pass(decoder: str, temperature: float) -> float:
        results = generator.generate(
            prompts,
            max_new_tokens=args.new_tokens,
            decoder=decoder,
            sampling=Sampling(temperature=temperature, seed=seed),
        )
        return totals(results).tokens_per_forward

    figures = {
        "bits_per_byte": held_out["bits_per_byte"],
        "agree": held_out["accept"]["length"],
        "greedy": tokens_a_pass("blockwise", 0.0),
        "sampled": tokens_a_pass("speculative", 1.0),
    }
    file.write_text(json.dumps(figures))
    return figures


def told(values: Sequence[float]) -> str:
    """The mean and its bootstrap interval of 95 %."""
    rng = np.random.default_rng(0)
    drawn = rng.choice(np.asarray(values), (2000, len(values))).mean(axis=1)
    low, high = np.quantile(drawn, (0.025, 0.975))
    return f"{np.mean(values):.3f} ({low:.3f}..{high:.3f})"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
