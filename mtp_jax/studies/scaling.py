"""Sizes, epochs and vocabularies: what heads 2 to n do for head 1, and its slope.

In the paper more heads hurt small models and help from about 1.3 billion parameters on
(arXiv:2404.19737, table S7); sizes of a laptop show at most whether the loss shrinks as
models grow. Vocabularies are compared in bits per byte and in bytes a pass; their runs
have the same number of tokens, and so more text where tokens are longer. Epochs are
compared at equal steps: of e epochs each goes over the same e-th part of the text. The
paper's gain shrinks from less than one epoch to four (table 1).
"""

import dataclasses
import math
import pathlib
import sysconfig
from collections.abc import Callable

import numpy as np

from mtp_jax.config import Config
from mtp_jax.data.batches import train_batches
from mtp_jax.data.prepare import prepare
from mtp_jax.eval.heldout import evaluate
from mtp_jax.studies.in_memory import Rows, fit
from mtp_jax.studies.study import Claim, Figures, Size, Study, Trial, difference
from mtp_jax.studies.training import WITHOUT, byte_model, trained

_WIDTHS = (48, 72, 96, 144, 192)
_COUNTS = (1, 2, 4)
_VOCABULARIES = (512, 2048)
_EPOCHS = (1, 4, 16)
# Width, heads, size of the vocabulary, epochs; 0: as many as the text allows.
_ARMS = {
    **{f"d={d}, n={n}": (d, n, 256, 0) for d in _WIDTHS for n in _COUNTS},
    **{f"V={v}, n={n}": (96, n, v, 0) for v in _VOCABULARIES for n in (1, 4)},
    **{f"e={e}, n={n}": (96, n, 256, e) for e in _EPOCHS for n in (1, 4)},
}
_MOST_HEADS = max(n for _, n, _, _ in _ARMS.values())
_QUICK = (
    *("d=48, n=1", "d=48, n=4", "d=96, n=1", "d=96, n=4"),
    *("e=1, n=1", "e=1, n=4", "e=16, n=1", "e=16, n=4"),
)
_HELD_OUT: dict[Size, int | None] = {"tiny": 2, "quick": 64, "full": None}


def config_of(trial: Trial) -> Config:
    """The run of a trial: six layers, heads among them."""
    width, n, vocabulary, _ = _ARMS[trial.arm]
    cfg = byte_model(dataclasses.replace(trial, data=("",)))
    model = dataclasses.replace(
        cfg.model,
        vocab_size=vocabulary,
        d_model=width,
        n_future_tokens=n,
        d_head=width // 3 // 2 * 2,
        d_ff=8 * width // 3,
        num_query_heads=3,
    )
    data = dataclasses.replace(cfg.data, sources=_text(trial, vocabulary))
    # Wider models want smaller steps; 5e-3 is right at width 96.
    optim = dataclasses.replace(cfg.optim, peak_lr=5e-3 * min(1.0, 96 / width))
    return dataclasses.replace(cfg, model=model, data=data, optim=optim)


def _text(trial: Trial, vocabulary: int) -> tuple[str, ...]:
    """Bytes of the library of this Python, or its pieces of a vocabulary of that size.

    With corpora of the trial's own, only bytes are of these.
    """
    if vocabulary == 256:
        return byte_model(trial).data.sources
    folder = trial.shared / f"pieces-{vocabulary}"
    if not (folder / "manifest.json").exists():
        library = pathlib.Path(sysconfig.get_path("stdlib"))
        source = library / "json" if trial.size == "tiny" else library
        prepare(
            source,
            folder,
            train_tokenizer=vocabulary,
            exclude=WITHOUT,
            heldout=0.3 if trial.size == "tiny" else 0.05,
            workers=1,
        )
    return (str(folder),)


def measure(trial: Trial) -> Figures:
    """Bits per byte of head 1, and tokens and bytes a pass on true text."""
    cfg, epochs = config_of(trial), _ARMS[trial.arm][3]
    if epochs:
        restored = fit(cfg, again_and_again(cfg, epochs, trial.seed), trial.seed)
    else:
        restored = trained(trial, cfg)
    found = evaluate(restored, max_batches=_HELD_OUT[trial.size])
    length = found["accept"]["length"]
    return {
        "bits_per_byte": found["bits_per_byte"],
        "accepted": length,
        "accepted_bytes": length * found["bytes"] / found["tokens"],
    }


