"""The table in the docs of what works in every transformation, with a small program for each cell.

`docs/transforms.md` holds the table. The last test makes it again and compares, and
`UPDATE_DOCS=1 pytest tests/nnx/transforms/test_table.py` writes it.
"""

import functools
import os
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nnx

P = jax.sharding.PartitionSpec
PAGE = Path(__file__).parents[3] / "docs" / "transforms.md"


class Cell(nnx.Module):
    w: jax.Array = nnx.param()
    n: jax.Array = nnx.ref("counters")

    def __init__(self, w=2.0):
        self.w = jnp.array(w)
        self.n = jnp.array(0.0)


def _mesh():
    return jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))


def _custom_vjp(f):
    rule = nnx.custom_vjp(f)
    rule.defvjp(lambda *args: (f(*args), None), lambda *_: (None,) * 2)
    return rule


def _custom_jvp(f):
    rule = nnx.custom_jvp(f)

    def jvp(primals, tangents):
        out = f(*primals)
        return out, jax.tree.map(jnp.zeros_like, out)

    rule.defjvp(jvp)
    return rule


# For each transformation: a function that applies it to f(m, x), where f returns a scalar, and calls
# it; and whether f runs in it as an argument (m goes in) with keyword arguments too.
RUN = {
    "jit": lambda f, m, x: nnx.jit(f)(m, x),
    "grad": lambda f, m, x: nnx.grad(f)(m, x),
    "value_and_grad": lambda f, m, x: nnx.value_and_grad(f)(m, x),
    "vjp": lambda f, m, x: nnx.vjp(f, m, x)[0],
    "jvp": lambda f, m, x: nnx.jvp(f, (m, x), ({}, x))[0],
    "linearize": lambda f, m, x: nnx.linearize(f, m, x)[0],
    "jacrev": lambda f, m, x: nnx.jacrev(f)(m, x),
    "jacfwd": lambda f, m, x: nnx.jacfwd(f)(m, x),
    "hessian": lambda f, m, x: nnx.hessian(f)(m, x),
    "vmap": lambda f, m, x: nnx.vmap(f, in_axes=(None, None), axis_size=2)(m, x)[0],
    "scan": lambda f, m, x: nnx.scan(lambda c, y: (c, f(c, y)), m, x[None])[1],
    "map": lambda f, m, x: nnx.map(lambda y: f(m, y), x[None]),
    "fori_loop": lambda f, m, x: nnx.fori_loop(0, 1, lambda i, c: (f(c[0], x), c)[1], (m, x)),
    "while_loop": lambda f, m, x: nnx.while_loop(
        lambda c: c[1] < 1, lambda c: (f(c[0], x), (c[0], c[1] + 1))[1], (m, 0)
    ),
    "cond": lambda f, m, x: nnx.cond(True, f, f, m, x),
    "switch": lambda f, m, x: nnx.switch(0, [f, f], m, x),
    "remat": lambda f, m, x: nnx.remat(f)(m, x),
    "custom_vjp": lambda f, m, x: _custom_vjp(f)(m, x),
    "custom_jvp": lambda f, m, x: _custom_jvp(f)(m, x),
    "shard_map": lambda f, m, x: nnx.shard_map(
        f, mesh=_mesh(), in_specs=(P(), P()), out_specs=P()
    )(m, x),
    "checkify": lambda f, m, x: nnx.checkify(f)(m, x)[1],
    "capture": lambda f, m, x: nnx.capture(f, None)(m, x)[0],
    "patch": lambda f, m, x: nnx.patch(f, {})(m, x),
}  # fmt: skip
KEYWORDS = {
    "jit": lambda f, m, x: nnx.jit(f)(m=m, x=x),
    "grad": lambda f, m, x: nnx.grad(lambda m, *, k: f(k, x) * m.w)(Cell(), k=m),
    "value_and_grad": lambda f, m, x: nnx.value_and_grad(lambda m, *, k: f(k, x) * m.w)(Cell(), k=m),
    "jacrev": lambda f, m, x: nnx.jacrev(lambda m, *, k: f(k, x) * m.w)(Cell(), k=m),
    "jacfwd": lambda f, m, x: nnx.jacfwd(lambda m, *, k: f(k, x) * m.w)(Cell(), k=m),
    "hessian": lambda f, m, x: nnx.hessian(lambda m, *, k: f(k, x) * m.w)(Cell(), k=m),
    "remat": lambda f, m, x: nnx.remat(f)(m=m, x=x),
    "shard_map": lambda f, m, x: nnx.shard_map(f, mesh=_mesh(), in_specs=(), out_specs=P())(m=m, x=x),
    "checkify": lambda f, m, x: nnx.checkify(f)(m=m, x=x),
    "capture": lambda f, m, x: nnx.capture(f, None)(m, x=x),
    "patch": lambda f, m, x: nnx.patch(f, {})(m, x=x),
}  # fmt: skip
OUTPUT = {
    "jit": lambda f, m, x: nnx.jit(f)(m, x),
    "grad": lambda f, m, x: nnx.grad(lambda m, x: (m.w, f(m, x)), has_aux=True)(m, x)[1],
    "value_and_grad": lambda f, m, x: nnx.value_and_grad(lambda m, x: (m.w, f(m, x)), has_aux=True)(m, x)[0][1],
    "vjp": lambda f, m, x: nnx.vjp(lambda m, x: (m.w, f(m, x)), m, x, has_aux=True)[2],
    "jvp": lambda f, m, x: nnx.jvp(lambda m, x: (m.w, f(m, x)), (m, x), ({}, x), has_aux=True)[2],
    "linearize": lambda f, m, x: nnx.linearize(lambda m, x: (m.w, f(m, x)), m, x, has_aux=True)[2],
    "jacrev": lambda f, m, x: nnx.jacrev(lambda m, x: (m.w, f(m, x)), has_aux=True)(m, x)[1],
    "jacfwd": lambda f, m, x: nnx.jacfwd(lambda m, x: (m.w, f(m, x)), has_aux=True)(m, x)[1],
    "hessian": lambda f, m, x: nnx.hessian(lambda m, x: (m.w, f(m, x)), has_aux=True)(m, x)[1],
    "vmap": lambda f, m, x: nnx.vmap(f, in_axes=(None, None), axis_size=2)(m, x),
    "scan": lambda f, m, x: nnx.scan(lambda c, y: (c, f(c, y)), m, x[None])[1],
    "map": lambda f, m, x: nnx.map(lambda y: f(m, y), x[None]),
    "cond": lambda f, m, x: nnx.cond(True, f, f, m, x),
    "switch": lambda f, m, x: nnx.switch(0, [f, f], m, x),
    "remat": lambda f, m, x: nnx.remat(f)(m, x),
    "shard_map": lambda f, m, x: nnx.shard_map(f, mesh=_mesh(), in_specs=(P(), P()), out_specs=P())(m, x),
    "checkify": lambda f, m, x: nnx.checkify(f)(m, x)[1],
    "capture": lambda f, m, x: nnx.capture(f, None)(m, x)[0],
    "patch": lambda f, m, x: nnx.patch(f, {})(m, x),
}  # fmt: skip
X = jnp.array(3.0)


