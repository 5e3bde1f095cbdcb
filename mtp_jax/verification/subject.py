"""The model that is verified, with its prompts, and the form of a check's result."""

import dataclasses
import functools
import math

import jax
import numpy as np

from mtp_jax.checkpoint.restore import Restored
from mtp_jax.data.prompts import heldout_prompts
from mtp_jax.decode.decoders.sampling import Sampling
from mtp_jax.decode.decoders.state import Decoder
from mtp_jax.decode.generator import Generator
from mtp_jax.verification.exact_distribution import (
    Distribution,
    head_one,
    head_one_distribution,
)
from mtp_jax.verification.greedy import Difference
from mtp_jax.verification.settings import VerifySettings


@dataclasses.dataclass(frozen=True)
class Check:
    """The result of one check of one decoder.

    A control is a decoder that is broken on purpose: its check is ok if the break is
    noticed.
    """

    what: str  # "equal texts", "law" (its distribution) or "control"
    decoder: str
    setting: str
    compared: int  # texts or prompts
    found: str
    ok: bool
    differences: tuple[Difference, ...] = ()


class Subject:
    """A model, its prompts, and what they are decoded and judged with."""

    def __init__(
        self,
        restored: Restored,
        decoders: dict[str, Decoder],
        settings: VerifySettings,
    ):
        """Reads the prompts; compiles nothing yet.

        Args:
          restored: the model, with the heads that are to draft.
          decoders: what is verified, by name; plain, the reference, is left out.
          settings: what is run.

        Raises:
          UserError: the held-out documents do not have such prompts.
        """
        self.settings = settings
        self.decoders = {k: d for k, d in decoders.items() if k != "plain"}
        self.mesh = restored.mesh
        self.params = restored.params
        self.tokenizer = restored.tokenizer
        model = dataclasses.replace(restored.config.model, compute_dtype=settings.dtype)
        config = dataclasses.replace(restored.config, model=model)
        self.generator = Generator.from_restored(
            dataclasses.replace(restored, config=config)
        )
        # Distributions are compared in float32, whose rounding is far below them.
        self.exact_cfg = dataclasses.replace(model, compute_dtype="float32")
        self.sampling = Sampling(temperature=settings.temperature, top_k=settings.top_k)
        lengths = settings.prompt_tokens
        whole = heldout_prompts(config.data.sources, settings.prompts, max(lengths))
        self.prompts: list[np.ndarray] = [
            prompt[-lengths[i % len(lengths)] :] for i, prompt in enumerate(whole)
        ]
        with jax.set_mesh(self.mesh):
            ids = self.tokenizer.vocab_size
            self.next_logits = head_one(self.exact_cfg, self.params, ids)

    def ids(self, number: int) -> list[int]:
        """A prompt's token ids, begin of text first."""
        return [*self.tokenizer.prompt_begin, *map(int, self.prompts[number])]

    def right_distribution(self, number: int) -> Distribution:
        """Head 1's distribution of the first new tokens after a prompt."""
        return self._distribution(number, self.sampling)

    @functools.cached_property
    def open_prompts(self) -> list[int]:
        """Numbers of the prompts, that after which head 1 is least sure first.

        Where it is sure, a wrong decoder writes the right texts, too, and samples prove
        little. Told by the entropy of the new tokens, each of the two most likely ones.
        """
        two = dataclasses.replace(self.sampling, top_k=min(2, self.sampling.top_k))

        def entropy(number: int) -> float:
            probs = self._distribution(number, two).values()
            return -sum(p * math.log(p) for p in probs if p > 0)

        return sorted(range(len(self.prompts)), key=entropy, reverse=True)

    def _distribution(self, number: int, sampling: Sampling) -> Distribution:
        with jax.set_mesh(self.mesh):
            return head_one_distribution(
                self.next_logits,
                self.ids(number),
                self.settings.distribution_tokens,
                sampling,
                self.tokenizer.end_ids,
            )
