"""A model that drafts for itself, for Hugging Face's transformers.

`AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)` loads a class of
this file; without trust_remote_code the same folder is an ordinary Llama, Mistral, Qwen
or OLMo 2, and its text is the same. `model.generate(ids, use_mtp=True)` drafts with the
heads in `mtp_heads/` and lets the model check the drafts: greedy, the text is that
without drafts; sampled, it has the same distribution. transformers takes one text at a
time that way.

A head predicts a token further ahead from what the trunk says (arXiv:2404.19737).
`config.mtp_heads` tells their kind: parallel heads are layers over the trunk's output,
causal ones over the head before, linear ones a matrix, residual ones small blocks over
the normed output (arXiv:2401.10774).
"""

import copy
import os
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import (
    LlamaForCausalLM,
    MistralForCausalLM,
    Olmo2ForCausalLM,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
)
from transformers.generation.candidate_generator import CandidateGenerator
from transformers.utils import cached_file

_FILE = "model.safetensors"
_FOLDER = "mtp_heads"


class Head(nn.Module):
    """The weights of one head, head 2 being number 0.

    Its layers and its norm are of the classes that the model's are.
    """

    def __init__(self, model, number):
        super().__init__()
        config = model.config
        about = config.mtp_heads
        kind, count, width = about["kind"], about["layers"], config.hidden_size
        if kind in ("parallel", "causal"):
            # Of the form of head 1, the last layer: a config tells it by the number.
            last, layer = config.num_hidden_layers - 1, type(model.model.layers[-1])
            self.layers = nn.ModuleList([layer(config, last) for _ in range(count)])
            for i, made in enumerate(self.layers):
                made.self_attn.layer_idx = last + 1 + number * count + i  # in the cache
        elif kind == "linear":
            self.map = nn.Linear(width, width, bias=False)
        else:
            self.blocks = nn.ModuleList([nn.Linear(width, width) for _ in range(count)])
        if about["norm"] == "own":
            self.norm = type(model.model.norm)(width, eps=config.rms_norm_eps)
        if about["unembedding"] == "own":
            self.unembedding = nn.Linear(width, config.vocab_size, bias=False)


class Heads(nn.Module):
    """All heads after the first, and the bias by the token before."""

    def __init__(self, model):
        super().__init__()
        config = model.config
        about = config.mtp_heads
        count = about["n_future_tokens"] - 1
        self.heads = nn.ModuleList([Head(model, i) for i in range(count)])
        rank = about["markov_rank"]
        if rank:
            self.markov_in = nn.Embedding(config.vocab_size, rank)
            self.markov_out = nn.Linear(rank, config.vocab_size, bias=False)


class HeadDrafts(CandidateGenerator):
    """Drafts of all heads after each pass of the model."""

    requires_model_outputs = True
    model_kwargs_overrides = {"run_heads": True}  # noqa: RUF012 (transformers' own)

    def __init__(self, model, generation_config, logits_processor):
        self._model = model
        self._samples = generation_config.do_sample
        self._processor = logits_processor
        self._reading = True  # the prompt

    def get_candidates(
        self,
        input_ids,
        model_kwargs=None,
        model_outputs=None,
        is_first_iteration=False,
        n_last_matches=0,
        **kwargs,
    ):
        """Ids [1, t] with drafts behind them, and the laws that they were drawn from.

        The slot of a pass that decides them is the last whose token is accepted.
        """
        if is_first_iteration:
            return input_ids, None
        slot = input_ids.shape[1] - 2 if self._reading else int(n_last_matches)
        self._reading = False
        ids, laws = input_ids, []
        for number in range(len(self._model.mtp.heads)):
            scores = self._model.draft_scores(number, slot, ids[:, -1])
            if self._processor is not None:
                scores = self._processor(ids, scores)
            laws.append(scores[:, None])
            if self._samples:
                token = torch.multinomial(scores.softmax(-1), 1)
            else:
                token = scores.argmax(-1, keepdim=True)
            ids = torch.cat([ids, token], dim=-1)
        return ids, torch.cat(laws, dim=1)


