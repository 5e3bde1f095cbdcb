"""A model of other people as a workdir of ours, which every verb takes.

The workdir has a checkpoint of step 0, `run.json`, the tokenizer, and `import.json`:
where the model is from, the sha256 of its files, and which tensors were used.
"""

import dataclasses
import os
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from mtp_jax.checkpoint.checkpoints import Checkpoints
from mtp_jax.checkpoint.restore import Restored, mesh_for
from mtp_jax.checkpoint.workdir import new_workdir, refuse_taken, together
from mtp_jax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    Dtype,
    ModelConfig,
    TrainConfig,
    config_to_json,
)
from mtp_jax.data.tokenizer import (
    Tokenizer,
    load_tokenizer,
    save_tokenizer,
    tokenizer_identity,
    tokenizer_of,
)
from mtp_jax.distributed import hosts
from mtp_jax.distributed.cluster import ProcessInfo
from mtp_jax.errors import RunFailed, UserError, disk_errors_told
from mtp_jax.eval.outputs import head_outputs
from mtp_jax.interop.formats import Foreign, open_foreign
from mtp_jax.interop.llama2c_tokenizer import is_tokenizer, llama2c_tokenizer
from mtp_jax.interop.places import check_names, places_of
from mtp_jax.interop.read_params import read_params
from mtp_jax.interop.reference import reference_logits
from mtp_jax.model.language_model import abstract_params
from mtp_jax.parallel.processes import compile_on_all, of_first
from mtp_jax.parallel.sharding import make_mesh
from mtp_jax.run.environment import environment
from mtp_jax.run.source_files import digests, refuse_other_sources
from mtp_jax.storage import absolute, is_remote, workdir_at, write_json
from mtp_jax.training.optim import make_optimizer
from mtp_jax.training.train_step import TrainState
from mtp_jax.training.wide import split

_CHECKED = 12  # tokens of the text by which an import checks itself
_OFF = 2e-3  # of the spread of logits, by which they may differ: of float32, both
_SEQ_LEN = 1024  # of rows, where the context is longer
_BATCH = 8
# Where an import looks for a tokenizer, in this order.
_TOKENIZERS = ("tokenizer.json", "tokenizer.model")


@dataclasses.dataclass(frozen=True)
class ImportReport:
    """The tensors of a model, and what an import did with them."""

    source: str  # the folder or file, from the root
    format: str  # "hf", "fastllm", "meta", "llama2c" or "gguf"
    family: str  # model_type, as "llama"
    sha256: dict[str, str]  # of each file with weights, by its path in the folder
    used: list[str]  # names of tensors
    ignored: dict[str, str]  # names of tensors, and why
    made: list[str]  # parameters that no tensor is behind
    parameters: int
    tied: bool
    context: int  # positions that the model is made for
    largest_difference: float  # of logits to those of the file by NumPy
    logits_deviation: float  # their spread, to compare it with


