"""Which cases of a test every run takes; the others are `make test-all`'s."""

import pytest


def cases(values, usual):
    """Parameters for pytest from a dict of names and values, slow but for the usual."""
    assert set(usual) <= set(values)
    return [
        pytest.param(value, id=name, marks=[] if name in usual else pytest.mark.slow)
        for name, value in values.items()
    ]


def named(names, usual):
    """The same of names that a test looks up itself."""
    return cases({name: name for name in names}, usual)
