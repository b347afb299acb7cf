"""Settings that JAX needs before it starts, and modules that many tests use."""

import os

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
# Most of the time goes into compiling small programs that run once. The examples, which CI runs
# too, are compiled as users' programs are.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import jax.numpy as jnp
import numpy as np
import pytest

from tests.models import Dense, Net

# test_processes.py starts several processes of this program at once.
collect_ignore = ["nnx/processes.py"]


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
