"""A model for lm-evaluation-harness, registered there as `mtp_jax`.

`pip install 'mtp-jax[eval]'`. The harness finds models of other packages only where
they have been imported; the command `mtp-jax-lm-eval`, or `python -m
mtp_jax.eval.lm_eval_model`, is its own command line with this one among them:

    mtp-jax-lm-eval run --model mtp_jax --model_args workdir=runs/mine --tasks piqa
"""

from collections import defaultdict
from typing import Any

import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model

from mtp_jax.checkpoint.restore import Restored, restore_model
from mtp_jax.decode.decoders.sampling import Sampling
from mtp_jax.decode.generator import Generator
from mtp_jax.errors import UserError
from mtp_jax.eval.score import score_continuations, score_text

_ROWS = 16
_MAX_NEW = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


@register_model("mtp_jax")
class MtpJaxLM(TemplateLM):
    """A checkpoint, by the contracts of `lm_eval.api.model.LM`.

    Every text begins with begin of text, as in training. Texts are written with drafts
    where the model has heads for them; greedy ones are those of plain decoding.
    """

    def __init__(
        self,
        workdir: str | Restored,
        step: int | None = None,
        heads: int | None = None,
        decoder: str | None = None,
        rows: int = _ROWS,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        seed: int = 0,
        **unused: Any,
    ):
        """Takes what `--model_args` has; values there may be texts.

        Args:
          workdir: of a run, or a restored model.
          step: which checkpoint; None: the newest.
          heads: how many heads to keep; None: all.
          decoder: a name in `DECODERS`; None: blockwise, or plain for one head.
          rows: texts at a time. The harness's own --batch_size counts if it is larger.
          max_length: tokens that the model reads; None: as long as those of training.
          max_gen_toks: most new tokens where a task does not say.
          seed: of what is drawn.
          unused: what the harness gives every model, such as a device.

        Raises:
          UserError: no such run or checkpoint.
        """
        super().__init__()
        if isinstance(workdir, Restored):
            self._model = workdir
        else:
            self._model = restore_model(workdir, step=step, heads=heads)
        self._generator = Generator.from_restored(self._model)
        self._decoder = decoder
        asked = str(unused.get("batch_size", "auto"))
        self._rows = max(int(rows), int(asked) if asked.isdecimal() else 0)
        self.max_length = max_length or self._model.config.data.seq_len
        self.max_gen_toks = int(max_gen_toks)
        self._seed = int(seed)

    @property
    def eot_token_id(self) -> int:
        """End of text."""
        return self._model.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """Begin of text."""
        return self._model.tokenizer.bos_id

    @property
    def tokenizer_name(self) -> str:
        """The tokenizer's identity, for the harness's cache."""
        return self._model.tokenizer.fingerprint

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **unused: Any
    ) -> list[int]:
        """Token ids, as of a prompt unless `add_special_tokens` is False."""
        tokenizer = self._model.tokenizer
        ids = tokenizer.encode(string).tolist()
        return ids if add_special_tokens is False else [*tokenizer.prompt_begin, *ids]

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        **unused: Any,
    ) -> list[tuple[float, bool]]:
        """Log-probabilities of continuations, and whether they are the greedy ones."""
        scores = score_continuations(
            self._model,
            [(context, after) for _, context, after in requests],
            batch_size=self._rows,
            max_tokens=self.max_length,
        )
        found = [(score.log_prob, score.greedy) for score in scores]
        for (texts, _, _), answer in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, answer)
        return found

    def loglikelihood_rolling(
        self, requests: list[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-probabilities of whole texts, in windows."""
        found = []
        for (text,) in (request.args for request in requests):
            ids = self.tok_encode(text, add_special_tokens=False)
            value = 0.0
            if ids:
                scores = score_text(
                    self._model, ids, batch_size=self._rows, max_tokens=self.max_length
                )
                value = scores.log_prob
            found.append(value)
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), value)
        return found

    def generate_until(
        self, requests: list[Any], disable_tqdm: bool = False
    ) -> list[str]:
        """Continuations up to the first stop string, in the order of the requests.

        What is drawn for a request depends on its number, so repeats differ.
        """
        groups: dict[str, list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            groups[repr(sorted(request.args[1].items()))].append(number)
        found: dict[int, str] = {}
        for numbers in groups.values():
            settings = requests[numbers[0]].args[1]
            for start in range(0, len(numbers), self._rows):
                chosen = numbers[start : start + self._rows]
                texts = self._written(
                    [requests[i].args[0] for i in chosen], settings, chosen[0]
                )
                found.update(zip(chosen, texts, strict=True))
        for number, request in enumerate(requests):
            self.cache_hook.add_partial("generate_until", request.args, found[number])
        return [found[number] for number in range(len(requests))]

    def _written(
        self, contexts: list[str], settings: dict[str, Any], first: int
    ) -> list[str]:
        """Continuations of a batch with equal settings."""
        until = settings.get("until") or []
        stop = [until] if isinstance(until, str) else list(until)
        given = [settings[name] for name in _MAX_NEW if name in settings]
        new = int(given[0]) if given else self.max_gen_toks
        room = self.max_length - new
        if room < 1:
            raise UserError(
                f"a task asks for {new} new tokens, and the model reads "
                f"{self.max_length}; give fewer with --gen_kwargs max_gen_toks=N."
            )
        ids = [self.tok_encode(x, add_special_tokens=False) for x in contexts]
        drawn = settings.get("do_sample", float(settings.get("temperature") or 0) > 0)
        sampling = Sampling(seed=self._seed)
        if drawn:
            sampling = Sampling(
                temperature=float(settings.get("temperature") or 1.0),
                top_p=float(settings.get("top_p") or 1.0),
                top_k=int(settings.get("top_k") or 0),
                seed=self._seed,
            )
        results = self._generator.generate(
            # Begin of text, which the generator puts in front, is one of them.
            [np.array(x[len(x) - min(len(x), room - 1) :], np.int32) for x in ids],
            max_new_tokens=new,
            decoder=self._decoder,
            sampling=sampling,
            stop=[text for text in stop if text],
            first=first,
        )
        return [result.text for result in results]


def main() -> None:
    """Runs the harness's command line."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
