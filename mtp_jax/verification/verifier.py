"""Proof, on a trained model, that drafting changes nothing."""

import itertools
import os
from collections.abc import Iterator, Mapping

from mtp_jax.checkpoint.restore import Restored, as_restored
from mtp_jax.config import ModelConfig
from mtp_jax.decode.decoders.state import Decoder
from mtp_jax.decode.fitting import fitting
from mtp_jax.errors import UserError
from mtp_jax.verification.distribution_checks import distribution_checks
from mtp_jax.verification.greedy_checks import greedy_checks
from mtp_jax.verification.sampling_checks import sampling_checks
from mtp_jax.verification.settings import VerifySettings
from mtp_jax.verification.subject import Check, Subject

_DEFAULTS = VerifySettings()


def verify(
    model: Restored | str | os.PathLike[str],
    *,
    decoders: Mapping[str, Decoder] | None = None,
    settings: VerifySettings = _DEFAULTS,
) -> Iterator[Check]:
    """Yields the checks of exact decoders on a model, each when it is done.

    Greedy texts must be those of plain decoding; the distribution of sampled texts must
    be head 1's, enumerated exactly and by a chi-square test; decoders that are broken
    on purpose must fail. Drafting changes nothing if every check is ok:

      all(check.ok for check in verify("runs/mine"))

    Args:
      model: a restored model, or the workdir of a run.
      decoders: what to verify, by a name of your choice; None for all that claim to be
        exact, with their default options.
      settings: what is run.

    Returns:
      An iterator; most of the work is done while it is read.

    Raises:
      UserError: a model of one head, no exact decoder, no such run or prompts; at once.
    """
    restored = as_restored(model)
    chosen, _ = exact_decoders(restored.config.model, decoders)
    subject = Subject(restored, chosen, settings)
    return itertools.chain(
        greedy_checks(subject), distribution_checks(subject), sampling_checks(subject)
    )


def exact_decoders(
    cfg: ModelConfig, decoders: Mapping[str, Decoder] | None = None
) -> tuple[dict[str, Decoder], dict[str, str]]:
    """The decoders that `verify` runs, and why it leaves out the others, by name.

    Args:
      cfg: of the model.
      decoders: those that are asked for; None for all that there are.

    Raises:
      UserError: a model of one head, or all that are asked for are lossy.
    """
    if cfg.n_future_tokens == 1:
        raise UserError("there is one head, so nothing drafts: nothing to verify.")
    chosen, left_out = dict(decoders or {}), {}
    if not chosen:
        fit = fitting(cfg)
        left_out = {k: d for k, d in fit.items() if isinstance(d, str)}
        chosen = {k: d for k, d in fit.items() if not isinstance(d, str)}
    lossy = [name for name, decoder in chosen.items() if decoder.lossy]
    left_out |= {name: "lossy: it claims no such thing" for name in lossy}
    chosen = {name: d for name, d in chosen.items() if name not in lossy}
    if not chosen:
        raise UserError(
            f"--decoder={lossy[0]} is lossy: it claims nothing that could be verified; "
            "give an exact one."
        )
    return chosen, left_out
