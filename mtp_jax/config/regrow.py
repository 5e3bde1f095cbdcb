"""Configs of models with more, fewer or other heads than one that is there.

Head 1 stays as it is: `mtp_jax.model.regrow` moves its weights.
"""

import dataclasses
import json
import os
from typing import Any

from ml_collections import ConfigDict

from mtp_jax.config.formats import config_from_json
from mtp_jax.config.heads import HeadsConfig
from mtp_jax.config.model import ModelConfig
from mtp_jax.config.section_tree import as_tree, fields_of
from mtp_jax.config.sections import Config
from mtp_jax.errors import UserError, counted
from mtp_jax.storage import run_at, where_runs_are


def regrown_config(before: ModelConfig, n: int, heads: HeadsConfig) -> ModelConfig:
    """The model with n heads of a section `heads`, on the path of head 1 as it is.

    Raises:
      UserError: heads of two kinds differ, and there are several to keep; or the path
        of head 1 has fewer layers than the heads need.
    """
    path = _path_layers(before)
    if n < 1:
        raise UserError(f"--heads={n}: a model has at least 1.")
    _refuse_other_heads(before, n, heads)
    on_path = heads.layers if heads.wiring.first and heads.wiring.layered else 0
    if heads.wiring.reads == "after":
        on_path *= n
    if on_path >= path:
        raise UserError(
            f"{n} {heads.kind} heads of {counted(heads.layers, 'layer')} each need "
            f"{on_path} of the {path} layers that compute head 1, and the trunk needs "
            "one; give fewer heads or layers."
        )
    layers = path - on_path + heads.counted_layers(n)
    layer = dataclasses.replace(
        before.layer, windows=_windows(before, path - on_path, heads)
    )
    return dataclasses.replace(
        before, num_layers=layers, n_future_tokens=n, heads=heads, layer=layer
    )


def _windows(before: ModelConfig, trunk: int, heads: HeadsConfig) -> tuple[int, ...]:
    """Windows of a model of the same layers, of which the first `trunk` are its trunk.

    Raises:
      UserError: layers of different windows would be heads, which have one for all.
    """
    if len(before.layer.windows) <= 1:
        return before.layer.windows
    of_heads = [before.heads_window] * layers_on_path(before)
    path = (*before.trunk_windows, *of_heads)
    if len(set(path[trunk:])) > 1:
        raise UserError(
            f"heads would be layers with windows of {path[trunk:]}, and "
            "config.layer.windows has one for all heads; give fewer heads or layers."
        )
    return (*path[:trunk], *(path[-1:] if heads.wiring.layered else ()))


def grown_tree(workdir: str | os.PathLike[str], n: int, **heads: Any) -> ConfigDict:
    """The config of a run, to be edited, for a run that begins with its model.

    `config.init` names the workdir. Heads that are new have gains of their own, if
    `heads` does not say otherwise.

    Args:
      workdir: of the run.
      n: heads of the new one.
      heads: fields of `config.heads` that differ.

    Raises:
      UserError: no run is there, an unknown field, or heads that cannot be.
    """
    before = config_of(workdir)
    tree = as_tree(before)
    tree["heads"] |= {"norm": "own"} if n > before.model.n_future_tokens == 1 else {}
    for name, value in heads.items():
        if name not in tree["heads"]:
            raise UserError(f"config.heads.{name} is not a field; see docs/heads.md.")
        tree["heads"][name] = value
    tree = regrown_tree(before, n, tree)
    tree["init"]["workdir"] = os.fspath(workdir)
    return ConfigDict(tree).lock()


def regrown_tree(
    before: Config, n: int, tree: dict[str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """The sections of a config, with a model of n heads of its section `heads`.

    Raises:
      UserError: heads that cannot be, or another model besides its heads.
    """
    was, free = as_tree(before), ("n_future_tokens", "num_layers", "windows", "context")
    for section in ("model", "layer", "rope"):
        for name, value in tree[section].items():
            if value != was[section][name] and name not in free:
                raise UserError(
                    f"config.{section}.{name} is {value}, and the model has "
                    f"{was[section][name]}; only config.heads can become another."
                )
    heads = HeadsConfig(**tree["heads"])
    model = regrown_config(before.model, n, heads)
    numbers = {"n_future_tokens": n, "num_layers": model.num_layers}
    found = {**tree, "model": {**tree["model"], **numbers}}
    found["layer"] = {**tree["layer"], "windows": model.layer.windows}
    if tree["loss"] == as_tree(before)["loss"]:
        loss = before.loss.without_lists(n)
        found["loss"] = {
            field.name: getattr(loss, field.name) for field in fields_of(loss)
        }
    return found


def config_of(workdir: str | os.PathLike[str]) -> Config:
    """The config with which the run of a workdir was last started.

    Raises:
      UserError: no run is there.
    """
    folder, _ = run_at(os.fspath(workdir))
    path = folder / "run.json"
    try:
        written = json.loads(path.read_text(encoding="utf-8"))["config"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{workdir} holds no run; {where_runs_are(folder)}.") from None
    return config_from_json(written, str(path))


def _refuse_other_heads(before: ModelConfig, n: int, heads: HeadsConfig) -> None:
    """Raises UserError if heads to keep are of another make than those asked for."""
    if before.n_future_tokens == 1 or n == 1:
        return
    for name in ("kind", "layers", "shared", "hidden", "concat", "markov_rank"):
        was, now = getattr(before.heads, name), getattr(heads, name)
        if was != now:
            raise UserError(
                f"config.heads.{name} is {now}, and the model has "
                f"{before.n_future_tokens} heads with {was}; make it a model of one "
                "head first (--heads=1), or leave it."
            )
    for name in ("norm", "unembedding"):
        if getattr(before.heads, name) == "own" and getattr(heads, name) == "shared":
            raise UserError(
                f"config.heads.{name} is shared, and the model's "
                f"{before.n_future_tokens} heads have their own; leave it own."
            )


def _path_layers(cfg: ModelConfig) -> int:
    """The number of layers on the way to head 1."""
    return cfg.num_trunk_layers + layers_on_path(cfg)


def layers_on_path(cfg: ModelConfig) -> int:
    """How many of the layers on the way to head 1 belong to heads."""
    heads, wiring = cfg.heads, cfg.heads.wiring
    if not (wiring.first and wiring.layered):
        return 0
    if heads.shared:
        return heads.layers
    return heads.layers * (cfg.n_future_tokens if wiring.reads == "after" else 1)
