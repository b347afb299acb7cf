"""Tracebacks show the user's own lines and the message."""

import re
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


class Gate(nnx.Module):
    def __init__(self):
        self.limit = jnp.zeros(2)

    def __call__(self, x):
        return 1 if x > self.limit[0] else 2


def branch(model, cfg, batch, *, rate):
    return 1 if model.w.sum() + batch["x"] > rate else 2


def of_stream():
    return 1 if jax.random.uniform(nnx.make_rng("noise")) > 0 else 2


def positive(x):
    return 1 if x > 0 else 2


CELL = nnx.Ref(jnp.ones(()), "params")
BATCH = {"x": 1.0}


@pytest.mark.parametrize(
    "call, text",
    [
        (
            lambda: nnx.jit(branch, static_argnums=1)(Dense(), 3, BATCH, rate=2.0),
            "the function branch at {here} for jit. {of}s model.w, batch['x'], and rate.",
        ),
        (
            lambda: nnx.jit(lambda m: m.calls + branch(m, 3, BATCH, rate=2.0), donate=True)(
                Dense()
            ),
            "{of} m.w.",
        ),
        (
            lambda: nnx.jit(Gate())(3.0),
            "the function __call__ at {here} for jit. {of}s self.limit and x.",
        ),
        (lambda: nnx.jit(lambda *xs: positive(xs[1]))(1.0, 2.0), "{of} xs[1]."),
        (
            lambda: nnx.jit(lambda: positive(CELL.value))(),
            "{of} CELL.value.",
        ),
        (lambda: nnx.jit(lambda r: positive(r.value))(CELL), "{of} r.value."),
        (
            lambda: nnx.jit(lambda m: nnx.grad(lambda m: m.w.sum() * positive(m.w.sum()))(m))(
                Dense()
            ),
            "{of} m.w.",
        ),
        (lambda: nnx.scan(lambda c, x: (c, positive(x)), None, jnp.ones(3)), "{of} x."),
        (
            lambda: nnx.remat(positive)(1.0),
            "the function positive at {here} for checkpoint / remat. {of} x.",
        ),
        (
            lambda: nnx.cond(True, lambda: positive(CELL.value), lambda: 2),
            "function <lambda> at {here}",
        ),
    ],
)
def test_errors_about_tracers_have_the_names_of_the_user(call, text):
    with pytest.raises(jax.errors.ConcretizationTypeError) as info:
        call()
    said = re.sub(r"\S*test_tracebacks.py:\d+", "{here}", str(info.value))
    of = "This concrete value was not available in Python because it depends on the value{s} of the argument"
    said = said.replace(of.format(s=""), "{of}").replace(of.format(s="s"), "{of}")
    assert text in said


def test_the_donated_and_the_streams_of_a_scope_have_names():
    model = Dense()

    @nnx.jit(donate=True)
    def step(model, x):
        model.w = model.w + 1
        return positive(model.w.sum()) if x.shape[0] > 1 else x

    step(model, jnp.ones(1))
    with pytest.raises(jax.errors.ConcretizationTypeError) as info:
        step(model, jnp.ones(2))
    assert "the value of the argument model.w." in str(info.value)
    with pytest.raises(jax.errors.ConcretizationTypeError) as info, nnx.scope(0):
        nnx.jit(of_stream)()
    assert "scope.streams.default.key" in str(info.value)


def test_what_plain_jax_traces_gets_no_note():
    with pytest.raises(jax.errors.ConcretizationTypeError) as info:
        nnx.jit(lambda x: jax.jit(positive)(x))(1.0)
    assert not [n for n in info.value.__notes__ if n.startswith("nnx: ")]