def import_model(
    source: str | os.PathLike[str],
    workdir: str | os.PathLike[str],
    *,
    tokenizer: str | None = None,
    seq_len: int | None = None,
    param_dtype: Dtype = "float32",
    compute_dtype: Dtype = "float32",
    train: TrainConfig | None = None,
    cluster: ProcessInfo | None = None,
) -> ImportReport:
    """Makes a workdir of a model in a format of other people.

    Formats: folders of Hugging Face (safetensors, one or many; Llama, Mistral, Qwen 2,
    2.5 and 3, Phi-3, OLMo 2, SmolLM2, TinyLlama), of Fast-LLM (`mtp_llama`) and of Meta
    (`consolidated.pth`, several heads), files of llama2.c and GGUF. Layers keep their
    order: the last one is head 1, those before it are the trunk. A folder that `export`
    wrote has its further heads, too. Every tensor must have
    its place and every place its tensor. At the end head outputs are compared with a
    forward pass in NumPy straight from the file.

    Where several processes run it, each reads what its devices hold of a safetensors
    file, and they write one workdir, which they must share. In such a process it can be
    called once: the processes part at the end, and if one fails, all end.

    Args:
      source: the folder or file; the same one on every host.
      workdir: folder to be made, here or in an object store; it must not be there, or
        be empty.
      tokenizer: `bytes`, a file or a folder, or one of llama2.c (tok*.bin); None: the
        one beside the weights, or the one that their file carries.
      seq_len: of the run's rows; None: the model's context, at most 1024.
      param_dtype: of the parameters that are kept.
      compute_dtype: of products and activations.
      train: `config.train` of the run, with how long processes wait for each other;
        None: as in every config.
      cluster: which process of how many this is; None: what a TPU pod, GKE, Slurm or
        Open MPI says, or one process alone.

    Raises:
      UserError: no format that is known, a field, tensor or value that is not, a file
        that is missing or damaged, no tokenizer, or a workdir that is not empty.
      RunFailed: the model that was made says something else than the file.
    """
    name, path = os.fspath(workdir), pathlib.Path(source)
    target = workdir_at(name)
    arguments = {
        "source": os.fspath(source),
        "workdir": name,
        "tokenizer": tokenizer,
        "seq_len": seq_len,
        "dtypes": (param_dtype, compute_dtype),
        "train": dataclasses.asdict(train := train or TrainConfig()),
    }
    with together(target, cluster, arguments, train), disk_errors_told(workdir):
        _refuse_taken(target, f"--workdir={name}")
        foreign = _opened(path)
        found = _tokenizer_for(foreign, _folder_of(path), tokenizer)
        refuse_other_sources(foreign, found)
        dtypes: Any = {"param_dtype": param_dtype, "compute_dtype": compute_dtype}
        model = dataclasses.replace(foreign.model, **dtypes)
        data = DataConfig(
            seq_len=seq_len or min(model.rope.context, _SEQ_LEN),
            batch_size=_BATCH * jax.device_count(),
        )
        cfg = Config(model=model, data=data, train=train)
        restored, used = _restored(foreign, cfg, found)
        report = _report(foreign, restored, path, used)
        with new_workdir(absolute(target), f"--workdir={name}") as folder:
            _write(folder, restored, report)
    return report


def _opened(path: pathlib.Path) -> Foreign:
    """A model of another format that has the layers of a model here."""
    foreign = open_foreign(path)
    if foreign.model.num_trunk_layers == 0:
        raise UserError(
            f"{foreign.source.where} has no layers besides those of head 1; a model "
            "here has a trunk below them."
        )
    return foreign


def _restored(
    foreign: Foreign, cfg: Config, tokenizer: Tokenizer
) -> tuple[Restored, list[str]]:
    """The model on all devices, and the names of tensors that it is of."""
    mesh = make_mesh(mesh_for(cfg.model))
    with jax.set_mesh(mesh):
        params, used = _params(foreign, cfg.model)
    hosts.wait_for_all("the tensors are read")
    return Restored(cfg, params, mesh, 0, tokenizer), used


def _report(
    foreign: Foreign, restored: Restored, source: pathlib.Path, used: list[str]
) -> ImportReport:
    """The report of a model that says what its file says.

    Raises:
      UserError: the file's logits are not finite.
      RunFailed: it says something else.
    """
    differs, deviation = _compared(foreign, restored)
    found = digests(foreign.source.files)
    model, folder = restored.config.model, _folder_of(source)
    return ImportReport(
        source=str(source.resolve()),
        format=foreign.format,
        family=foreign.family,
        sha256={os.path.relpath(path, folder): x for path, x in found.items()},
        used=used,
        ignored=foreign.ignored,
        made=[],
        parameters=sum(x.size for x in jax.tree.leaves(restored.params)),
        tied=model.tie_embeddings,
        context=model.rope.context,
        largest_difference=differs,
        logits_deviation=deviation,
    )


def _folder_of(source: pathlib.Path) -> pathlib.Path:
    return source if source.is_dir() else source.parent


def _refuse_taken(target: epath.Path, option: str) -> None:
    refuse_taken(target, option)
    if is_remote(target):
        return
    folder = pathlib.Path(absolute(target))
    if not os.access(_there(folder.parent), os.W_OK):
        raise UserError(f"{option} cannot be written.")


def _there(folder: pathlib.Path) -> pathlib.Path:
    """The folder, or the nearest one above it that there is."""
    return folder if folder.exists() else _there(folder.parent)