def again_and_again(
    cfg: Config, epochs: int, seed: int
) -> Callable[[np.random.Generator], Rows]:
    """The rows of the steps of a run that goes over the same rows several times.

    They are the first rows of the text in the order of a seed, whose number is that of
    the run's rows over that of epochs; each epoch has its own order. Rows of any number
    of heads hold the same positions.
    """
    model = dataclasses.replace(cfg.model, n_future_tokens=_MOST_HEADS)
    data = dataclasses.replace(cfg.data, seed=seed, workers=0)
    of_most = dataclasses.replace(cfg, model=model, data=data)
    size = cfg.data.batch_size
    count = max(cfg.train.steps // epochs, 1)
    batches = train_batches(of_most, np.arange(size), 0)
    found = [next(batches) for _ in range(count)]
    tokens, segments = (
        np.concatenate([batch[name] for batch in found])[:, : cfg.row_len]
        for name in ("tokens", "segments")
    )
    waiting: list[int] = []

    def make_rows(rng: np.random.Generator) -> Rows:
        if not waiting:
            waiting.extend(rng.permutation(len(tokens)).tolist())
        rows = [waiting.pop() for _ in range(size)]
        return Rows(tokens[rows], segments[rows])

    return make_rows


def slope(arms, n: int, figure: str = "bits_per_byte") -> float:
    """The slope of what n heads add to a figure, over the logarithm of the width."""
    return _slope(arms, "d", _WIDTHS, n, figure)


def slope_of_epochs(arms, n: int, figure: str = "bits_per_byte") -> float:
    """The slope of what n heads add to a figure, over the logarithm of epochs."""
    return _slope(arms, "e", _EPOCHS, n, figure)


def _slope(arms, letter: str, of: tuple[int, ...], n: int, figure: str) -> float:
    y = [
        arms[f"{letter}={x}, n={n}"][figure] - arms[f"{letter}={x}, n=1"][figure]
        for x in of
    ]
    return float(np.polyfit([math.log(x) for x in of], y, 1)[0])


STUDY = Study(
    about="Head 1 on held-out text, in bits per byte, by width d, heads n, epochs e "
    "(of width 96, at equal steps) and vocabulary V (bytes where none is named); "
    "tokens and bytes a pass on true text.",
    arms=lambda size: _QUICK if size == "quick" else tuple(_ARMS),
    measure=measure,
    shown=("bits_per_byte", "accepted", "accepted_bytes"),
    claims=(
        *(
            Claim(
                says=f"{n} heads cost head 1 quality at the smallest width",
                of=difference(f"d=48, n={n}", "d=48, n=1", "bits_per_byte"),
                side="above",
            )
            for n in (2, 4)
        ),
        Claim(
            says="what 4 heads cost head 1 falls as models grow",
            of=lambda arms: slope(arms, 4),
            side="below",
        ),
        Claim(
            says="what 2 heads cost head 1 falls as models grow",
            of=lambda arms: slope(arms, 2),
            side="below",
        ),
        Claim(
            says="what 4 heads cost head 1 grows with epochs over the same text",
            of=lambda arms: slope_of_epochs(arms, 4),
            side="above",
        ),
        Claim(
            says="16 epochs cost one head quality, at equal steps",
            of=difference("e=16, n=1", "e=1, n=1", "bits_per_byte"),
            side="above",
        ),
        Claim(
            says="larger vocabularies write more bytes a pass",
            of=difference("V=2048, n=4", "d=96, n=4", "accepted_bytes"),
            side="above",
        ),
        Claim(
            says="4 heads cost head 1 more with larger vocabularies",
            of=lambda arms: (
                arms["V=2048, n=4"]["bits_per_byte"]
                - arms["V=2048, n=1"]["bits_per_byte"]
                - arms["d=96, n=4"]["bits_per_byte"]
                + arms["d=96, n=1"]["bits_per_byte"]
            ),
            side="above",
        ),
    ),
)
