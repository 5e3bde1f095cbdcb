"""The folder of a corpus, which appears complete or not at all."""

import contextlib
import errno
import os
import pathlib
import re
import secrets
import shutil
from collections.abc import Iterator

from mtp_jax.data.corpus import MANIFEST, own_files
from mtp_jax.errors import UserError

_SHARD = re.compile(r"(train|heldout)-\d{5,}\.(tokens|offsets|names|learned)")
# In the root of a file system, and left behind where prepare was killed.
_OF_NOBODY = re.compile(r"lost\+found|\.[0-9a-f]{8}\.partial")


@contextlib.contextmanager
def whole_folder(output: pathlib.Path, force: bool) -> Iterator[pathlib.Path]:
    """Gives a folder to write a corpus to; puts its files in place at the end.

    A folder that is there stays the same one, be it a mount point, where a link leads
    to, or the working directory: files are moved into it, the manifest last, without
    which it is no corpus. After an error nothing is left.

    Args:
      output: where the corpus is to be.
      force: replace an earlier corpus.

    Raises:
      UserError: it holds something else, or cannot be written; before anything is.
    """
    try:
        folder = pathlib.Path(os.path.realpath(output))
        if folder.is_symlink():  # still: links that go round
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        _check(output, folder, force)
        inside = folder.is_dir()
        name = f".{secrets.token_hex(4)}.partial"
        partial = folder / name if inside else folder.parent / f".{folder.name}{name}"
        made = [path for path in partial.parents if not path.exists()]
        partial.mkdir(parents=True)
    except OSError as error:
        raise _not_writable(output, error) from None
    try:
        yield partial
        try:
            if inside:
                _move_into(folder, partial)
            else:
                partial.rename(folder)
        except OSError as error:
            raise _not_writable(output, error) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        for path in made:  # those that were made for nothing
            with contextlib.suppress(OSError):
                path.rmdir()


def _check(output: pathlib.Path, folder: pathlib.Path, force: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output={output} is a file; name a directory.")
    if not folder.is_dir():
        return
    there = {p.name for p in folder.iterdir() if not _OF_NOBODY.fullmatch(p.name)}
    if foreign := there - _own(folder):
        raise UserError(
            f"--output={output} holds something that prepare did not write "
            f"({min(foreign)}); name another directory."
        )
    if there and not force:
        raise UserError(
            f"--output={output} holds a corpus already; name another directory, or "
            "replace it with --force."
        )


def _own(folder: pathlib.Path) -> set[str]:
    """Names of what prepare wrote there; of shards if it was killed before the end."""
    if not (folder / MANIFEST).exists():
        return {p.name for p in folder.iterdir() if _SHARD.fullmatch(p.name)}
    try:
        return own_files(folder)
    except (UserError, LookupError, TypeError, AttributeError):
        return set()


def _move_into(folder: pathlib.Path, partial: pathlib.Path) -> None:
    """Replaces the corpus of a folder by the new one."""
    earlier = _own(folder)
    for name in sorted(earlier, key=lambda name: name != MANIFEST):
        (folder / name).unlink(missing_ok=True)
    new = [path.name for path in partial.iterdir()]
    for name in sorted(new, key=lambda name: (name == MANIFEST, name)):
        (partial / name).rename(folder / name)
    partial.rmdir()


def _not_writable(output: pathlib.Path, error: OSError) -> UserError:
    return UserError(
        f"--output={output} cannot be written ({error.strerror}); name a directory "
        "that can."
    )
