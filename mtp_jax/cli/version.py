"""The text of `mtp-jax --version`: what a bug report needs to say."""

import importlib.metadata
import platform

from mtp_jax import __version__

_PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "numpy",
)
_REPORT = """\
To report a bug, send these lines, the command line, and all that it printed, the
traceback too; of a run also run.json from its workdir."""


def version_text() -> str:
    """Versions of this package and of what it stands on, a line each."""
    lines = [f"mtp_jax {__version__}", f"Python {platform.python_version()}"]
    lines += [f"{name} {_version(name)}" for name in _PACKAGES]
    return "\n".join([*lines, f"platform {platform.platform()}", "", _REPORT])


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
