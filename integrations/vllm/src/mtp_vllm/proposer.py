"""Drafts for vLLM's `custom_class` method, from the states that the model kept."""

import numpy as np
import torch
from vllm.config import VllmConfig

from mtp_vllm.folder import Refused
from mtp_vllm.model import LlamaWithHeadsForCausalLM


class HeadsProposer:
    """Drafts of every head after the last token of every request.

    Greedy: drafts are each head's most likely token, and vLLM is not told how likely.
    Sampling stays exact, but a draft d is accepted with probability p(d) of head 1.
    """

    def __init__(self, vllm_config: VllmConfig):
        self._model: LlamaWithHeadsForCausalLM | None = None
        self._max_tokens = vllm_config.model_config.max_model_len

    def load_model(self, target_model: torch.nn.Module) -> None:
        """Takes the loaded model, whose heads draft.

        Raises:
          Refused: it is another one, without heads.
        """
        if not isinstance(target_model, LlamaWithHeadsForCausalLM):
            raise Refused(
                f"{type(target_model).__name__} keeps no states of heads to draft "
                "from; pass hf_overrides of mtp_vllm.arguments(), too."
            )
        self._model = target_model

    def dummy_run(self, *args, **kwargs) -> None:
        """Nothing to prepare: heads run in the model's own passes."""

    def propose(
        self,
        sampled_token_ids: list[list[int]],
        num_tokens_no_spec: np.ndarray,
        token_ids_cpu: np.ndarray,
        slot_mappings=None,
    ) -> list[list[int]]:
        """Drafts for each request of a batch; none while its prompt is being read.

        Args:
          sampled_token_ids: tokens that the pass gave each request, accepted drafts
            and one more; empty if it read a part of a prompt.
          num_tokens_no_spec: tokens of each request, those included.
          token_ids_cpu: tokens of each request, a row each.
          slot_mappings: places in the cache, which drafting does not need.

        The state that decides a request's drafts is that of the token before its last
        one: the last one was only sampled, no pass has read it.
        """
        assert self._model is not None and self._model.last_pass is not None
        last = self._model.last_pass
        drafts: list[list[int]] = [[] for _ in sampled_token_ids]
        asked, rows, tokens = [], [], []
        for i, sampled in enumerate(sampled_token_ids):
            count = int(num_tokens_no_spec[i])
            if not sampled or count >= self._max_tokens:
                continue
            start = last.starts[i]
            rows.append(start + count - 2 - int(last.positions_T[start]))
            tokens.append(sampled[-1])
            asked.append(i)
        if asked:
            device = last.positions_T.device
            row_R, token_R = (torch.tensor(x, device=device) for x in (rows, tokens))
            drafted = self._model.draft(row_R, token_R).tolist()
            for i, draft in zip(asked, drafted, strict=True):
                drafts[i] = draft
        return drafts
