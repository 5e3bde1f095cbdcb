"""Figures of a model on held-out text: loss, accuracy, bits per byte, accepted length.

Axes: B rows, S = T + N tokens of a row, N heads, V vocabulary.
"""

import dataclasses
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mtp_jax.checkpoint.restore import Restored, as_restored
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
        targets_NBT, valid_NBT = future_targets(
            batch["tokens"], batch["segments"], n, batch.get("learned")
        )
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
    """Returns the figures over batches, in JSON's types.

    Sums are added up in float64 on the host. `bits_per_byte` counts every target of
    head 1, end-of-text included, over the bytes of the text: of these batches, so
    figures of other numbers of batches differ. `accept` is teacher-forced: `length` is
    the mean length of the prefix on which heads 2..n agree with what head 1 will
    predict, right or wrong, plus 1; `by_head[i]` the share of positions at which that
    prefix reaches head i + 2. It tells how many drafts are accepted, not how good they
    are: a model that predicts one token everywhere has a length of n.

    With more than one head, `accept` also has `sampled`, for each of heads 2..n the
    probability that a draft drawn from it is accepted (the sum over the vocabulary of
    min(p, q), arXiv:2211.17192), and `sampled_length`, tokens a pass at temperature 1:
    1 plus the mean of the products of those probabilities. Teacher-forced, too: of
    texts that the model draws itself they are the decoder's.

    Args:
      evaluator: from `make_evaluator`.
      params: of the model, on the mesh.
      batches: arrays [1, B, S] on the devices.

    Raises:
      UserError: there are no batches.
    """
    total, text_bytes, n_batches = None, 0, 0
    for batch in batches:
        n_batches += 1
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
            **_sampled(means),
        },
        "batches": n_batches,
        "tokens": int(total.count_N[0]),
        "bytes": text_bytes,
    }


def _sampled(means: dict[str, Any]) -> dict[str, Any]:
    if "alpha_N" not in means:
        return {}
    return {
        "sampled": means["alpha_N"][1:],
        "sampled_length": means["sampled_length"],
    }


def evaluate(
    model: Restored | str | os.PathLike[str],
    *,
    data: Sequence[str | os.PathLike[str]] | None = None,
    max_batches: int | None = None,
) -> dict[str, Any]:
    """Measures a model on held-out text; returns the content of `eval.json`.

    Args:
      model: a restored model, or the workdir of a run.
      data: folders of prepared corpora; None for those of the run.
      max_batches: measure only so many batches, evenly spread; None for all.

    Returns:
      step, data (names of the corpora), and the figures of `measure`: for each head
      loss in nats a token, perplexity and accuracy; bits_per_byte; accept; batches;
      tokens; bytes.

    Raises:
      UserError: no such run or corpus, a corpus of another tokenizer, no held-out text.
    """
    restored = as_restored(model)
    cfg = restored.config
    directories = None if data is None else [os.fspath(name) for name in data]
    sources = heldout_sources(restored, directories)
    with jax.set_mesh(restored.mesh):
        evaluator = make_evaluator(cfg.model, ComputeConfig(), restored.tokenizer)
        batches = placed_heldout(cfg, sources, restored.mesh, max_batches)
        figures = measure(evaluator, restored.params, batches)
    return {
        "step": restored.step,
        "data": [str(source.directory) for source in sources],
        **figures,
    }


def heldout_sources(
    restored: Restored, directories: Sequence[str] | None
) -> list[Corpus]:
    """The corpora whose held-out text is measured; None for those of the run.

    Raises:
      UserError: a corpus is missing, of another tokenizer, or has no held-out text.
    """
    try:
        return open_sources(
            restored.config,
            directories,
            splits=["heldout"],
            tokenizer=restored.tokenizer.fingerprint,
        )
    except UserError as error:
        if directories is not None:
            raise
        raise UserError(
            f"{error} Held-out text of another corpus is read with --data=DIR."
        ) from None


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
