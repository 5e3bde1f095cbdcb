"""Eight host devices and a compilation cache, for every test."""

import os

import jax
import pytest

# Read when the first device is asked for. A pool of fewer threads than devices can
# deadlock in a collective; unoptimised programs compile faster than they run slower.
os.environ.setdefault("NPROC", "16")
if os.environ.get("O0", "1") == "1":
    _FLAGS = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{_FLAGS} --xla_backend_optimization_level=0".strip()
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update(
    "jax_compilation_cache_dir", os.environ.get("CC", ".pytest_cache/jax")
)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
jax.config.update("jax_numpy_rank_promotion", "raise")
