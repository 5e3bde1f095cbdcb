"""The model of a run: its sizes, and sections of its heads, layers and positions."""

import dataclasses
from typing import Literal

from mtp_jax.config.checks import require, require_sizes
from mtp_jax.config.heads import HeadsConfig
from mtp_jax.config.layer import LayerConfig
from mtp_jax.config.rope import RopeConfig
from mtp_jax.errors import UserError

Dtype = Literal["float32", "bfloat16"]


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
    layer: LayerConfig = dataclasses.field(default=LayerConfig(), repr=False)
    rope: RopeConfig = dataclasses.field(default=RopeConfig(), repr=False)

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
        self._check_windows()
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

    def _check_windows(self) -> None:
        given = len(self.layer.windows)
        layers = self.num_trunk_layers + int(self.heads.wiring.layered)
        last = ", the last for the layers of heads" if self.heads.wiring.layered else ""
        require(
            given in (0, 1, layers),
            f"config.layer.windows has {given} values; give none, one for all layers, "
            f"or {layers}, one for each layer of the trunk{last}.",
        )

    @property
    def trunk_windows(self) -> tuple[int, ...]:
        """The window of each layer of the trunk; 0: it has none."""
        given = self.layer.windows or (0,)
        count = self.num_trunk_layers
        return given * count if len(given) == 1 else given[:count]

    @property
    def heads_window(self) -> int:
        """The window of the layers of heads; 0: they have none."""
        return (self.layer.windows or (0,))[-1]

    @property
    def num_trunk_layers(self) -> int:
        return self.num_layers - self.heads.counted_layers(self.n_future_tokens)

    def resized(self, num_layers: int, n_future_tokens: int) -> "ModelConfig":
        """The model with other numbers of layers and heads.

        A longer trunk repeats its last window.
        """
        windows = self.layer.windows
        if len(windows) > 1:
            count = num_layers - self.heads.counted_layers(n_future_tokens)
            there = self.trunk_windows
            more = (there or windows)[-1:] * max(count - len(there), 0)
            of_heads = windows[-1:] if self.heads.wiring.layered else ()
            windows = (*there[:count], *more, *of_heads)
        return dataclasses.replace(
            self,
            num_layers=num_layers,
            n_future_tokens=n_future_tokens,
            layer=dataclasses.replace(self.layer, windows=windows),
        )

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
