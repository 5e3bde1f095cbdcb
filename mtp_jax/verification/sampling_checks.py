"""Checks that texts drawn from a decoder fit head 1's distribution, by chi-square."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from mtp_jax.verification.greedy import written
from mtp_jax.verification.sampling_tests import Trusting, chi_square
from mtp_jax.verification.subject import Check, Subject

_SAMPLE_BATCH = 256


def sampling_checks(subject: Subject) -> Iterator[Check]:
    """A check a decoder over texts of the first prompt, and a control."""
    settings = subject.settings
    distribution = subject.right_distribution(0)
    controls: dict[str, Any] = {"all drafts pass": Trusting()}
    for name, decoder in {**subject.decoders, **controls}.items():
        results = subject.generator.generate(
            [np.asarray(subject.prompts[0])] * settings.samples,
            max_new_tokens=settings.distribution_tokens,
            decoder=decoder,
            sampling=subject.sampling,
            batch_size=min(_SAMPLE_BATCH, settings.samples),
        )
        texts = [written(r, subject.tokenizer.eos_id) for r in results]
        test = chi_square(texts, distribution)
        fits = test.p_value >= settings.least_p
        setting = f"chi-square, {test.freedom} degrees"
        found = f"{test.statistic:.1f}, p = {test.p_value:.2g}"
        if name in controls:
            if fits:
                found += ": too few --samples to notice"
            yield Check("control", name, setting, len(texts), found, not fits)
        else:
            yield Check("law", name, setting, len(texts), found, fits)
