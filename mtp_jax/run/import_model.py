"""A model of other people as a workdir of ours, which every verb takes.

The workdir has a checkpoint of step 0, `run.json`, the tokenizer, and `import.json`:
where the model is from, the sha256 of its files, and which tensors were used.
"""

import dataclasses
import hashlib
import math
import os
import pathlib
import shutil
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from mtp_jax.checkpoint.checkpoints import Checkpoints
from mtp_jax.checkpoint.restore import Restored
from mtp_jax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    Dtype,
    MeshConfig,
    config_to_json,
)
from mtp_jax.data.tokenizer import (
    Tokenizer,
    load_tokenizer,
    save_tokenizer,
    tokenizer_identity,
    tokenizer_of,
)
from mtp_jax.errors import RunFailed, UserError, disk_errors_told
from mtp_jax.eval.outputs import head_outputs
from mtp_jax.interop.formats import Foreign, open_foreign
from mtp_jax.interop.llama2c_tokenizer import is_tokenizer, llama2c_tokenizer
from mtp_jax.interop.places import check_names, places_of
from mtp_jax.interop.read_params import read_params
from mtp_jax.interop.reference import reference_logits
from mtp_jax.model.language_model import model_builder
from mtp_jax.parallel.sharding import abstract_tree, make_mesh
from mtp_jax.run.environment import environment
from mtp_jax.storage import write_json
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
) -> ImportReport:
    """Makes a workdir of a model in a format of other people.

    Formats: folders of Hugging Face (safetensors, one or many; Llama, Mistral, Qwen 2,
    2.5 and 3, Phi-3, OLMo 2, SmolLM2, TinyLlama), of Fast-LLM (`mtp_llama`) and of Meta
    (`consolidated.pth`, several heads), files of llama2.c and GGUF. Layers keep their
    order: the last one is head 1, those before it are the trunk. A folder that `export`
    wrote has its further heads, too. Every tensor must have
    its place and every place its tensor. At the end head outputs are compared with a
    forward pass in NumPy straight from the file.

    Args:
      source: the folder or file.
      workdir: folder to be made, here; it must not be there, or be empty.
      tokenizer: `bytes`, a file or a folder, or one of llama2.c (tok*.bin); None: the
        one beside the weights, or the one that their file carries.
      seq_len: of the run's rows; None: the model's context, at most 1024.
      param_dtype: of the parameters that are kept.
      compute_dtype: of products and activations.

    Raises:
      UserError: no format that is known, a field, tensor or value that is not, a file
        that is missing or damaged, no tokenizer, or a workdir that is not empty.
      RunFailed: the model that was made says something else than the file.
    """
    target = pathlib.Path(os.path.abspath(workdir))
    _refuse_taken(target, os.fspath(workdir))
    foreign = open_foreign(pathlib.Path(source))
    if foreign.model.num_trunk_layers == 0:
        raise UserError(
            f"{foreign.source.where} has no layers besides those of head 1; a model "
            "here has a trunk below them."
        )
    folder = pathlib.Path(source)
    folder = folder if folder.is_dir() else folder.parent
    found = _tokenizer_for(foreign, folder, tokenizer)
    model = dataclasses.replace(
        foreign.model, param_dtype=param_dtype, compute_dtype=compute_dtype
    )
    context = model.rope.context
    data = DataConfig(
        seq_len=seq_len or min(context, _SEQ_LEN),
        batch_size=_BATCH * jax.device_count(),
    )
    cfg = Config(model=model, data=data)
    mesh = make_mesh(_mesh_for(cfg))
    with jax.set_mesh(mesh):
        params, used = _params(foreign, model, mesh)
    restored = Restored(cfg, params, mesh, 0, found)
    differs, deviation = _compared(foreign, restored)
    report = ImportReport(
        source=str(pathlib.Path(source).resolve()),
        format=foreign.format,
        family=foreign.family,
        sha256={
            os.path.relpath(path, folder): _sha256(path)
            for path in foreign.source.files
        },
        used=used,
        ignored=foreign.ignored,
        made=[],
        parameters=sum(x.size for x in jax.tree.leaves(params)),
        tied=model.tie_embeddings,
        context=context,
        largest_difference=differs,
        logits_deviation=deviation,
    )
    with disk_errors_told(workdir):
        _write(target, restored, report)
    return report


