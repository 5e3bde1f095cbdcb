"""A Llama of vLLM that runs heads in its own forward pass, and drafts with them."""

import dataclasses
from collections.abc import Iterable

import torch
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.utils import AutoWeightsLoader

from mtp_vllm.folder import PROPOSER, WEIGHTS, Refused, check_drafts, read_heads
from mtp_vllm.heads import Heads


@dataclasses.dataclass
class Pass:
    """What the last forward pass left to draft from."""

    states: list[torch.Tensor]  # of each head, [T, D], rows of all requests
    positions_T: torch.Tensor  # of each row in its text
    starts: list[int]  # first row of each request of the batch


class LlamaWithHeadsForCausalLM(LlamaForCausalLM):
    """vLLM's Llama with the heads of an exported folder beside it.

    Logits are the Llama's own. The states of the heads stay in `last_pass`, from which
    the proposer drafts: vLLM hands a proposer of a class of one's own no states.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        model = vllm_config.model_config
        about = read_heads(model.hf_config.to_dict(), model.model)
        drafts = drafts_of(vllm_config)
        check_drafts(drafts, about, model.model)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.mtp_heads = Heads(vllm_config, about, drafts, self.model.norm)
        layers = model.hf_config.num_hidden_layers
        of_head_1 = about.layers if about.has_layers else 0
        self.set_aux_hidden_state_layers((layers - of_head_1, layers))
        self.secondary_weights = [
            DefaultModelLoader.Source(
                model.model,
                model.revision,
                subfolder=str(WEIGHTS.parent),
                prefix="mtp_heads.",
            )
        ]
        self.last_pass: Pass | None = None

    def forward(
        self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None
    ):
        """Hidden states [T, D] for head 1's logits; runs the heads on the way."""
        hidden_TD, given = self.model(
            input_ids, positions, intermediate_tensors, inputs_embeds
        )
        states = self.mtp_heads(positions, given[0], given[-1])
        self.last_pass = Pass(states, positions, _starts())
        return hidden_TD

    def draft(self, row_R: torch.Tensor, token_R: torch.Tensor) -> torch.Tensor:
        """The most likely tokens of all heads, int64 [R, heads], one after another.

        Args:
          row_R: rows of the last pass, one a request.
          token_R: the token that follows each, which biases head 2's.
        """
        heads = self.mtp_heads
        assert self.last_pass is not None
        states = [
            heads.normed(number, x[row_R])
            for number, x in enumerate(self.last_pass.states)
        ]
        scores = self._scores(states)
        if not heads.about.markov_rank:
            return torch.stack([x.argmax(-1) for x in scores], dim=1)
        drafts = []
        for scores_RV in scores:
            token_R = (scores_RV.float() + heads.bias(token_R).float()).argmax(-1)
            drafts.append(token_R)
        return torch.stack(drafts, dim=1)

    def _scores(self, states: list[torch.Tensor]) -> list[torch.Tensor]:
        """Logits [R, V] of each head; one product if the table is the Llama's."""
        if self.mtp_heads.about.unembedding == "shared":
            joined = self.compute_logits(torch.cat(states))
            return list(joined.split(len(states[0])))
        return [
            self.logits_processor(head.unembedding, x_RD)
            for head, x_RD in zip(self.mtp_heads.heads, states, strict=True)
        ]

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Loads the Llama's tensors and, by their prefix, the heads'."""
        return AutoWeightsLoader(self).load_weights(weights)


def drafts_of(vllm_config: VllmConfig) -> int:
    """The number of drafts a step of an engine.

    Raises:
      Refused: settings with which the heads cannot draft.
    """
    spec, parallel = vllm_config.speculative_config, vllm_config.parallel_config
    if spec is None or spec.method != "custom_class" or spec.model != PROPOSER:
        raise Refused(
            "a Llama with heads needs the speculative_config of mtp_vllm.arguments(); "
            "without drafts, leave out hf_overrides and it is an ordinary Llama."
        )
    if parallel.world_size > 1:
        raise Refused(
            f"heads draft in one process of a model, not {parallel.world_size}; "
            "set tensor_parallel_size and pipeline_parallel_size to 1."
        )
    if vllm_config.quant_config is not None:
        raise Refused("heads are not quantised; serve the folder without quantization.")
    if vllm_config.compilation_config.cudagraph_mode.has_full_cudagraphs():
        raise Refused(
            "heads run outside of full CUDA graphs; set enforce_eager=True or "
            'compilation_config={"cudagraph_mode": "PIECEWISE"}.'
        )
    return spec.num_speculative_tokens


def _starts() -> list[int]:
    """First row of each request in the pass that is running; none in a dry run."""
    metadata = get_forward_context().attn_metadata
    if not isinstance(metadata, dict) or not metadata:
        return []
    return next(iter(metadata.values())).query_start_loc.tolist()
