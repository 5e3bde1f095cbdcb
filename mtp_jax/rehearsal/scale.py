"""Scales a production config down to a model that a laptop trains in a blink.

The structure stays: which mesh axes there are, the number of heads, grouped queries,
accumulation, the mixture, precision, how the loss is computed. Sizes shrink.
"""

import dataclasses
import math
from collections.abc import Sequence

from mtp_jax.config import (
    Config,
    InitConfig,
    LayerConfig,
    MeshConfig,
    ModelConfig,
    as_tree,
)
from mtp_jax.errors import UserError

_TRUNK_LAYERS = 1
_SEQ_LEN = 32
_D_HEAD = 8
_STEPS = 1_000_000  # more than any rehearsal takes
_SAVE_EVERY = 5


def scaled_mesh(mesh: MeshConfig, devices: int) -> MeshConfig:
    """A mesh with the axes of a larger one: those of size 1 keep it.

    Each axis that splits something gets 2 as long as that divides the devices; the
    rest goes to the axis of -1, or to the largest.
    """
    wanted = dataclasses.asdict(mesh)
    split = [name for name, size in wanted.items() if size != 1] or ["fsdp"]
    rest = max(split, key=lambda name: math.inf if wanted[name] < 0 else wanted[name])
    sizes = dict.fromkeys(wanted, 1)
    for name in split:
        if name != rest and devices % 2 == 0 and wanted[name] % 2 == 0:
            sizes[name] = 2
            devices //= 2
    sizes[rest] = devices
    return MeshConfig(**sizes)


def scale_down(
    cfg: Config, sources: Sequence[str], vocab_size: int, device_counts: Sequence[int]
) -> Config:
    """Makes the config of a rehearsal.

    Args:
      cfg: the production run.
      sources: corpora to read, as many as the config has.
      vocab_size: ids of their tokenizer.
      device_counts: devices of all hosts together, for each number of hosts on which
        the rehearsal trains; arrays must split evenly over each of them.

    Raises:
      UserError: no small model splits evenly over that many devices.
    """
    shapes = [dataclasses.asdict(scaled_mesh(cfg.mesh, n)) for n in device_counts]
    tensor = math.lcm(*(shape["tensor"] for shape in shapes))
    logits = math.lcm(*(shape["tensor"] * shape["vocab"] for shape in shapes))
    # Whatever else an array is split over, each size below is a multiple of it.
    shards = math.lcm(*(math.prod(x.values()) // x["tensor"] for x in shapes))
    if shards > 64 or tensor > 16:
        raise UserError(
            f"a rehearsal over {' and '.join(map(str, device_counts))} devices is too "
            "large for one machine; give fewer --hosts or --devices-per-host."
        )
    model = cfg.model
    kv_heads = math.lcm(tensor, min(model.num_kv_heads, 2))
    queries = kv_heads * min(model.num_query_heads // model.num_kv_heads, 4)
    d_head = _D_HEAD * shards // math.gcd(queries * _D_HEAD, shards)
    small = dataclasses.replace(
        model,
        vocab_size=-(-vocab_size // logits) * logits,
        d_model=queries * d_head,
        num_layers=model.heads.counted_layers(model.n_future_tokens)
        + min(model.num_trunk_layers, _TRUNK_LAYERS),
        num_query_heads=queries,
        num_kv_heads=kv_heads,
        d_head=d_head,
        d_ff=2 * queries * d_head,
        heads=dataclasses.replace(
            model.heads, markov_rank=shards if model.heads.markov_rank else 0
        ),
        layer=_small_layer(model),
    )
    return dataclasses.replace(
        cfg,
        model=small,
        mesh=scaled_mesh(cfg.mesh, device_counts[0]),
        compute=dataclasses.replace(cfg.compute, attention="xla", chunk_tokens=0),
        data=dataclasses.replace(
            cfg.data,
            sources=tuple(sources),
            seq_len=math.lcm(_SEQ_LEN, shards),
            batch_size=shards * cfg.train.accumulation,
        ),
        optim=dataclasses.replace(cfg.optim, warmup_steps=10),
        train=dataclasses.replace(cfg.train, steps=_STEPS),
        checkpoint=dataclasses.replace(
            cfg.checkpoint, every=_SAVE_EVERY, keep_every=0, keep_best=0, local_dir=""
        ),
        eval=dataclasses.replace(cfg.eval, every=0),
        init=InitConfig(),
        log=dataclasses.replace(
            cfg.log, every=1, tensorboard=False, wandb="", profile_step=0
        ),
    )


def _small_layer(model: ModelConfig) -> LayerConfig:
    """The form of layers, with half a row as window where there were windows."""
    windows = tuple(min(w, _SEQ_LEN // 2) for w in model.layer.windows[-1:])
    return dataclasses.replace(model.layer, windows=windows)


def differences(before: Config, after: Config) -> list[str]:
    """The fields that were scaled, as `section: field 4096 -> 32, ...`, by section."""
    lines = []
    then = as_tree(after)
    for section, old in as_tree(before).items():
        new = then[section]
        changed = [f"{k} {old[k]} -> {new[k]}" for k in old if old[k] != new[k]]
        if changed:
            lines.append(f"{section}: {', '.join(changed)}")
    return lines
