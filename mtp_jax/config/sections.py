"""Every field of a run, its default and its check: the one definition of a config."""

import dataclasses
from typing import Literal

from mtp_jax.config.checks import require, require_at_least, require_sizes
from mtp_jax.config.heads import HeadsConfig
from mtp_jax.config.init import InitConfig
from mtp_jax.config.loss import LossConfig
from mtp_jax.config.optim import OptimConfig
from mtp_jax.errors import UserError

Dtype = Literal["float32", "bfloat16"]
Attention = Literal["auto", "splash", "cudnn", "xla"]
Remat = Literal["none", "full", "dots", "offload"]
HeadLoss = Literal["fused", "remat", "naive"]
ScanLayers = Literal["auto", "yes", "no"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A Llama-style trunk and its prediction heads (arXiv:2404.19737, section 2)."""

    vocab_size: int = 256  # ids of the model; no fewer than the tokenizer has
    d_model: int = 512  # width of the trunk
    num_layers: int = 8  # trunk and heads together, so that n does not change the size
    n_future_tokens: int = 4  # n: heads, one layer each; 1 is an ordinary model
    num_query_heads: int = 8  # of attention, in every layer
    num_kv_heads: int = 8  # fewer than query heads: grouped-query attention
    d_head: int = 64  # width of an attention head
    d_ff: int = 1408  # width of the feed-forward layer
    rope_theta: float = 10_000.0  # base of the rotary positions
    norm_eps: float = 1e-5  # of RMSNorm, under the root
    tie_embeddings: bool = False  # unembed with the embedding
    param_dtype: Dtype = "float32"  # of a model; the optimizer sees float32
    compute_dtype: Dtype = "float32"  # of products and activations
    heads: HeadsConfig = dataclasses.field(default=HeadsConfig(), repr=False)

    def __post_init__(self):
        require_sizes(
            "model",
            vocab_size=self.vocab_size,
            d_model=self.d_model,
            num_layers=self.num_layers,
            n_future_tokens=self.n_future_tokens,
            num_query_heads=self.num_query_heads,
            num_kv_heads=self.num_kv_heads,
            d_head=self.d_head,
            d_ff=self.d_ff,
        )
        self._check_heads()
        require(
            self.num_query_heads % self.num_kv_heads == 0,
            f"config.model.num_query_heads ({self.num_query_heads}) must be a multiple "
            f"of config.model.num_kv_heads ({self.num_kv_heads}).",
        )
        require(
            self.d_head % 2 == 0,
            f"config.model.d_head is {self.d_head}; rotary positions need an even "
            "size.",
        )
        require(
            self.num_query_heads * self.d_head == self.d_model,
            f"config.model.num_query_heads ({self.num_query_heads}) x "
            f"config.model.d_head ({self.d_head}) is not config.model.d_model "
            f"({self.d_model}).",
        )
        require(
            self.rope_theta > 0 and self.norm_eps > 0,
            "config.model.rope_theta and config.model.norm_eps must be above 0.",
        )

    def _check_heads(self) -> None:
        n, heads = self.n_future_tokens, self.heads
        most = next(
            (k for k in range(n, 0, -1) if heads.counted_layers(k) <= self.num_layers),
            0,
        )
        if most < n:
            of_each = f", {heads.layers} layers each" if heads.layers > 1 else ""
            raise UserError(
                f"config.model.n_future_tokens is {n}, more than "
                f"config.model.num_layers ({self.num_layers}), which counts the heads"
                f"{of_each}; give at most {most} heads or more layers."
            )
        require(
            heads.markov_rank <= self.vocab_size,
            f"config.heads.markov_rank is {heads.markov_rank}; it must be at most "
            f"config.model.vocab_size ({self.vocab_size}).",
        )
        require(
            heads.unembedding == "shared" or not self.tie_embeddings,
            "config.heads.unembedding is own, and config.model.tie_embeddings makes "
            "the embedding the one unembedding; keep one of them.",
        )

    @property
    def num_trunk_layers(self) -> int:
        return self.num_layers - self.heads.counted_layers(self.n_future_tokens)

    def keep_heads(self, n: int) -> "ModelConfig":
        """The model that keeps the trunk and the first n heads.

        Raises:
          UserError: heads of this kind need those after them.
        """
        if n < self.heads.least_kept(self.n_future_tokens):
            raise UserError(
                f"{self.heads.kind} heads read those after them, so fewer than all "
                f"{self.n_future_tokens} cannot be kept; use all, or a model of "
                "another kind."
            )
        layers = self.num_trunk_layers + self.heads.counted_layers(n)
        return dataclasses.replace(self, num_layers=layers, n_future_tokens=n)


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
    the copies between the loop's stacks; auto is no on GPUs.
    """

    attention: Attention = "auto"  # the kernel
    remat: Remat = "full"  # what the backward pass of a trunk layer computes again
    scan_layers: ScanLayers = "auto"  # a loop over the layers of the trunk
    head_loss: HeadLoss = "fused"  # in which order the heads' losses are computed
    chunk_tokens: int = 0  # of a device, whose logits live at once; 0: 2^27 logits

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
    profile_step: int = 0  # first step of a profiler trace; 0: no trace
    profile_steps: int = 3  # how many steps it covers

    def __post_init__(self):
        require_at_least("log", 1, every=self.every, profile_steps=self.profile_steps)
        require_at_least("log", 0, profile_step=self.profile_step)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """A run."""

    model: ModelConfig = ModelConfig()
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
    def row_len(self) -> int:
        """Tokens of a row: every position has a target for every head."""
        return self.data.seq_len + self.model.n_future_tokens

    def keep_heads(self, n: int) -> "Config":
        """The config of a model that keeps the trunk and the first n heads."""
        return dataclasses.replace(
            self, model=self.model.keep_heads(n), loss=self.loss.keep_heads(n)
        )
