"""Multi-token prediction for JAX: train a model with n heads, and let it draft.

What most programs need is here, and is imported when it is first used: to import this
package imports no JAX. docs/python.md shows examples.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mtp_jax.checkpoint.restore import Restored, restore_model
    from mtp_jax.data.ngram_counts import count_corpus
    from mtp_jax.data.prepare import prepare
    from mtp_jax.decode.calibrate import calibrate
    from mtp_jax.decode.decoders.sampling import Sampling
    from mtp_jax.decode.generator import Generator
    from mtp_jax.eval.heldout import evaluate
    from mtp_jax.eval.outputs import head_outputs
    from mtp_jax.eval.task_run import evaluate_tasks
    from mtp_jax.exporting.export import export
    from mtp_jax.growth.grow import grow
    from mtp_jax.planning.plan import plan
    from mtp_jax.rehearsal.rehearsal import rehearse
    from mtp_jax.reports.report import report
    from mtp_jax.run.audit import audit
    from mtp_jax.run.import_model import import_model
    from mtp_jax.run.train import train
    from mtp_jax.run.workdirs import list_runs
    from mtp_jax.studies.runner import study
    from mtp_jax.verification.verifier import verify

__version__ = "0.1.0"

__all__ = [
    "Generator",
    "Restored",
    "Sampling",
    "audit",
    "calibrate",
    "count_corpus",
    "evaluate",
    "evaluate_tasks",
    "export",
    "grow",
    "head_outputs",
    "import_model",
    "list_runs",
    "plan",
    "prepare",
    "rehearse",
    "report",
    "restore_model",
    "study",
    "train",
    "verify",
]

_MODULES = {
    "Generator": "mtp_jax.decode.generator",
    "Restored": "mtp_jax.checkpoint.restore",
    "Sampling": "mtp_jax.decode.decoders.sampling",
    "audit": "mtp_jax.run.audit",
    "calibrate": "mtp_jax.decode.calibrate",
    "count_corpus": "mtp_jax.data.ngram_counts",
    "evaluate": "mtp_jax.eval.heldout",
    "evaluate_tasks": "mtp_jax.eval.task_run",
    "export": "mtp_jax.exporting.export",
    "grow": "mtp_jax.growth.grow",
    "head_outputs": "mtp_jax.eval.outputs",
    "import_model": "mtp_jax.run.import_model",
    "list_runs": "mtp_jax.run.workdirs",
    "plan": "mtp_jax.planning.plan",
    "prepare": "mtp_jax.data.prepare",
    "rehearse": "mtp_jax.rehearsal.rehearsal",
    "report": "mtp_jax.reports.report",
    "restore_model": "mtp_jax.checkpoint.restore",
    "study": "mtp_jax.studies.runner",
    "train": "mtp_jax.run.train",
    "verify": "mtp_jax.verification.verifier",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'mtp_jax' has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