def scalar(m, x):
    return m.w * jnp.sum(x)


def writes(m, x):
    m.n = m.n + 1.0
    return scalar(m, x)


def in_args(name):
    m = Cell()
    RUN[name](writes, m, X)
    assert m.n == 1.0


def in_kwargs(name):
    m = Cell()
    KEYWORDS[name](writes, m, X)
    assert m.n == 1.0


def in_outputs(name):
    m = Cell()
    out = OUTPUT[name](lambda m, x: {"made": nnx.Ref(m.w * 2, "made"), "own": m}, m, X)
    assert out["own"] is m and out["made"].collection == "made"
    assert jnp.allclose(out["made"].value, 4.0)


def by_closure(name):
    m, other = Cell(), Cell()
    out = RUN[name](lambda m, x: scalar(m, x) * other.w, m, X)
    other.w = jnp.array(5.0)
    again = RUN[name](lambda m, x: scalar(m, x) * other.w, m, X)
    if isinstance(out, jax.Array):
        assert jnp.allclose(again, out * 2.5)
    RUN[name](lambda m, x: writes(other, x) * m.w, m, X)
    assert other.n == 1.0


def new_structure(name):
    m = Cell()

    def f(m, x):
        m.extra = nnx.Ref(m.w * 3, "extra")
        m.note = "seen"
        return scalar(m, x)

    RUN[name](f, m, X)
    assert jnp.allclose(m.extra.value, 6.0) and m.note == "seen"


