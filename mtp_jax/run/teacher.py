"""Another run's model as the teacher of this one."""

import jax

from mtp_jax.checkpoint.restore import Restored, restore_model
from mtp_jax.config import Config
from mtp_jax.data.tokenizer import Tokenizer
from mtp_jax.errors import UserError


def load_teacher(
    cfg: Config, mesh: jax.sharding.Mesh, tokenizer: Tokenizer
) -> Restored | None:
    """The model that `config.loss.teacher` names, on a mesh; None if it names none.

    Only its head 1 teaches.

    Raises:
      UserError: there is no such run, or its vocabulary or tokenizer is another.
    """
    workdir = cfg.loss.other_teacher
    if not workdir:
        return None
    teacher = restore_model(workdir, mesh=mesh)
    there, here = teacher.config.model.vocab_size, cfg.model.vocab_size
    if there != here:
        raise UserError(
            f"config.loss.teacher={workdir} has a vocabulary of {there}, and "
            f"config.model.vocab_size is {here}; name a run of the same vocabulary."
        )
    if teacher.tokenizer.fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"config.loss.teacher={workdir} has another tokenizer than the corpora of "
            "config.data.sources; name a run of the same one."
        )
    return teacher
