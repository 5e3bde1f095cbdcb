"""Where the parameters of a new run come from."""

import dataclasses
from typing import Literal

from mtp_jax.config.checks import require_at_least

HeadStart = Literal["random", "copy", "unigram", "counts", "ridge"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class InitConfig:
    """The model of another run as the beginning of this one (docs/growing.md).

    start, of heads that it lacks: random; copy, of the last layer of head 1; unigram
    and counts, the bias by the token before from how often tokens and pairs of them
    occur; ridge, maps in closed form to what head 1 will say, and such a bias where
    there is one. All but random and copy read the run's text, and give heads a gain.
    """

    workdir: str = ""  # of the run that is the beginning; empty: none
    start: HeadStart = "ridge"  # of heads that the model there lacks
    fit_tokens: int = 65_536  # of the training text, that starts are fitted to

    def __post_init__(self):
        require_at_least("init", 1, fit_tokens=self.fit_tokens)
