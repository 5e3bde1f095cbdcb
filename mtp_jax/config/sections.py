"""Every field of a run, its default and its check: the one definition of a config."""

import dataclasses
from typing import Literal

from mtp_jax.config.checks import require, require_at_least, require_sizes
from mtp_jax.config.heads import HeadsConfig
from mtp_jax.config.init import InitConfig
from mtp_jax.config.layer import LayerConfig
from mtp_jax.config.loss import LossConfig
from mtp_jax.config.model import ModelConfig
from mtp_jax.config.optim import OptimConfig
from mtp_jax.config.rope import RopeConfig

Attention = Literal["auto", "splash", "cudnn", "xla"]
Remat = Literal["none", "full", "dots", "offload"]
HeadLoss = Literal["fused", "remat", "naive"]
ScanLayers = Literal["auto", "yes", "no"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """Settings of the arithmetic that decide speed and memory, not values.

    attention: splash is the kernel of TPUs, cudnn that of NVIDIA GPUs, xla runs
    anywhere; auto takes the first of them that can. What each takes: `kernels`.

    remat, from the most memory and the least arithmetic to the reverse: none, dots
    (products with weights are kept), full (only the input of each trunk layer is kept),
    offload (as full, but kept in the memory of the host).

    scan_layers: yes makes one program of a trunk layer and a loop over them, which is
    compiled in the time of one layer; no writes the layers out one by one, which saves
    the copies between the loop's stacks; auto is no on GPUs, and for at most 8 layers
    on one CPU.
    """

    attention: Attention = "auto"  # the kernel
    remat: Remat = "full"  # what the backward pass of a trunk layer computes again
    scan_layers: ScanLayers = "auto"  # a loop over the layers of the trunk
    head_loss: HeadLoss = "fused"  # in which order the heads' losses are computed
    chunk_tokens: int = 0  # a device's, whose logits live; 0: 2^27 logits, a CPU 2^23

    def __post_init__(self):
        require_at_least("compute", 0, chunk_tokens=self.chunk_tokens)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The prepared corpora of a run, and how they become batches."""

    sources: tuple[str, ...] = ("data/stdlib",)  # directories made by `prepare`
    weights: tuple[float, ...] = ()  # share of rows of each source; empty: equal
    seq_len: int = 1024  # positions a row trains; rows hold n_future_tokens more
    batch_size: int = 32  # rows of a global batch, all microbatches together
    seed: int = 0  # of the order of documents and rows
    workers: int = 0  # reader processes; the order of batches does not depend on it
    verify: bool = True  # compare the sha256 of every shard before the first step

    def __post_init__(self):
        require(bool(self.sources), "config.data.sources is empty; name a corpus.")
        require(
            not self.weights or len(self.weights) == len(self.sources),
            f"config.data.weights has {len(self.weights)} values for "
            f"{len(self.sources)} sources.",
        )
        require(
            all(w > 0 for w in self.weights), "config.data.weights must be above 0."
        )
        require_sizes("data", seq_len=self.seq_len, batch_size=self.batch_size)
        require_at_least("data", 0, workers=self.workers, seed=self.seed)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Length of the run and what the step does."""

    steps: int = 25_000  # of the optimizer, in all
    accumulation: int = 1  # microbatches a step
    seed: int = 0  # of the initial parameters and of the sampled prompts
    max_bad_steps: int = 10  # non-finite steps in a row that end the run
    compilation_cache: str = "~/.cache/mtp_jax"  # empty: none
    join_timeout_s: int = 300  # how long hosts wait for each other at the beginning
    host_timeout_s: int = 60  # within it, a lost host ends the others

    def __post_init__(self):
        require_at_least(
            "train",
            1,
            steps=self.steps,
            accumulation=self.accumulation,
            max_bad_steps=self.max_bad_steps,
            join_timeout_s=self.join_timeout_s,
            host_timeout_s=self.host_timeout_s,
        )
        require_at_least("train", 0, seed=self.seed)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each axis; one of them may be -1: all that are left."""

    replica: int = 1  # copies of the model; a multiple of the number of slices
    fsdp: int = -1  # parameters and batch split
    sequence: int = 1  # positions of a row split, and parameters as over fsdp
    tensor: int = 1  # attention heads, feed-forward width and vocabulary split

    def __post_init__(self):
        sizes = dataclasses.asdict(self)
        for name, size in sizes.items():
            require(
                size == -1 or size >= 1,
                f"config.mesh.{name} is {size}; it must be at least 1, or -1.",
            )
        require(
            list(sizes.values()).count(-1) <= 1,
            "config.mesh has more than one -1; only one axis can be inferred.",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When to save, and what to keep."""

    every: int = 1000  # steps; the last step is always saved
    keep_latest: int = 3  # newest checkpoints that stay
    keep_every: int = 0  # also those of every multiple of this step; 0: none
    keep_best: int = 0  # also so many with the lowest held-out loss of head 1
    local_dir: str = (
        ""  # on a disk of each host: fast checkpoints, besides; empty: none
    )
    local_every: int = 100  # steps
    timeout_s: int = 1800  # a save that takes longer ends the run; nothing else is lost

    def __post_init__(self):
        kept = {"keep_every": self.keep_every, "keep_best": self.keep_best}
        require_at_least("checkpoint", 0, **kept)
        waits = {"local_every": self.local_every, "timeout_s": self.timeout_s}
        require_at_least(
            "checkpoint", 1, every=self.every, keep_latest=self.keep_latest, **waits
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Held-out evaluation and sample text during training."""

    every: int = 1000  # steps; 0: never
    batches: int = 16  # held-out batches each time
    sample_tokens: int = 128  # new tokens of the sample text; 0: no sample
    sample_prompt_tokens: int = 64  # taken from a held-out document

    def __post_init__(self):
        prompt = self.sample_prompt_tokens
        require_at_least("eval", 1, batches=self.batches, sample_prompt_tokens=prompt)
        require_at_least("eval", 0, every=self.every, sample_tokens=self.sample_tokens)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogConfig:
    """The log of a run: how often, and what beside it."""

    every: int = 10  # steps
    tensorboard: bool = True  # also write its event files
    wandb: str = ""  # project of Weights & Biases to log to, too; empty: none
    profile_step: int = 0  # first step of a profiler trace; 0: no trace
    profile_steps: int = 3  # how many steps it covers

    def __post_init__(self):
        require_at_least("log", 1, every=self.every, profile_steps=self.profile_steps)
        require_at_least("log", 0, profile_step=self.profile_step)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """A run."""

    model: ModelConfig = dataclasses.field(default=ModelConfig())
    loss: LossConfig = dataclasses.field(default=LossConfig())
    compute: ComputeConfig = ComputeConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = dataclasses.field(default=OptimConfig())
    train: TrainConfig = TrainConfig()
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()
    log: LogConfig = LogConfig()
    init: InitConfig = dataclasses.field(default=InitConfig())

    def __post_init__(self):
        model, steps = self.model, self.train.steps
        n, order = model.n_future_tokens, self.compute.head_loss
        self.loss.check(n, steps, model.heads, order)
        require(
            self.data.batch_size % self.train.accumulation == 0,
            f"config.data.batch_size ({self.data.batch_size}) is not divisible by "
            f"config.train.accumulation ({self.train.accumulation}).",
        )

    @property
    def heads(self) -> HeadsConfig:
        """The section of the heads, which belongs to the model."""
        return self.model.heads

    @property
    def layer(self) -> LayerConfig:
        """The section of the form of layers, which belongs to the model."""
        return self.model.layer

    @property
    def rope(self) -> RopeConfig:
        """The section of rotary positions, which belongs to the model."""
        return self.model.rope

    @property
    def context(self) -> int:
        """Positions of the longest text that the model is made for."""
        return self.model.rope.context or self.data.seq_len

    @property
    def row_len(self) -> int:
        """Tokens of a row: every position has a target for every head."""
        return self.data.seq_len + self.model.n_future_tokens

    def keep_heads(self, n: int) -> "Config":
        """The config of a model that keeps the trunk and the first n heads."""
        return dataclasses.replace(
            self, model=self.model.keep_heads(n), loss=self.loss.keep_heads(n)
        )