def _refuse_taken(target: pathlib.Path, name: str) -> None:
    if "://" in name:
        raise UserError(f"--workdir={name}: an import writes to a folder here.")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"--workdir={name} is not empty; give a new folder.")
    if not os.access(_there(target.parent), os.W_OK):
        raise UserError(f"--workdir={name} cannot be written.")


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


def _mesh_for(cfg: Config) -> MeshConfig:
    """As many fsdp shards as widths divide into, and copies else."""
    rank = cfg.model.heads.markov_rank  # 0, which everything divides, without a bias
    fsdp = math.gcd(cfg.model.d_model, rank, jax.device_count())
    return MeshConfig(replica=-1, fsdp=fsdp)


def _params(
    foreign: Foreign, model: Any, mesh: jax.sharding.Mesh
) -> tuple[Any, list[str]]:
    """The parameters on the mesh, and the names of tensors that they are from."""
    init, _ = model_builder(model)
    abstract = abstract_tree(jax.eval_shape(init, jax.random.key(0)), mesh)
    places = places_of(model, foreign.names, abstract)
    used = check_names(places, foreign.needed, foreign.source.where)
    return read_params(abstract, places, foreign.source), used


def _compared(foreign: Foreign, restored: Restored) -> tuple[float, float]:
    """The largest difference of logits to the file's own, and the logits' deviation.

    Raises:
      RunFailed: it is more than rounding.
    """
    model = restored.config.model
    rng = np.random.default_rng(0)
    ids_T = rng.integers(0, model.vocab_size, _CHECKED)
    exact_NTV = reference_logits(foreign, ids_T)
    wide = dataclasses.replace(model, compute_dtype="float32")
    config = dataclasses.replace(restored.config, model=wide)
    in_float32 = dataclasses.replace(restored, config=config)
    found_NTV = np.asarray(head_outputs(in_float32, ids_T[None]).logits_NBTV)[:, 0]
    off, deviation = float(np.abs(found_NTV - exact_NTV).max()), float(exact_NTV.std())
    allowed = _OFF if model.param_dtype == "float32" else 0.1
    if not off <= allowed * max(deviation, 1e-6):
        raise RunFailed(
            f"the model made of {foreign.source.where} says something else than the "
            f"file: logits differ by {off:.3g}, and their deviation is {deviation:.3g}"
        )
    return off, deviation


def _sha256(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write(target: pathlib.Path, restored: Restored, report: ImportReport) -> None:
    """The workdir, whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.parent / f".{target.name[:100]}.{os.getpid()}"
    try:
        part.mkdir()
        save_tokenizer(restored.tokenizer, epath.Path(part))
        _save(part, restored)
        write_json(part / "import.json", dataclasses.asdict(report))
        if target.exists():
            target.rmdir()  # it is empty
        part.rename(target)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def _save(folder: pathlib.Path, restored: Restored) -> None:
    """The checkpoint of step 0, and `run.json`."""
    cfg, identity = restored.config, tokenizer_identity(restored.tokenizer)
    with jax.set_mesh(restored.mesh):
        state = _state(cfg, restored.params)
    checkpoints = Checkpoints(epath.Path(folder), CheckpointConfig())
    metadata = {
        "config": config_to_json(cfg),
        "data": {"batches": 0, "rows": 0, "corpora": []},
        "tokenizer": identity,
        "seconds": {},
    }
    checkpoints.save(0, state, metadata)
    checkpoints.close()
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

    return make(params, jax.random.key(cfg.train.seed))
