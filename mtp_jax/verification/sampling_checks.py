"""Checks that texts drawn from a decoder fit head 1's distribution, by chi-square."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from mtp_jax.verification.greedy import written
from mtp_jax.verification.sampling_tests import Trusting, chi_square
from mtp_jax.verification.subject import Check, Subject

_SAMPLE_BATCH = 256


def sampling_checks(subject: Subject) -> Iterator[Check]:
    """A check a decoder over texts of the most open prompt, and a control.

    The number of heads in use changes from pass to pass: it begins without the drafting
    ones, which then catch up.
    """
    settings, n = subject.settings, subject.exact_cfg.n_future_tokens
    prompt = subject.open_prompts[0]
    distribution = subject.right_distribution(prompt)
    most = settings.distribution_heads
    heads = n if most is None else min(n, most)
    depths: list[bool | tuple[int, ...]] = [(1, heads, heads)]
    if settings.every_depth:
        depths = [False, (1, heads), (1, heads, 1, 1)]
    controls: dict[str, Any] = {"all drafts pass": Trusting()}
    checks = [(*x, d) for x in subject.decoders.items() for d in depths]
    checks += [(name, decoder, False) for name, decoder in controls.items()]
    for name, decoder, adaptive in checks:
        results = subject.generator.generate(
            [np.asarray(subject.prompts[prompt])] * settings.samples,
            max_new_tokens=settings.distribution_tokens,
            decoder=decoder,
            sampling=subject.sampling,
            batch_size=min(_SAMPLE_BATCH, settings.samples),
            heads=heads,
            adaptive=adaptive,
        )
        texts = [written(r, subject.tokenizer.eos_id) for r in results]
        test = chi_square(texts, distribution)
        fits = test.p_value >= settings.least_p
        depths_used = (heads,) if isinstance(adaptive, bool) else adaptive
        used = ",".join(map(str, depths_used))
        setting = f"chi-square, heads {used}"
        found = f"{test.statistic:.1f} on {test.freedom}, p = {test.p_value:.2g}"
        if name in controls:
            if fits:
                found += ": too few --samples to notice"
            yield Check("control", name, setting, len(texts), found, not fits)
        else:
            yield Check("law", name, setting, len(texts), found, fits)
