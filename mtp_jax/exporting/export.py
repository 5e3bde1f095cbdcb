"""A model of a workdir in a format of other programs."""

import contextlib
import functools
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any, Literal

from mtp_jax.checkpoint.restore import Restored, as_restored
from mtp_jax.distributed import hosts
from mtp_jax.errors import UserError, disk_errors_told
from mtp_jax.eval.heldout import evaluate
from mtp_jax.exporting.eagle3 import write_eagle3
from mtp_jax.exporting.fast_llm import require_plain_layers, write_fast_llm
from mtp_jax.exporting.gguf_file import write_gguf
from mtp_jax.exporting.hf import write_hf
from mtp_jax.exporting.meta import write_meta
from mtp_jax.exporting.parts import Parts, parts_of
from mtp_jax.storage import make_folder

Format = Literal["hf", "gguf", "meta", "fastllm", "eagle3"]
_CARD_BATCHES = 16  # held-out batches of the figures in a model card


def export(
    model: Restored | str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    format: Format = "hf",
    positions: int | None = None,
    shard_bytes: int = 5_000_000_000,
) -> list[str]:
    """Writes a model in another format, reads it again and compares it.

    Args:
      model: a restored model, or the workdir of a run.
      output: the folder to write; nothing may be there, and nothing is there if this
        fails.
      format: hf, for Hugging Face's transformers and all that load its family; gguf,
        for llama.cpp; meta, that of the models of arXiv:2404.19737; fastllm, Fast-LLM's
        mtp_llama; eagle3, head 2 as a drafter for vLLM.
      positions: the longest text that a reader is told of; None: that of training.
      shard_bytes: the most in one file, of hf.

    Returns:
      What the format does not hold, a line each.

    Raises:
      UserError: the folder is not empty, the format cannot hold the model, or a package
        that it needs is not installed.
      RunFailed: what was read again is not the model.
    """
    target = pathlib.Path(output)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"--output={output} is not empty; give a new folder.")
    restored = as_restored(model)
    parts = parts_of(restored)
    length = positions or parts.plain.rope.context or restored.config.data.seq_len
    if format != "hf":
        require_plain_layers(parts, format)
    whole = _whole_folder(target, f"--output={output}")
    with disk_errors_told(target), whole as folder:
        if format == "hf":
            figures = _figures(restored)
            of_hf = {"positions": length, "shard_bytes": shard_bytes}
            write_hf(parts, folder, figures=figures, **of_hf)
            return _lost(parts, f"drafting by {parts.dropped}")
        if format == "gguf":
            write_gguf(parts, folder, length)
            return _lost(parts, f"heads 2 to {parts.cfg.n_future_tokens}", always=True)
        write = {"meta": write_meta, "fastllm": write_fast_llm, "eagle3": write_eagle3}
        return write[format](parts, folder, length)


def _lost(parts: Parts, text: str, always: bool = False) -> list[str]:
    several = parts.cfg.n_future_tokens > 1
    return [text] if parts.dropped or (always and several) else []


def _figures(model: Restored) -> dict[str, Any] | None:
    """Figures on held-out text, None without it."""
    try:
        return evaluate(model, max_batches=_CARD_BATCHES)
    except UserError:  # corpora that were moved, or nothing held out
        return None


@contextlib.contextmanager
def _whole_folder(target: pathlib.Path, option: str) -> Iterator[pathlib.Path]:
    """A context with a folder to write to, which gets its name when all is well.

    Otherwise it is removed: by an error, and by a signal that ends the process.
    """
    target = pathlib.Path(os.path.abspath(target))
    part = target.with_name(f".{target.name[:100]}.{os.getpid()}")
    with hosts.undone(functools.partial(shutil.rmtree, part, ignore_errors=True)):
        make_folder(part, option)
        yield part
        if target.exists():
            target.rmdir()  # it is empty
        part.rename(target)
