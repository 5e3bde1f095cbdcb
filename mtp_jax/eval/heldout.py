"""Measuring held-out text: the verb `evaluate`, and what training calls on schedule.

Axes: B rows, S = T + N tokens of a row, N heads, V vocabulary.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from mtp_jax.checkpoint.restore import Restored, restore_model
from mtp_jax.cli.args import Parser, positive_int
from mtp_jax.config import ComputeConfig, Config, ModelConfig
from mtp_jax.data.batches import heldout_batches, open_sources
from mtp_jax.data.corpus import Corpus
from mtp_jax.data.tokenizer import Tokenizer
from mtp_jax.errors import UserError
from mtp_jax.loss.batch_loss import head_sums
from mtp_jax.loss.metrics import summarize
from mtp_jax.loss.targets import future_targets
from mtp_jax.model.language_model import model_builder
from mtp_jax.parallel.sharding import batch_shards, spec
from mtp_jax.parallel.to_devices import batch_sharding, place_rows, rows_of_process
from mtp_jax.storage import write_json


def make_evaluator(
    cfg: ModelConfig, compute: ComputeConfig, tokenizer: Tokenizer
) -> Callable[[Any, dict[str, jax.Array]], Any]:
    """`f(params, batch) -> (HeadSums, bytes)`, jitted, of a batch [1, B, S].

    `bytes`, int32, is how many bytes of text the targets of head 1 stand for.
    """
    _, build = model_builder(cfg)
    piece_bytes = np.zeros(cfg.vocab_size, np.int32)  # the model may have ids to spare
    piece_bytes[: tokenizer.vocab_size] = tokenizer.piece_bytes()

    @jax.jit
    def evaluate_batch(params: Any, batch: dict[str, jax.Array]):
        n = cfg.n_future_tokens
        batch = {name: x_1BS[0] for name, x_1BS in batch.items()}
        targets_NBT, valid_NBT = future_targets(batch["tokens"], batch["segments"], n)
        table_V = jnp.asarray(piece_bytes)
        bytes_BT = table_V.at[targets_NBT[0]].get(out_sharding=spec("batch", None))
        text_bytes = jnp.sum(jnp.where(valid_NBT[0], bytes_BT, 0))
        return head_sums(build(params), batch, compute), text_bytes

    return evaluate_batch


def measure(
    evaluator: Callable[[Any, dict[str, jax.Array]], Any],
    params: Any,
    batches: Iterable[dict[str, jax.Array]],
) -> dict[str, Any]:
    """Figures over batches, as they stand in eval.json.

    Sums are added up in float64 on the host. `bits_per_byte` counts every target of
    head 1, end-of-text included, over the bytes of the text. `accept` is
    teacher-forced: `length` is the mean length of the prefix on which heads 2..n agree
    with what head 1 will say, plus 1; `by_head[i]` the share of positions at which that
    prefix reaches head i + 2.
    """
    total, text_bytes = None, 0
    for batch in batches:
        sums, n_bytes = jax.device_get(evaluator(params, batch))
        sums = jax.tree.map(lambda x: np.asarray(x, np.float64), sums)
        total = sums if total is None else jax.tree.map(np.add, total, sums)
        text_bytes += int(n_bytes)
    if total is None:
        raise UserError("there are no held-out rows to evaluate.")
    means = {k: np.asarray(v).tolist() for k, v in summarize(total).items()}
    rows = zip(means["loss_N"], means["accuracy_N"], strict=True)
    return {
        "heads": [
            {
                "offset": i,
                "loss": loss,
                "perplexity": math.exp(min(loss, 700.0)),
                "accuracy": accuracy,
            }
            for i, (loss, accuracy) in enumerate(rows, start=1)
        ],
        "bits_per_byte": float(total.nll_N[0]) / math.log(2) / max(text_bytes, 1),
        "accept": {
            "length": means["accept_length"],
            "by_head": means["accepted_N"][1:],
        },
        "tokens": int(total.count_N[0]),
        "bytes": text_bytes,
    }


def main(argv: list[str]) -> int:
    """Runs the verb; writes eval.json into the workdir and prints a table."""
    parser = Parser("mtp-jax evaluate", "Measure a trained model on held-out text.")
    parser.add_argument("--workdir", required=True, metavar="D", help="folder of a run")
    parser.add_argument(
        "--step", type=int, metavar="S", help="which checkpoint; default: the newest"
    )
    parser.add_argument(
        "--heads", type=int, metavar="K", help="keep only the first K heads"
    )
    parser.add_argument(
        "--data",
        action="append",
        metavar="DIR",
        help="another prepared corpus instead of the run's own; may be repeated",
    )
    parser.add_argument(
        "--max_batches",
        type=positive_int,
        metavar="B",
        help="measure only so many batches, evenly spread; default: all",
    )
    args = parser.parse_args(argv)
    restored = restore_model(args.workdir, step=args.step, heads=args.heads)
    result = evaluate(restored, args.data, args.max_batches)
    path = epath.Path(args.workdir) / "eval.json"
    print(table(result))
    try:
        write_json(path, result)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}.") from error
    print(f"written to {path}")
    return 0


def evaluate(
    restored: Restored,
    directories: list[str] | None = None,
    max_batches: int | None = None,
) -> dict[str, Any]:
    """`measure` over the held-out text of the run's corpora, or of other ones."""
    cfg = restored.config
    sources = open_sources(cfg, directories, splits=["heldout"])
    for source in sources:
        if source.tokenizer.fingerprint != restored.tokenizer.fingerprint:
            raise UserError(f"{source.directory} was made with another tokenizer.")
    with jax.set_mesh(restored.mesh):
        evaluator = make_evaluator(cfg.model, ComputeConfig(), restored.tokenizer)
        batches = placed_heldout(cfg, sources, restored.mesh, max_batches)
        figures = measure(evaluator, restored.params, batches)
    return {
        "step": restored.step,
        "data": [str(source.directory) for source in sources],
        **figures,
    }


def placed_heldout(
    cfg: Config, sources: list[Corpus], mesh: jax.sharding.Mesh, limit: int | None
) -> Iterator[dict[str, jax.Array]]:
    """Held-out batches of a microbatch's rows, on the devices, [1, M, S].

    M is that of training, rounded up to what the devices of today can split.
    """
    shards = batch_shards(mesh)
    size = -(-cfg.data.batch_size // cfg.train.accumulation // shards) * shards
    cfg = dataclasses.replace(
        cfg,
        data=dataclasses.replace(cfg.data, batch_size=size),
        train=dataclasses.replace(cfg.train, accumulation=1),
    )
    sharding = batch_sharding(mesh)
    rows = rows_of_process(sharding, size)
    for batch in heldout_batches(cfg, sources, rows, limit=limit):
        yield place_rows(batch, rows, sharding, size)


def table(result: dict[str, Any]) -> str:
    """The figures for people."""
    lines = ["head  loss (nats)  perplexity  accuracy  accepted"]
    accepted = [1.0, *result["accept"]["by_head"]]
    for head, share in zip(result["heads"], accepted, strict=True):
        lines.append(
            f"{head['offset']:>4}  {head['loss']:>11.4f}  {head['perplexity']:>10.3f}"
            f"  {head['accuracy']:>8.4f}  {share:>8.4f}"
        )
    lines.append(
        f"{result['bits_per_byte']:.4f} bits per byte; accepted length "
        f"{result['accept']['length']:.3f} (teacher-forced); {result['tokens']} tokens"
    )
    return "\n".join(lines)
