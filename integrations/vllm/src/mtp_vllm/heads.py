"""Heads as modules of vLLM, with keys and values in vLLM's own cache.

A head of layers is made of vLLM's decoder layers, numbered on from the Llama's, so that
the engine gives them a cache, and chunks, cached prefixes and accepted drafts are to
them what they are to the Llama. Names of parameters are those of the exported tensors.
"""

from collections.abc import Iterable

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaModel
from vllm.model_executor.models.utils import AutoWeightsLoader

from mtp_vllm.folder import HeadsAbout


class Head(nn.Module):
    """The weights of one head; number 0 is head 2."""

    def __init__(self, vllm_config: VllmConfig, about: HeadsAbout, number: int):
        super().__init__()
        config = vllm_config.model_config.hf_config
        width, name = config.hidden_size, f"mtp_heads.heads.{number}"
        first = config.num_hidden_layers + number * about.layers
        if about.has_layers:
            self.layers = nn.ModuleList(
                LlamaDecoderLayer(vllm_config, prefix=f"model.layers.{first + i}")
                for i in range(about.layers)
            )
        elif about.kind == "linear":
            self.map = ReplicatedLinear(width, width, bias=False, prefix=f"{name}.map")
        else:
            self.blocks = nn.ModuleList(
                ReplicatedLinear(width, width, prefix=f"{name}.blocks.{i}")
                for i in range(about.layers)
            )
        self.norm = None
        if about.norm == "own":
            self.norm = RMSNorm(width, eps=config.rms_norm_eps)
        self.unembedding = None
        if about.unembedding == "own":
            self.unembedding = ParallelLMHead(
                config.vocab_size, width, prefix=f"{name}.unembedding"
            )


class Heads(nn.Module):
    """Heads 2 to 1 + count of a model, and the bias by the token before.

    Args:
      vllm_config: of the engine; its model is the Llama.
      about: the heads that the folder has.
      count: how many of them draft; the others are not loaded.
      norm: the last norm of the Llama, for heads without one of their own.
    """

    def __init__(
        self, vllm_config: VllmConfig, about: HeadsAbout, count: int, norm: RMSNorm
    ):
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.about = about
        self._shared_norm = (norm,)  # in a tuple: its weight is the Llama's
        self.heads = nn.ModuleList(
            Head(vllm_config, about, number) for number in range(count)
        )
        if about.markov_rank:
            rank = about.markov_rank
            self.markov_in = nn.Embedding(config.vocab_size, rank)
            self.markov_out = ReplicatedLinear(
                rank, config.vocab_size, bias=False, prefix="mtp_heads.markov_out"
            )

    def forward(
        self, positions_T: torch.Tensor, trunk_TD: torch.Tensor, stream_TD: torch.Tensor
    ) -> list[torch.Tensor]:
        """States of every head at every token of a pass, [T, D], before `normed`.

        Args:
          positions_T: position of each token in its text.
          trunk_TD: what the first layer of head 1 was given.
          stream_TD: what the Llama's last norm was given.
        """
        states, state_TD = [], stream_TD
        for head in self.heads:
            if self.about.kind == "linear":
                state_TD, _ = head.map(stream_TD)
            elif self.about.kind == "residual":
                state_TD = self._norm_of(head)(stream_TD)
                for block in head.blocks:
                    state_TD = state_TD + nn.functional.silu(block(state_TD)[0])
            else:
                given_TD = trunk_TD if self.about.kind == "parallel" else state_TD
                state_TD = _through(head.layers, positions_T, given_TD)
            states.append(state_TD)
        return states

    def normed(self, number: int, state_RD: torch.Tensor) -> torch.Tensor:
        """States of a head as its unembedding takes them."""
        if self.about.kind == "residual":
            return state_RD
        return self._norm_of(self.heads[number])(state_RD)

    def bias(self, token_R: torch.Tensor) -> torch.Tensor:
        """Scores [R, V] that the token before adds to those of any head."""
        return self.markov_out(self.markov_in(token_R))[0]

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Loads exported tensors by name; those of heads that do not draft are left."""
        here = len(self.heads)
        wanted = (
            (name, x)
            for name, x in weights
            if not name.startswith("heads.") or int(name.split(".")[1]) < here
        )
        mapper = LlamaModel.hf_to_vllm_mapper
        return AutoWeightsLoader(self).load_weights(wanted, mapper=mapper)

    def _norm_of(self, head: Head) -> RMSNorm:
        return self._shared_norm[0] if head.norm is None else head.norm


def _through(layers, positions_T, x_TD):
    """The residual stream after decoder layers, which keep it in two parts."""
    residual_TD = None
    for layer in layers:
        x_TD, residual_TD = layer(positions_T, x_TD, residual_TD)
    return x_TD + residual_TD
