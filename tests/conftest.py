"""Strict numerics, several CPU devices and reproducible hypothesis examples for every test."""

import collections
import gc
import importlib
import itertools
import os
from pathlib import Path

import hypothesis
import jax
import pytest

# A silent promotion or broadcast in a bound is a wrong certificate: make both an error.
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
# Nearly all of the time goes into compiling functions that run for milliseconds.
jax.config.update("jax_disable_most_optimizations", True)
# Tests, and the commands that they start, neither read nor write the user's compiled programs.
os.environ["BOUNDJAX_CACHE"] = "off"
# XLA ends the process on a flag that it does not know: for the versions that have them.
flags = []
if (0, 10) <= jax.__version_info__ < (0, 13):
    # Programs as small as these are less work as one module each than as up to 32 parts.
    flags.append("--xla_cpu_parallel_codegen_split_count=1")
if (0, 10) <= jax.__version_info__ < (0, 11):
    # The older code generator compiles small programs in half of the time.
    flags.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join([*flags, os.environ.get("XLA_FLAGS", "")])
# Tracing makes objects by the million, few of them in cycles; JAX adds work of its own to every
# collection.
gc.set_threshold(50_000, 20, 50)
# Before the backend starts: pmap and sharding need more than one device.
jax.config.update("jax_num_cpu_devices", 2)
# Fill the table of ops, which some tests replace by a copy.
importlib.import_module("boundjax.ops")

# The same few examples on every machine: compiled functions are shared between them, so the cost of
# a property is its compilation.
hypothesis.settings.register_profile(
    "boundjax",
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=3,
    suppress_health_check=list(hypothesis.HealthCheck),
)
# `pytest --hypothesis-profile=thorough`: other seeds every time, many more of them.
hypothesis.settings.register_profile(
    "thorough",
    database=None,
    deadline=None,
    max_examples=50,
    suppress_health_check=list(hypothesis.HealthCheck),
)
hypothesis.settings.load_profile("boundjax")

PROJECT = Path(__file__).resolve().parent.parent
MAPS = Path("/proc/self/maps")
# Below a third of Linux's limit of 65530 maps to a process, past which XLA's compiler crashes; and
# what they belong to is one or two GiB.
MOST_MAPS = 20_000
TORN_DOWN = itertools.count(1)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leaves all but every k-th example of a test marked `sampled(k)` to the night.

    So it does with the network that takes longest to compile.
    """
    seen: collections.Counter[str] = collections.Counter()
    for item in items:
        if "[counted" in item.nodeid:
            item.add_marker(pytest.mark.slow)
        mark = item.get_closest_marker("sampled")
        if mark is None or item.get_closest_marker("slow") is not None:
            continue
        test = item.nodeid.partition("[")[0]
        if seen[test] % mark.args[0]:
            item.add_marker(pytest.mark.slow)
        seen[test] += 1


def pytest_collection_finish() -> None:
    """What the imports made stays: no collection has to look at it again."""
    gc.collect()
    gc.freeze()


def pytest_runtest_teardown() -> None:
    """Every compiled program costs several memory maps: drops them before there are too many."""
    if next(TORN_DOWN) % 20 == 0 and MAPS.is_file():
        with MAPS.open() as maps:
            count = sum(1 for _ in maps)
        if count > MOST_MAPS:
            jax.clear_caches()


@pytest.fixture
def optimized():
    """Compiles as users do, for tests whose functions run long or whose last digits matter."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="session")
def project() -> Path:
    """The root of the checkout."""
    return PROJECT


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of golden bounds and data sets that lies beside the checkout.

    Tests that need it are skipped where it is absent: a clone from elsewhere does not have it.
    """
    folder = PROJECT.parent / "shared"
    if not folder.is_dir():
        pytest.skip(f"no folder {folder.name}/ beside the checkout (golden bounds, MNIST)")
    return folder
