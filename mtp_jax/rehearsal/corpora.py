"""The corpora that a rehearsal reads, and may damage."""

import pathlib
import shutil
from collections.abc import Callable

from mtp_jax.config import Config
from mtp_jax.data.corpus import Corpus
from mtp_jax.data.prepare import prepare, summary

_SMALL_CORPUS = 64 * 2**20  # bytes; a larger one is not copied
_VOCABULARY = 512  # two bytes an id, so that there are ids that no model here has


def corpora_for(
    cfg: Config, folder: pathlib.Path, report: Callable[[str], None]
) -> tuple[list[str], int]:
    """Makes as many corpora as the config has; their folders and vocabulary's size.

    Copies of the config's own if they are there and small; otherwise the source of
    this package, shared out.

    Args:
      cfg: the production run.
      folder: gets the corpora, in `data`.
      report: gets a line about each corpus that is made.
    """
    names = [pathlib.Path(name) for name in cfg.data.sources]
    if all((name / "manifest.json").is_file() for name in names):
        files = [path for name in names for path in name.iterdir()]
        if sum(path.stat().st_size for path in files) <= _SMALL_CORPUS:
            copies = [folder / "data" / str(i) for i in range(len(names))]
            for name, copy in zip(names, copies, strict=True):
                shutil.copytree(name, copy)
            opened = [Corpus.open(copy) for copy in copies]
            return list(map(str, copies)), opened[0].tokenizer.vocab_size
    return _own_corpora(len(names), folder, report), _VOCABULARY


def _own_corpora(
    count: int, folder: pathlib.Path, report: Callable[[str], None]
) -> list[str]:
    """Corpora of this package's source files, dealt out in turn."""
    package = pathlib.Path(__file__).parent.parent
    texts = sorted(package.rglob("*.py"))
    made: list[str] = []
    for i in range(count):
        text, output = folder / "text" / str(i), folder / "data" / str(i)
        text.mkdir(parents=True)
        for path in texts[i::count]:
            # Files of different folders may have the same name.
            shutil.copy(path, text / "-".join(path.relative_to(package).parts))
        manifest = prepare(
            text,
            output,
            tokenizer=f"{made[0]}/tokenizer.model" if made else "bytes",
            train_tokenizer=None if made else _VOCABULARY,
            heldout=0,
            workers=1,  # starting processes would take longer
        )
        for line in (*summary(manifest), f"corpus in {output}"):
            report(line)
        made.append(str(output))
    return made