def _tokenizer_for(
    foreign: Foreign, folder: pathlib.Path, given: str | None
) -> Tokenizer:
    """The tokenizer that is asked for, the one beside the weights, or theirs.

    Raises:
      UserError: there is none, it cannot be read, or has more ids than the model.
    """
    if given is None:
        there = [name for name in _TOKENIZERS if (folder / name).exists()]
        given = str(folder / there[0]) if there else None
    if given is not None and is_tokenizer(pathlib.Path(given)):
        files = llama2c_tokenizer(pathlib.Path(given))
        tokenizer = tokenizer_of("tokenizer.json", files, given)
    elif given is not None:
        tokenizer = load_tokenizer(given)
    elif foreign.tokenizer is not None:
        given = f"of {foreign.source.where}"
        tokenizer = tokenizer_of("tokenizer.json", foreign.tokenizer(), given)
    else:
        raise UserError(
            f"{folder} has no tokenizer ({', '.join(_TOKENIZERS)}, or tokenizer.bin "
            "of llama2.c); give one with --tokenizer=PATH."
        )
    if tokenizer.vocab_size > foreign.model.vocab_size:
        raise UserError(
            f"tokenizer {given} has {tokenizer.vocab_size} ids, and the model in "
            f"{foreign.source.where} {foreign.model.vocab_size}; it is another one's."
        )
    return tokenizer


def _params(foreign: Foreign, model: ModelConfig) -> tuple[Any, list[str]]:
    """The parameters on the mesh that is set, and the names of what they are from."""
    abstract = abstract_params(model)
    places = places_of(model, foreign.names, abstract)
    used = check_names(places, foreign.needed, foreign.source.where)
    return read_params(abstract, places, foreign.source), used


def _compared(foreign: Foreign, restored: Restored) -> tuple[float, float]:
    """The largest difference of logits to the file's own, and the logits' deviation.

    Raises:
      UserError: logits of the file are not finite.
      RunFailed: it is more than rounding.
    """
    model = restored.config.model
    rng = np.random.default_rng(0)
    ids_T = rng.integers(0, model.vocab_size, _CHECKED)
    wide = dataclasses.replace(model, compute_dtype="float32")
    config = dataclasses.replace(restored.config, model=wide)
    in_float32 = dataclasses.replace(restored, config=config)
    found_NTV = np.asarray(head_outputs(in_float32, ids_T[None]).logits_NBTV)[:, 0]
    off, deviation = 0.0, 0.0
    if jax.process_index() == 0:  # it reads all of the file once more
        exact_NTV = reference_logits(foreign, ids_T)
        off = float(np.abs(found_NTV - exact_NTV).max())
        deviation = float(exact_NTV.std())
    off, deviation = (float(x) for x in of_first((off, deviation)))
    if not np.isfinite(deviation):
        raise UserError(
            f"{foreign.source.where} has weights that are not finite, or so large that "
            "its logits are not; is it damaged?"
        )
    allowed = _OFF if model.param_dtype == "float32" else 0.1
    if not off <= allowed * max(deviation, 1e-6):
        raise RunFailed(
            f"the model made of {foreign.source.where} says something else than the "
            f"file: logits differ by {off:.3g}, and their deviation is {deviation:.3g}"
        )
    return off, deviation


def _write(folder: epath.Path, restored: Restored, report: ImportReport) -> None:
    """Writes the checkpoint of step 0 and small files; `run.json` comes last."""
    cfg, identity = restored.config, tokenizer_identity(restored.tokenizer)
    with jax.set_mesh(restored.mesh):
        state = _state(cfg, restored.params)
    checkpoints = Checkpoints(folder, CheckpointConfig())
    metadata = {
        "config": config_to_json(cfg),
        "data": {"batches": 0, "rows": 0, "corpora": []},
        "tokenizer": identity,
        "seconds": {},
    }
    checkpoints.save(0, state, metadata)
    checkpoints.close()
    if jax.process_index() != 0:
        return
    save_tokenizer(restored.tokenizer, folder)
    write_json(folder / "import.json", dataclasses.asdict(report))
    content = {
        "config": config_to_json(cfg),
        "tokenizer": identity,
        **environment(restored.mesh),
        "imported": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "runs": [],
    }
    write_json(folder / "run.json", content)


def _state(cfg: Config, params: Any) -> TrainState:
    """A state to train from that has learned nothing yet."""
    optimizer = make_optimizer(cfg.optim, cfg.train.steps)

    @jax.jit
    def make(params: Any, key: jax.Array) -> TrainState:
        wide = jax.tree.map(lambda x: x.astype(jnp.float32), params)
        kept, rounded_off = split(wide, cfg.model.param_dtype)
        zero = jnp.zeros((), jnp.int32)
        return TrainState(
            step=zero,
            bad_steps=zero,
            key=jax.random.key_data(key),
            params=kept,
            opt_state=optimizer.init(wide),
            rounded_off=rounded_off,
        )

    key = jax.random.key(cfg.train.seed)
    compile_on_all(make, params, key)
    return make(params, key)
