"""Evaluation during a run: held-out figures and a sample text, on schedule."""

import functools

import jax

from mtp_jax.config import Config
from mtp_jax.data.corpus import Corpus
from mtp_jax.data.prompts import drawn_prompt
from mtp_jax.decode.generator import Generator
from mtp_jax.eval.heldout import make_evaluator, measure, placed_heldout
from mtp_jax.run.goodput import Goodput
from mtp_jax.run.records import heldout_line, heldout_record
from mtp_jax.run.run_log import RunLog
from mtp_jax.training.lora import merged
from mtp_jax.training.train_step import TrainState


class HeldoutEvaluation:
    """Measures held-out loss, and lets the model go on from a held-out prompt."""

    def __init__(
        self,
        cfg: Config,
        mesh: jax.sharding.Mesh,
        corpora: list[Corpus],
        *,
        log: RunLog,
        goodput: Goodput,
    ):
        self._cfg = cfg
        self._mesh = mesh
        self._corpora = corpora
        self._log = log
        self._goodput = goodput
        self._tokenizer = corpora[0].tokenizer
        self._evaluator = make_evaluator(cfg.model, cfg.compute, self._tokenizer)
        merge = functools.partial(merged, cfg.optim)
        self._merge = jax.jit(merge) if cfg.optim.lora_rank else merge
        self._generator = Generator(cfg.model, None, self._tokenizer, mesh)

    def due(self, step: int) -> bool:
        """Returns True if the state after `step` is to be evaluated."""
        every = self._cfg.eval.every
        return every > 0 and step % every == 0

    def run(self, state: TrainState, step: int) -> float:
        """Logs the figures and the sample; returns the loss of head 1 in nats."""
        with self._goodput.spent("evaluate"):
            cfg = self._cfg.eval
            batches = placed_heldout(
                self._cfg, self._corpora, self._mesh, limit=cfg.batches
            )
            figures = measure(self._evaluator, self._merge(state.params), batches)
            record = heldout_record(step, figures)
            self._log.say(heldout_line(figures, step))
            if cfg.sample_tokens:
                record["prompt"], record["sample"] = self._sample(state, step)
                self._log.say(f"sample: {record['prompt']!r} -> {record['sample']!r}")
            self._log.write("heldout.jsonl", record)
            return record["loss/head_1"]

    def _sample(self, state: TrainState, step: int) -> tuple[str, str]:
        """A held-out prompt, drawn by the run's key, and how the model goes on."""
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), step)
        numbers = jax.random.bits(key, (2,))
        splits = [corpus.documents("heldout") for corpus in self._corpora]
        documents = next(split for split in splits if len(split))
        which, where = (int(x) for x in jax.device_get(numbers))
        length = self._cfg.eval.sample_prompt_tokens
        prompt = drawn_prompt(documents, length, which, where)
        self._generator.use(self._merge(state.params))
        made = self._generator.generate(
            [prompt], max_new_tokens=self._cfg.eval.sample_tokens
        )
        self._generator.use(None)  # the next step takes the parameters' memory
        return made[0].prompt, made[0].text
