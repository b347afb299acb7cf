"""`nnx.purify`, compared with a hand-written function of a dictionary and with jaxpurify."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jaxpurify

from benchmarks.timing import Contender, Ratio, interleave, repeat
from nnx.purify import param, purify

WIDTHS = (8, 16, 16, 4)
_X = jnp.ones((32, WIDTHS[0]))


def _network(get: Callable[[tuple[int, ...], str], jax.Array], x: jax.Array) -> jax.Array:
    for i, (a, b) in enumerate(zip(WIDTHS, WIDTHS[1:])):
        x = jnp.tanh(x @ get((a, b), f"w{i}") + get((b,), f"b{i}"))
    return x


def _by_hand(params: dict[str, jax.Array]) -> jax.Array:
    return _network(lambda shape, name: params[name], _X)


def measure(rounds: int) -> dict[str, dict[str, Ratio]]:
    """Ratios to the hand-written function, or to jaxpurify if that has no such operation."""
    ours = purify(lambda: _network(param, _X))
    theirs = jaxpurify.purify(lambda: _network(lambda s, n: jaxpurify.param(s, name=n), _X))
    params = ours.normal(jax.random.key(0))
    # jaxpurify names every parameter as we do.
    assert {k: v.shape for k, v in theirs.shapes().items()} == {
        k: v.shape for k, v in params.items()
    }
    for model in (ours, theirs):
        assert jnp.allclose(model(params), _by_hand(params), atol=1e-6)
    models = {"by hand": _by_hand, "nnx.purify": ours, "jaxpurify": theirs}

    def each(call: Callable[[Any], Any], *names: str) -> dict[str, Contender]:
        return {name: repeat(lambda m=models[name]: call(m)) for name in names or models}

    # Make a new function each time, because JAX caches the traces of an old one.
    traced: dict[str, Callable[[Any], Any]] = {
        "eager call": lambda m: m(params),
        "eager gradient": lambda m: jax.grad(lambda p: m(p).sum())(params),
        "make_jaxpr": lambda m: jax.make_jaxpr(lambda p: m(p))(params).jaxpr and None,
    }
    table = {
        name: interleave(each(call), "by hand", rounds=rounds) for name, call in traced.items()
    }
    compiled = {name: jax.jit(model) for name, model in models.items()}
    table["compiled call"] = interleave(
        {name: repeat(lambda f=f: f(params)) for name, f in compiled.items()},
        "by hand",
        rounds=rounds,
    )
    both = ("nnx.purify", "jaxpurify")
    table["shapes()"] = interleave(
        each(lambda m: m.shapes() and None, *both), "jaxpurify", rounds=rounds
    )
    return table
