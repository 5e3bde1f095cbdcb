"""What vLLM calls in each of its processes: the model class gets its name."""

import re

from mtp_vllm.folder import ARCHITECTURE

FIRST, BEFORE = (0, 32), (0, 33)  # versions of vLLM that are known to serve


def served_versions() -> str:
    """The range of versions, as in a requirement."""
    first, before = (".".join(map(str, x)) for x in (FIRST, BEFORE))
    return f">={first},<{before}"


def why_not(version: str) -> str:
    """Why a version of vLLM is not served, one line; empty if it is."""
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers and FIRST <= tuple(map(int, numbers.groups())) < BEFORE:
        return ""
    return (
        f"mtp_vllm needs vLLM {served_versions()}, and this is {version}: "
        f"{ARCHITECTURE} is not registered; other models are served as before."
    )


def register() -> None:
    """Registers the model class, once; with another vLLM it says so, and does not."""
    from vllm import ModelRegistry, __version__
    from vllm.logger import init_logger

    if reason := why_not(__version__):
        init_logger(f"vllm.{__name__}").warning(reason)
    elif ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, f"mtp_vllm.model:{ARCHITECTURE}")