def sharing(name):
    pair = nnx.Sequential(lambda x: x)
    pair.a = pair.b = Cell()

    def f(pair, x):
        assert pair.a is pair.b
        pair.a.n = pair.a.n + 1.0
        pair.b.n = pair.b.n + 1.0
        return scalar(pair.b, x)

    RUN[name](f, pair, X)
    assert pair.a is pair.b and pair.a.n == 2.0


def raises_cleanly(name):
    m = Cell()

    def f(m, x):
        writes(m, x)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        RUN[name](f, m, X)
    assert m.n == 0.0


def threads(name):
    models, errors = [Cell(float(i + 1)) for i in range(2)], []

    def work(m):
        try:
            for _ in range(2):
                RUN[name](writes, m, X)
        except BaseException as error:
            errors.append(error)

    running = [threading.Thread(target=work, args=(m,)) for m in models]
    for t in running:
        t.start()
    for t in running:
        t.join()
    assert not errors and [float(m.n) for m in models] == [2.0, 2.0]


class Inside(nnx.Module):
    """A model whose call applies the transformation to the call of a layer."""

    def __init__(self, name):
        self.layer, self.name = Layer(), name

    def __call__(self, x):
        return RUN[self.name](lambda layer, x: layer(x), self.layer, x)


class Layer(Cell):
    def __call__(self, x):
        return scalar(self, x)


def capture_inside(name):
    _, captured = nnx.capture(Inside(name), "layer")(X)
    assert jnp.allclose(captured["layer"], 6.0)


def patch_inside(name):
    before, patched = Inside(name)(X), nnx.patch(Inside(name), {"layer": lambda y: y * 3})(X)
    if before is not None and not isinstance(before, tuple):
        a, b = jax.tree.leaves(before), jax.tree.leaves(patched)
        assert all(jnp.allclose(3 * x, y) for x, y in zip(a, b, strict=True))


COLUMNS = {
    "arguments, writes propagate": in_args,
    "keyword arguments": in_kwargs,
    "outputs": in_outputs,
    "closures, read and written": by_closure,
    "new structure": new_structure,
    "sharing": sharing,
    "raises cleanly": raises_cleanly,
    "threads": threads,
    "`nnx.capture` inside": capture_inside,
    "`nnx.patch` inside": patch_inside,
}

NO_KEYWORDS = {"vjp", "jvp", "linearize", "vmap", "scan", "map", "fori_loop", "while_loop", "cond", "switch", "custom_vjp", "custom_jvp"}  # fmt: skip
CONSTANT = {"grad", "value_and_grad", "vjp", "jvp", "linearize", "jacrev", "jacfwd", "hessian"}
LOOPS = {"scan", "fori_loop", "while_loop"}

# The cells that are not "yes": the error that a user gets, or why there is none.
EXPECTED = {
    **{(n, "keyword arguments"): "as in jax: none" for n in NO_KEYWORDS},
    **{(n, "outputs"): "the carry" for n in ("fori_loop", "while_loop")},
    **{(n, "outputs"): "arrays only" for n in ("custom_vjp", "custom_jvp")},
    **{(n, "closures, read and written"): "TraceLevelError" for n in CONSTANT},
    **{(n, "new structure"): "StructureError" for n in LOOPS},
    ("map", "new structure"): "TraceLevelError",
    **{(n, "raises cleanly"): "as in Python" for n in ("capture", "patch")},
    **{(n, "`nnx.capture` inside"): "ProbeError" for n in ("custom_vjp", "custom_jvp")},
}
CASES = [(n, c) for n in RUN for c in COLUMNS if EXPECTED.get((n, c), "E").endswith(("E", "Error"))]


@pytest.mark.parametrize("name, column", CASES, ids=lambda x: x)
def test_cell(name, column):
    expected = EXPECTED.get((name, column))
    if expected is None:
        COLUMNS[column](name)
    else:
        with pytest.raises(getattr(nnx, expected)):
            COLUMNS[column](name)


