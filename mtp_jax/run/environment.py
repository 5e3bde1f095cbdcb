"""The software and hardware that a run runs on."""

import platform
import sys
from importlib import metadata
from typing import Any

import jax

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def environment(mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """Versions, devices, mesh and command line, as run.json has them."""
    device = jax.devices()[0]
    return {
        "versions": {
            "mtp_jax": _version("mtp-jax"),
            "python": platform.python_version(),
            **{name: _version(name) for name in _PACKAGES},
        },
        "device": {
            "platform": device.platform,
            "kind": device.device_kind,
            "count": jax.device_count(),
            "processes": jax.process_count(),
        },
        "mesh": dict(mesh.shape),
        "command": sys.argv,
    }


def _version(package: str) -> str | None:
    """The version of a package; None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
