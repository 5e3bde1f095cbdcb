"""Kernels of our own for decoding on a CPU in float32, in C++, behind XLA's interface.

XLA's take up to twice as long for the four or eight tokens of a drafting pass as for
one, and round differently with the number of tokens. Here every sum has an order of its
own: a token gives the same bits among any others as alone, so that verifying drafts
together is exact, near-ties included.

They are compiled for this machine when they are first asked for, by the compiler that
$CXX names or else `c++`, and kept in the user's cache folder. Without a compiler, or
with CXX set to nothing, decoding uses XLA's.

Axes: B batch, W new tokens, M tokens, I inputs, P panels, J outputs of a panel, D model
width, S slots, H query heads, G key-value heads, K head width.
"""

import ctypes
import functools
import hashlib
import os
import pathlib
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
from jax.typing import DTypeLike

_FOLDER = pathlib.Path(__file__).parent
_SOURCE = _FOLDER / "native.cc"
_NAMES = ("mtp_jax_product", "mtp_jax_rms_norm", "mtp_jax_attention")  # there
_BUILD_S = 120  # seconds that a compiler may take


def serves(dtype: DTypeLike) -> bool:
    """True if a CPU has these kernels: for float32, and if they compile."""
    return jnp.dtype(dtype) == jnp.float32 and _loaded() is not None


def width() -> int:
    """J: outputs of a panel, which goes with the registers of this processor.

    Only where the kernels serve.
    """
    library = _loaded()
    assert library is not None
    return ctypes.c_int.in_dll(library, "mtp_jax_width").value


def product(x_MI: jax.Array, w_PIJ: jax.Array) -> jax.Array:
    """x times a matrix packed by `packed_weights.pack`, float32 [M, P J]."""
    p, _, j = w_PIJ.shape
    return _call(_NAMES[0], (x_MI.shape[0], p * j))(x_MI, w_PIJ)


def rms_norm(x_MD: jax.Array, scale_D: jax.Array, eps: float) -> jax.Array:
    """Root-mean-square norm (arXiv:1910.07467, equation 4), float32 [M, D]."""
    return _call(_NAMES[1], x_MD.shape)(x_MD, scale_D, eps=np.float32(eps))


def attention(
    q_BWHK: jax.Array,
    k_BGSK: jax.Array,
    v_BGSK: jax.Array,
    start_B: jax.Array,
    ancestors_WW: np.ndarray | None,
    window: int = 0,
) -> jax.Array:
    """New tokens read the cache, float32 [B, W, H, K]; see `cached_attention`.

    Slots that nobody sees are not read.
    """
    if ancestors_WW is None:
        ancestors_WW = np.zeros((0, 0), bool)
    call = _call(_NAMES[2], q_BWHK.shape)
    return call(q_BWHK, k_BGSK, v_BGSK, start_B, ancestors_WW, window=np.int64(window))


def _call(name: str, shape: tuple[int, ...]):
    """The kernel of a name, which gives float32 of a shape."""
    result = jax.ShapeDtypeStruct(shape, jnp.float32)
    return jax.ffi.ffi_call(name, result, vmap_method="sequential")


@functools.cache
def _loaded() -> ctypes.CDLL | None:
    """Builds them and tells XLA of them, once; says on stderr if that fails."""
    try:
        compiler = shlex.split(os.environ.get("CXX", "c++"))
    except ValueError:  # a quote without its other half
        return None
    if not compiler or shutil.which(compiler[0]) is None:
        return None
    try:
        library = ctypes.CDLL(str(_library(compiler)))
        functions = {name: getattr(library, name) for name in _NAMES}
    # The last one: who runs this has no home.
    except (OSError, subprocess.SubprocessError, RuntimeError) as error:
        reason = str(getattr(error, "stderr", None) or "").strip() or str(error)
        print(
            f"mtp-jax: warning: {shlex.join(compiler)} cannot compile {_SOURCE.name}, "
            "decoding takes longer without; CXX= leaves it off: "
            f"{reason.splitlines()[0]}",
            file=sys.stderr,
        )
        return None
    for name, function in functions.items():
        capsule = jax.ffi.pycapsule(function)
        jax.ffi.register_ffi_target(name, capsule, platform="cpu")
    return library


def _library(compiler: list[str]) -> pathlib.Path:
    """The compiled program, made unless it is there for this source and processor."""
    is_arm = platform.machine().lower() in ("arm64", "aarch64")
    native = "-mcpu=native" if is_arm else "-march=native"
    command = [*compiler, "-std=c++17", "-O3", "-ffp-contract=off", native]
    # What the compiler has to say of itself and of the processor.
    macros = _run([*command, "-dM", "-E", "-x", "c++", os.devnull])
    sources = [p.read_text() for p in sorted(_FOLDER.glob("*.h"))]
    text = "\n".join(
        [*sources, _SOURCE.read_text(), macros, jaxlib.__version__, *command]
    )
    name = f"mtp_jax-{hashlib.sha256(text.encode()).hexdigest()[:16]}.so"

    root = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    folder = pathlib.Path(root) / "mtp_jax"
    library = folder / name
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as made:
            out = pathlib.Path(made) / name
            shared = ["-fPIC", "-shared", f"-I{jax.ffi.include_dir()}"]
            _run([*command, *shared, str(_SOURCE), "-o", str(out)])
            out.replace(library)  # whole, whoever else makes it at the same time
    return library


def _run(command: list[str]) -> str:
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=_BUILD_S
    )
    return done.stdout
