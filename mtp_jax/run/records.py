"""A step and an evaluation as records for tools, and as lines for people."""

import math
from typing import Any

import jax
import numpy as np

from mtp_jax.config import Config
from mtp_jax.config.optim import GROUPS
from mtp_jax.data.packing import format_hash
from mtp_jax.errors import counted
from mtp_jax.model.flops import train_flops_per_token
from mtp_jax.parallel.chips import peak_flops
from mtp_jax.run.screen import duration
from mtp_jax.run.stopwatch import Window


def step_record(
    cfg: Config,
    step: int,
    metrics: dict[str, np.ndarray],
    window: Window,
) -> dict[str, Any]:
    """The record of a step in metrics.jsonl: figures of its own batch.

    Losses are in nats a target, before the step's update; the learning rate is the one
    it used; `tokens` counts the targets of head 1, `tokens_per_s` the positions of the
    global batch; `mfu` is there only on chips whose peak is known.
    """
    losses, accuracies = metrics["loss_N"].tolist(), metrics["accuracy_N"].tolist()
    record = {
        "step": step,
        "batch_hash": format_hash(metrics["hash"]),
        "loss": float(metrics["loss"]),
        **_numbered("loss", losses),
        **_numbered("accuracy", accuracies),
        "accept/length": float(metrics["accept_length"]),
        **_of_heads(metrics),
        "grad_norm": float(metrics["grad_norm"]),
        **_of_groups(metrics),
        "lr": float(metrics["lr"]),
        "bad_steps": int(metrics["bad_steps"]),
        "tokens": int(metrics["tokens"]),
        "tokens_per_s": cfg.data.batch_size * cfg.data.seq_len / window.step_s,
        "step_s": window.step_s,
        "data_wait_share": window.data_s / window.step_s,
    }
    utilization = mfu(cfg, window.step_s)
    return record if utilization is None else {**record, "mfu": utilization}


def _numbered(name: str, of_heads: list[float], first: int = 1) -> dict[str, float]:
    """Figures by head, without those of heads that did no work at the step."""
    rows = enumerate(of_heads[first - 1 :], first)
    idle = not all(math.isnan(x) for x in of_heads)
    return {f"{name}/head_{i}": x for i, x in rows if not (idle and math.isnan(x))}


def _of_heads(metrics: dict[str, np.ndarray]) -> dict[str, float]:
    """Figures of heads 2 to n that some runs have: acceptance, gradients, balance."""
    found: dict[str, float] = {}
    if "alpha_N" in metrics:
        found |= _numbered("accept/sampled", metrics["alpha_N"].tolist(), 2)
        found["accept/sampled_length"] = float(metrics["sampled_length"])
    names = {"cosine": "cosine_N", "norm_ratio": "ratio_N", "pull": "pull_N"}
    for name, field in names.items():
        if field in metrics:
            found |= _numbered(f"gradient/{name}", metrics[field].tolist(), 2)
    return found


def _of_groups(metrics: dict[str, np.ndarray]) -> dict[str, float]:
    """The norm of each group's gradient, and 1 where one was clipped."""
    if "clipped" not in metrics:
        return {}
    norms = {g: metrics[f"norm/{g}"] for g in GROUPS if f"norm/{g}" in metrics}
    found = {f"grad_norm/{g}": float(x) for g, x in norms.items()}
    return {**found, "clipped": float(metrics["clipped"])}


def mean_of_steps(metrics: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Means over steps of what `step_line` tells as such; skipped steps are left out.

    A step counts by its targets. Those that are not finite are told where all are.
    """
    finite = [m for m in metrics if not m["bad_steps"]] or metrics
    weights = np.array([max(int(m["tokens"]), 1) for m in finite], np.float64)
    weights /= weights.sum()
    return {
        name: np.tensordot(weights, [np.float64(m[name]) for m in finite], 1)
        for name in ("loss_N", "accept_length", "grad_norm")
    }


def step_line(
    cfg: Config, record: dict[str, Any], mean: dict[str, np.ndarray], goodput: float
) -> str:
    """The line for people about the steps since the last one, with the time left.

    Args:
      cfg: the run.
      record: of the last of the steps.
      mean: of `mean_of_steps`.
      goodput: share of the run's wall time so far that was spent in steps.
    """
    losses = mean["loss_N"]
    idle = np.isnan(losses) & np.isfinite(losses[0])  # heads that did no work
    heads = " ".join(
        "-" if waits else f"{loss:.3f}"
        for loss, waits in zip(losses, idle, strict=True)
    )
    left_s = (cfg.train.steps - record["step"]) * record["step_s"]
    parts = [
        f"step {record['step']}/{cfg.train.steps}",
        f"loss by head {heads}",
        f"heads agree {mean['accept_length']:.2f} of {cfg.model.n_future_tokens}",
        f"grad {mean['grad_norm']:.2f}",
        f"lr {record['lr']:.1e}",
        f"{record['tokens_per_s']:,.0f} tok/s",
        f"data wait {record['data_wait_share']:.0%}",
        f"goodput {goodput:.0%}",
        f"{duration(left_s)} left",
    ]
    if "mfu" in record:
        parts.insert(-2, f"mfu {record['mfu']:.1%}")
    if record["bad_steps"]:
        parts.append(f"NOT FINITE, skipped ({record['bad_steps']} in a row)")
    return "  ".join(parts)


def heldout_record(step: int, figures: dict[str, Any]) -> dict[str, Any]:
    """The record of an evaluation in heldout.jsonl, from figures of `measure`."""
    heads = figures["heads"]
    return {
        "step": step,
        **{f"loss/head_{head['offset']}": head["loss"] for head in heads},
        **{f"accuracy/head_{head['offset']}": head["accuracy"] for head in heads},
        "bits_per_byte": figures["bits_per_byte"],
        "accept/length": figures["accept"]["length"],
        **_numbered("accept", [1.0, *figures["accept"]["by_head"]], 2),
        **_sampled(figures["accept"]),
        "batches": figures["batches"],
    }


def _sampled(accept: dict[str, Any]) -> dict[str, float]:
    """Sampled acceptance, which a model of one head has none of."""
    if "sampled_length" not in accept:
        return {}
    rows = enumerate(accept["sampled"], 2)
    return {
        **{f"accept/sampled/head_{i}": x for i, x in rows},
        "accept/sampled_length": accept["sampled_length"],
    }


def heldout_line(figures: dict[str, Any], step: int) -> str:
    """The line for people about an evaluation, from figures of `measure`."""
    heads = " ".join(f"{head['loss']:.3f}" for head in figures["heads"])
    n_batches = figures["batches"]
    return (
        f"held out at step {step}: {figures['bits_per_byte']:.4f} bits per byte of "
        f"{counted(n_batches, 'batch')}, loss by head {heads}, "
        f"heads agree {figures['accept']['length']:.2f} of {len(figures['heads'])}"
    )


def straggler_line(host: str, window: dict[str, Any]) -> str:
    """The line for people about the slowest host of the window before."""
    return (
        f"slowest: {host}, {window['own_s']:.3f} s a step of its own, "
        f"{window['data_s']:.3f} s of it waiting for data"
    )


def mfu(cfg: Config, step_s: float) -> float | None:
    """Model FLOPs utilization of a step of `step_s` seconds, None on unknown chips."""
    peak = peak_flops(jax.devices()[0])
    if peak is None:
        return None
    positions = cfg.data.batch_size * cfg.data.seq_len
    flops = train_flops_per_token(cfg) * positions
    return flops / (step_s * peak * jax.device_count())
