"""Every test sees 8 fake CPU devices, warnings as errors and no implicit rank promotion."""

import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("WANDB_MODE", "disabled")

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
# Compilation rules the suite's time: half of it is LLVM's optimisation of what runs for a moment.
# Processes that a test starts have it; with JAX_DISABLE_MOST_OPTIMIZATIONS=0 every test has.
if "JAX_DISABLE_MOST_OPTIMIZATIONS" not in os.environ:
    jax.config.update("jax_disable_most_optimizations", True)
# What one run compiled, the next one reads.
CACHE = pathlib.Path(__file__).parents[1] / ".cache" / "jax"
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


@pytest.fixture
def x64():
    """Double precision for the test that asks for it."""
    with jax.enable_x64(True):
        yield
