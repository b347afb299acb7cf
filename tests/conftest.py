"""Settings that JAX needs before it starts, and modules that many tests use."""

import os

# Most of the time goes into compiling small programs that run once: what makes them quick to run is
# left out. The examples, which CI runs too, are compiled as users' programs are.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_force_host_platform_device_count=8"
    " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1",
)
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import gc

import jax.numpy as jnp
import numpy as np
import pytest

from tests.models import Dense, Net

# test_processes.py starts several processes of this program at once.
collect_ignore = ["nnx/processes.py"]


# These wait for other programs. If they ran last, one worker would wait alone.
SLOWEST = ("tests/test_docs_site.py", "tests/nnx/test_processes.py", "tests/test_types.py")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: not item.nodeid.startswith(SLOWEST))


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Nothing that an import makes is garbage."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


@pytest.fixture(scope="module", autouse=True)
def _frozen():
    """What is there before the tests of a file need not be looked through by the collections in it."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def dense():
    return Dense()


@pytest.fixture
def net():
    return Net()


@pytest.fixture
def data():
    rng = np.random.default_rng(0)
    return (
        jnp.asarray(rng.normal(size=(4, 2)), jnp.float32),
        jnp.asarray(rng.normal(size=(4, 2)), jnp.float32),
    )
