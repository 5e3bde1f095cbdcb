"""A plug-in for vLLM: models exported by mtp_jax draft for themselves."""

from mtp_vllm.folder import Refused, arguments

__all__ = ["Refused", "arguments"]
