"""Sizes and vocabularies: the sign of what heads 2 to n do for head 1, and its slope.

In the paper more heads hurt small models and help from about 1.3 billion parameters on
(arXiv:2404.19737, table S7); sizes of a laptop show at most whether the loss shrinks as
models grow. Vocabularies are compared in bits per byte and in bytes a pass; their runs
have the same number of tokens, and so more text where tokens are longer.
"""

import dataclasses
import math
import pathlib
import sysconfig

from mtp_jax.config import Config
from mtp_jax.data.prepare import prepare
from mtp_jax.eval.heldout import evaluate
from mtp_jax.studies.study import Claim, Figures, Size, Study, Trial, difference
from mtp_jax.studies.training import WITHOUT, byte_model, trained

_WIDTHS = (48, 72, 96, 144, 192)
_COUNTS = (1, 2, 4)
_VOCABULARIES = (512, 2048)
# Width, heads, size of the vocabulary.
_ARMS = {
    **{f"d={d}, n={n}": (d, n, 256) for d in _WIDTHS for n in _COUNTS},
    **{f"V={v}, n={n}": (96, n, v) for v in _VOCABULARIES for n in (1, 4)},
}
_QUICK = ("d=48, n=1", "d=48, n=4", "d=96, n=1", "d=96, n=4")
_HELD_OUT: dict[Size, int | None] = {"tiny": 2, "quick": 64, "full": None}


def config_of(trial: Trial) -> Config:
    """The run of a trial: six layers, heads among them."""
    width, n, vocabulary = _ARMS[trial.arm]
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
    restored = trained(trial, config_of(trial))
    found = evaluate(restored, max_batches=_HELD_OUT[trial.size])
    length = found["accept"]["length"]
    return {
        "bits_per_byte": found["bits_per_byte"],
        "accepted": length,
        "accepted_bytes": length * found["bytes"] / found["tokens"],
    }


def slope(arms, n: int, figure: str = "bits_per_byte") -> float:
    """The slope of what n heads add to a figure, over the logarithm of the width."""
    x = [math.log(width) for width in _WIDTHS]
    y = [arms[f"d={w}, n={n}"][figure] - arms[f"d={w}, n=1"][figure] for w in _WIDTHS]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum(
        (a - mean_x) ** 2 for a in x
    )


STUDY = Study(
    about="Head 1 on held-out text, in bits per byte, by width d, heads n and "
    "vocabulary V (bytes where none is named); tokens and bytes a pass on "
    "true text.",
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