class Drafts(nn.Module):
    """Heads, beside a causal model, that run when `generate` asks for drafts."""

    _keys_to_ignore_on_load_missing = [r"^mtp\."]  # noqa: RUF012 (transformers' own)

    def __init__(self, config):
        super().__init__(config)
        about = config.mtp_heads
        self.mtp = Heads(self)
        # What the first layer of head 1 was called with; of heads that are layers.
        self._given: tuple = ((), {})
        self._states = []
        self._stream: torch.Tensor = torch.empty(0)  # of head 1, before its norm
        self.model.norm.register_forward_pre_hook(self._keep_stream)
        if about["kind"] in ("parallel", "causal"):
            first = self.model.layers[config.num_hidden_layers - about["layers"]]
            first.register_forward_pre_hook(self._keep_given, with_kwargs=True)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """The model with its heads, from a folder or a repository of the hub."""
        found = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = found[0] if isinstance(found, tuple) else found
        local = os.path.join(pretrained_model_name_or_path, _FOLDER, _FILE)
        if not os.path.isfile(local):
            names = ("revision", "token", "cache_dir", "local_files_only")
            where = {name: kwargs[name] for name in names if name in kwargs}
            local = cached_file(
                pretrained_model_name_or_path, _FILE, subfolder=_FOLDER, **where
            )
        weights = {name: x.to(model.dtype) for name, x in load_file(local).items()}
        model.mtp.load_state_dict(weights, strict=True)
        model.mtp.to(model.device)
        return found

    def forward(self, *args, run_heads=False, **kwargs):
        """As without heads; with `run_heads` the heads' states are kept, too."""
        outputs = super().forward(*args, **kwargs)
        if run_heads:
            self._run_heads()
        return outputs

    def draft_scores(self, number, slot, token):
        """Scores [1, V] of a head at a slot of the last pass, after a token [1]."""
        head, states = self.mtp.heads[number], self._states[number][:, slot]
        kind = self.config.mtp_heads["kind"]
        if kind != "residual":
            states = self._norm_of(head)(states)
        own: Any = getattr(head, "unembedding", self.lm_head)
        scores = own(states).float()
        if self.config.mtp_heads["markov_rank"]:
            scores = scores + self.mtp.markov_out(self.mtp.markov_in(token)).float()
        return scores

    def _norm_of(self, head):
        return getattr(head, "norm", self.model.norm)

    def _keep_given(self, module, args, kwargs):
        self._given = args, kwargs

    def _keep_stream(self, module, args):
        self._stream = args[0]

    def _run_heads(self):
        kind, states = self.config.mtp_heads["kind"], self._stream
        self._states = []
        for head in self.mtp.heads:
            if kind == "linear":
                states = head.map(self._stream)
            elif kind == "residual":
                states = self._norm_of(head)(self._stream)
                for block in head.blocks:
                    states = states + nn.functional.silu(block(states))
            else:
                (trunk, *others), kwargs = self._given
                states = trunk if kind == "parallel" else states
                for layer in head.layers:
                    states = layer(states, *others, **kwargs)
            self._states.append(states)

    def _get_candidate_generator(
        self, generation_config, logits_processor=None, **kwargs
    ):
        if not generation_config.use_mtp:
            return super()._get_candidate_generator(
                generation_config=generation_config,
                logits_processor=logits_processor,
                **kwargs,
            )
        of_model = kwargs["model_kwargs"]
        cache = of_model.get("cache", of_model.get("past_key_values"))
        for head in self.mtp.heads:
            for _ in getattr(head, "layers", ()):
                cache.layers.append(copy.deepcopy(cache.layers[-1]))  # empty yet
        return HeadDrafts(self, generation_config, logits_processor)


class MTPLlamaForCausalLM(Drafts, LlamaForCausalLM):
    """A Llama with heads."""


class MTPMistralForCausalLM(Drafts, MistralForCausalLM):
    """A Mistral with heads."""


class MTPQwen2ForCausalLM(Drafts, Qwen2ForCausalLM):
    """A Qwen 2 with heads."""


class MTPQwen3ForCausalLM(Drafts, Qwen3ForCausalLM):
    """A Qwen 3 with heads."""


class MTPOlmo2ForCausalLM(Drafts, Olmo2ForCausalLM):
    """An OLMo 2 with heads."""
