"""Where a workdir is: a folder, or gs://bucket/... or s3://bucket/... of a store."""

import os

from etils import epath

from mtp_jax.errors import UserError


def workdir_at(text: str) -> epath.Path:
    """A path here or in an object store.

    Raises:
      UserError: what reaches that store is not installed.
    """
    path = epath.Path(text)
    if is_remote(path):
        try:
            path.exists()
        except ImportError as error:
            kind = "s3" if text.startswith("s3:") else "gcs"
            raise UserError(
                f"{text} cannot be reached ({error}); pip install 'mtp-jax[{kind}]'."
            ) from None
    return path


def is_remote(path: epath.Path) -> bool:
    """Whether it lies in an object store."""
    return "://" in os.fspath(path)


def absolute(path: epath.Path) -> epath.Path:
    """A local path from the root; one of an object store as it is."""
    return path if is_remote(path) else epath.Path(os.path.abspath(path))
