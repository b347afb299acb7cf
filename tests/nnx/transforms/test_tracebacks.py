"""What a person reads when something goes wrong: their own lines, and the message."""

import traceback

import jax
import jax.numpy as jnp
import pytest

import nnx
from tests.models import Dense


def loss(model, x):
    return model(x).sum()


@nnx.jit
def step(model, x):
    grads = nnx.grad(loss)(model, x)
    model["params"] = jax.tree.map(lambda w, g: w - g, model["params"], grads)


def wrong_write(model, x):
    model["params"] = {"w": x}


def files(error):
    return [
        frame.filename.rsplit("/", 1)[-1] for frame in traceback.extract_tb(error.__traceback__)
    ]


@pytest.mark.parametrize(
    "call, most",
    [
        (lambda m: step(m, jnp.ones((2, 5))), 6),
        (lambda m: nnx.jit(wrong_write)(m, jnp.ones(3)), 3),
        (lambda m: nnx.grad(wrong_write)(m, jnp.ones(3)), 6),
        (lambda m: nnx.jit(nnx.vmap(lambda x: nnx.scan(lambda c, _: (c, wrong_write(m, x)), None, None, length=2)))(jnp.ones((2, 3))), 6),
    ],
)  # fmt: skip
def test_tracebacks_are_short(call, most):
    with pytest.raises((TypeError, nnx.RefError)) as caught:
        call(Dense())
    found = files(caught.value)
    # One for pytest's own frame here, and the user's and one for each transformation.
    assert len(found) <= most + 1, found
    assert not any(name in found for name in ("call.py", "trace.py", "dag.py"))
    assert found.count("test_tracebacks.py") >= 2


def test_all_of_it_on_demand():
    jax.config.update("jax_traceback_filtering", "off")
    try:
        with pytest.raises(nnx.ShapeError) as caught:
            nnx.jit(wrong_write)(Dense(), jnp.ones(3))
    finally:
        jax.config.update("jax_traceback_filtering", "auto")
    assert "boundary.py" in files(caught.value)