# For scalar functions of (w, x): each transformation in plain JAX, reduced to a scalar.
PURE = {
    "jit": lambda g, w, x: jax.jit(g)(w, x),
    "grad": lambda g, w, x: jax.grad(g)(w, x),
    "vjp": lambda g, w, x: g(w, x),
    "jvp": lambda g, w, x: g(w, x),
    "linearize": lambda g, w, x: jax.linearize(g, w, x)[0],
    "jacrev": lambda g, w, x: jax.jacrev(g)(w, x),
    "jacfwd": lambda g, w, x: jax.jacfwd(g)(w, x),
    "hessian": lambda g, w, x: jax.hessian(g)(w, x),
    "vmap": lambda g, w, x: jax.vmap(g, (None, None), axis_size=2)(w, x)[0],
    "scan": lambda g, w, x: jax.lax.scan(lambda c, y: (c, g(w, y)), 0, x[None])[1][0],
    "map": lambda g, w, x: jax.lax.map(lambda y: g(w, y), x[None])[0],
    "cond": lambda g, w, x: jax.lax.cond(True, g, g, w, x),
    "switch": lambda g, w, x: jax.lax.switch(0, [g, g], w, x),
    "remat": lambda g, w, x: jax.checkpoint(g)(w, x),
    "shard_map": lambda g, w, x: g(w, x),
    "checkify": lambda g, w, x: g(w, x),
}  # fmt: skip
INNER = sorted(set(PURE) - {"checkify", "shard_map"})


def as_scalar(result):
    while isinstance(result, nnx.Partition):
        result = result["w"]
    return jnp.reshape(result, ())


@pytest.mark.parametrize("outer", PURE)
def test_every_transformation_in_every_other(outer):
    def pure(w, x, inner):
        return jnp.reshape(PURE[inner](lambda w, x: jnp.sin(w) * w * x, w, x), ())

    @jax.jit
    def all_expected(w, x):
        return {i: PURE[outer](functools.partial(pure, inner=i), w, x) for i in INNER}

    expected = jax.device_get(all_expected(jnp.array(0.7), X))
    for inner in INNER:
        m = Cell(0.7)

        def leaf(m, x):
            m.n = m.n + 1.0
            return jnp.sin(m.w) * m.w * x

        def body(m, x, inner=inner, leaf=leaf):
            return as_scalar(RUN[inner](leaf, m, x))

        result = as_scalar(RUN[outer](body, m, X))
        assert np.allclose(result, expected[inner], atol=1e-4), (outer, inner)
        assert m.n == 1.0, (outer, inner)


@pytest.mark.parametrize("outer", ["jit", "grad", "vmap", "scan", "cond", "remat"])
def test_no_nesting_leaks(outer):
    with jax.check_tracer_leaks():
        for inner in ("jit", "grad", "vmap", "scan", "cond", "remat", "custom_vjp"):
            m, other = Cell(), Cell()
            RUN[outer](lambda m, x: as_scalar(RUN[inner](writes, m, x)) * other.w, m, X)
            if outer != "grad" and inner != "grad":
                RUN[outer](lambda m, x: as_scalar(RUN[inner](writes, other, x)) * m.w, m, X)
                assert other.n == 1.0
            assert m.n == 1.0


def page():
    lines = [
        "# What works where",
        "",
        "`tests/nnx/transforms/test_table.py` writes this table, and runs a small program for each cell. Where",
        "a cell names an error, the user gets that error: in `grad` and its kin, closed-over Refs are constants",
        "that you can read but not write, and the steps of a loop cannot differ in structure.",
        "The last two columns are for a model that uses the transformation in its call.",
        "",
        "| | " + " | ".join(COLUMNS) + " |",
        "| --- " * (len(COLUMNS) + 1) + "|",
    ]
    for name in RUN:
        cells = [EXPECTED.get((name, column), "yes") for column in COLUMNS]
        cells = [f"`{c}`" if c.endswith("Error") else c for c in cells]
        lines.append(f"| `nnx.{name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def test_the_table_in_the_docs_is_this_one():
    if os.environ.get("UPDATE_DOCS"):
        PAGE.write_text(page())
    assert PAGE.read_text() == page()
