"""Copies and pickles of jitted functions, and functions that cannot be jitted at all."""

import copy
import functools
import pickle
from typing import Any, cast

import jax
import jax.numpy as jnp
import pytest

import nnx


def double(x, n=2):
    return x * n


fast = nnx.jit(double, static_argnames="n")


@nnx.jit
def step(model, x):
    model.w = model.w + x


class Fast(nnx.Module):
    """Holds its own jitted method."""

    w: jax.Array = nnx.param()

    def __init__(self):
        self.w = jnp.array(2.0)
        self.fast = nnx.jit(self.forward)

    def forward(self, x):
        return x * self.w

    @nnx.jit
    def add(self, x):
        self.w = self.w + x

    def __call__(self, x):
        return self.fast(x)


def pickled(x):
    return pickle.loads(pickle.dumps(x))


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_a_model_with_its_own_jitted_method(copied):
    model = Fast()
    assert model(3.0) == 6
    other = copied(model)
    other.w = jnp.array(5.0)
    assert (model(3.0), other(3.0)) == (6, 15)
    other.add(1.0)
    assert (model.w, other.w) == (2, 6)
    assert nnx.split(model)[0] is nnx.split(other)[0]


def test_a_method_copied_by_itself_takes_its_module_along():
    model = Fast()
    for other in (copy.deepcopy(model.fast), pickled(model.fast)):
        model.w = jnp.array(7.0)
        assert other(3.0) == 6
        model.w = jnp.array(2.0)
    twin = copy.deepcopy(model.fast)
    assert twin.__wrapped__.__self__.fast is twin


def test_a_partial_is_copied_with_what_it_holds():
    table = {"n": jnp.array(2)}
    g = nnx.jit(functools.partial(lambda t, x: t["n"] * x, table))
    twin = copy.deepcopy(g)
    table["n"] = jnp.array(3)
    assert twin is not g and twin(1) == 2


def test_a_jitted_function_is_its_own_deep_copy():
    traces = []
    f = nnx.jit(lambda x: traces.append(x) or x)
    f(1.0)
    assert copy.deepcopy(f) is f and copy.deepcopy({"f": f})["f"](2.0) == 2
    assert len(traces) == 1
    assert copy.copy(f)(2.0) == 2


def test_pickles_of_functions_of_a_module():
    again = pickled(fast)
    assert again is not fast and again(jnp.ones(2), n=3).tolist() == [3, 3]
    assert again.trace(jnp.ones(2), n=4).jaxpr.invars[0].aval.shape == (2,)
    # The name of a decorated function leads only to the decorated one.
    assert pickled(step) is step and pickled(Fast.add) is Fast.add
    model = Fast()
    pickled(step)(model, 1.0)
    assert model.w == 3


def test_local_functions_are_made_again_from_what_they_hold():
    @nnx.jit
    def local(x):
        return x + 1

    with pytest.raises((AttributeError, pickle.PicklingError), match=r"local object .*local"):
        pickle.dumps(local)
    # A pickler that knows local functions, such as cloudpickle, does this.
    kind, given = cast(Any, local).__reduce__()
    assert kind(*given)(1.0) == 2


async def later(x):
    return x


async def stream(x):
    yield x


def pieces(x):
    yield x


class Streams(nnx.Module):
    def __call__(self, x):
        yield x

    async def later(self, x):
        return x


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (later, "later is async"),
        (stream, "stream is async"),
        (pieces, r"pieces is a generator function .*nnx\.scan"),
        (Streams(), r"Streams\.__call__ is a generator function"),
        (Streams().later, r"Streams\.later is async.*await outside"),
    ],
    ids=["coroutine", "async generator", "generator", "module", "method"],
)
def test_what_runs_nothing_when_called_is_refused_at_once(fn, message):
    with pytest.raises(TypeError, match=message):
        nnx.jit(fn)
    with pytest.raises(TypeError, match=message):
        nnx.jit(donate=True)(fn)
