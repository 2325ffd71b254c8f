"""What every test runs under, and the fixtures that more than one folder of tests uses."""

import gc
import os
from pathlib import Path

# Tracing makes many small objects that live as long as a module's programs: Python's default looks
# through all of them again and again, a tenth of the time. `_release_programs` collects them.
gc.set_threshold(100_000, 50, 1000)

# Through the environment, and before anything imports jax, so that processes which a test starts
# run under the same rules. Set JAX_PLATFORMS yourself to run the tests on an accelerator.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["JAX_NUMPY_DTYPE_PROMOTION"] = "strict"
# Most of a test's time on a fresh clone is compilation: of code that runs once, on tiny shapes.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# Tests are many small programs: keep all but the quickest to compile from one run to the next.
if "JAX_COMPILATION_CACHE_DIR" in os.environ:
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")

import jax  # noqa: E402
import pytest  # noqa: E402

MAPS, MAPS_KEPT = Path("/proc/self/maps"), 20_000
GOLDENS = Path(__file__).parent / "goldens"


def pytest_configure() -> None:
    """Fail at once, and say why, if something imported jax before this file could configure it."""
    promotion = jax.config.jax_numpy_dtype_promotion  # pyright: ignore[reportAttributeAccessIssue]
    if promotion != "strict":
        raise pytest.UsageError(
            f"jax_numpy_dtype_promotion is {promotion!r}, not 'strict': jax was imported before "
            "tests/conftest.py. Look for a pytest plugin that imports it."
        )


@pytest.fixture(scope="module", autouse=True)
def _release_programs():
    """Unloads what was compiled once it is too much: every program on the CPU holds memory maps, a
    process may have 65530 of them (vm.max_map_count), and one too many is a segmentation fault."""
    yield
    if MAPS.exists() and MAPS.read_bytes().count(b"\n") > MAPS_KEPT:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def shared_goldens() -> Path:
    """The folder of golden checkpoints: llada2_tiny and llada2_tiny_yarn.

    Each is a small Hugging Face style checkpoint with random fp32 weights, next to `goldens.npz`,
    the numbers that the released LLaDA2.0 model file gives on it. tests/goldens/README.md says
    what the keys mean. Read only: a test that changes a file copies the folder first.
    """
    return GOLDENS


@pytest.fixture(params=["llada2_tiny", "llada2_tiny_yarn"])
def golden_checkpoint(request: pytest.FixtureRequest, shared_goldens: Path) -> Path:
    """Each golden checkpoint in turn."""
    return shared_goldens / request.param
