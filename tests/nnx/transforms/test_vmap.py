import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nnx
from tests.models import Dense


def stack(n=3):
    return nnx.vmap(lambda w: _with(w))(jnp.arange(4.0 * n).reshape(n, 2, 2) / 10)


def _with(w):
    model = Dense()
    model.w = w
    return model


def test_a_stack_is_made_and_mapped_and_its_writes_stacked(data):
    x, _ = data
    layers = stack()
    out = nnx.vmap(lambda m, x: m(x), in_axes=(0, None))(layers, x)
    assert jnp.allclose(out, jnp.einsum("bi,nio->nbo", x, layers.w))
    assert layers.calls.tolist() == [1, 1, 1]


def test_axes_by_filter(data):
    x, _ = data
    model = Dense()
    model.calls = jnp.zeros(4, int)
    f = nnx.vmap(lambda m, x: m(x), in_axes=({"counters": 0, ...: None}, 0))
    assert jnp.allclose(f(model, x), x @ model.w) and model.calls.tolist() == [1] * 4
    g = nnx.vmap(
        lambda m, x: m(x), in_axes=({"counters": None, nnx.PathContains("w"): 2, ...: None}, 0)
    )
    other = Dense()
    other.w = jnp.stack([other.w] * 4, axis=2)
    assert jnp.allclose(g(other, x), x @ other.w[..., 0]) and other.calls == 1


def test_a_write_that_differs_needs_an_axis(dense, data):
    def f(m, x):
        m.b = m.b + x

    with pytest.raises(
        nnx.AxisError, match=r"Ref 'b' was written in nnx\.vmap.*axis is None.*in_axes.*pmean"
    ):
        nnx.vmap(f, in_axes=(None, 0))(dense, data[0])
    assert (dense.b == 0).all()
    nnx.vmap(lambda m, x: f(m, jax.lax.pmean(x, "i")), in_axes=(None, 0), axis_name="i")(
        dense, data[0]
    )
    assert jnp.allclose(dense.b, data[0].mean(0))


def test_closures_are_the_same_in_every_lane(dense, data):
    x, _ = data
    out = nnx.vmap(lambda x: dense(x))(x)
    assert jnp.allclose(out, x @ dense.w) and dense.calls == 1
    with pytest.raises(nnx.AxisError, match="Ref 'b' was written"):
        nnx.vmap(lambda x: setattr(dense, "b", x))(x)


def test_new_refs_hang_on_roots_and_go_out_with_axes(data):
    x, _ = data
    layers = stack(4)

    def f(m, x):
        m.seen = nnx.Ref(x, "seen")
        return {"a": nnx.Ref(x.sum(), "a"), "b": x[0], "m": m}

    out = nnx.vmap(f, out_axes={"a": 0, "b": 0, "m": 0})(layers, x)
    assert layers.seen.value.shape == (4, 2) and out["a"].value.shape == (4,) and out["m"] is layers
    made = nnx.vmap(lambda x: _with(jnp.eye(2) * x[0]), out_axes={"params": 1, ...: 0})(x)
    assert made.w.shape == (2, 4, 2) and made.calls.shape == (4,)


def test_streams_split_along_the_axis_and_each_lane_is_a_run_of_its_own():
    def f(x):
        return jax.random.normal(nnx.make_rng("noise"), (2,)) + x

    with nnx.scope(jax.random.key(3)):
        first, second = nnx.vmap(f)(jnp.zeros(3)), nnx.vmap(f)(jnp.zeros(3))
    assert len(np.unique(np.concatenate([first, second]))) == 12
    keys = jax.random.split(nnx.RngStream(jax.random.key(3)).next(), 3)
    for key, lane in zip(keys, first, strict=True):
        with nnx.scope(key):
            assert jnp.array_equal(f(0.0), lane)


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda m, x: nnx.vmap(lambda a, b: 0, in_axes=(None, 0))(m, m),
            r"two specif.*'w' of argument 1",
        ),
        (lambda m, x: nnx.vmap(lambda m: 0)(m), r"axis 0 of 'calls', whose shape is \(\)"),
        (
            lambda m, x: nnx.vmap(lambda m: 0, in_axes=({"params": 0},))(m),
            r"No filter .*'calls' .*\.\.\. : None",
        ),
        (
            lambda m, x: nnx.vmap(lambda a, b: 0)(x, jnp.ones(3)),
            r"two sizes to map over: 4 of .* and 3 of",
        ),
        (lambda m, x: nnx.vmap(lambda m: 0, in_axes=None)(m), "nothing to map over"),
        (
            lambda m, x: nnx.vmap(lambda x: nnx.Ref(x), out_axes=None)(x),
            r"new Ref .*float32\[2\].*out_axes=0",
        ),
        (lambda m, x: nnx.vmap(lambda x: {"a": x}, out_axes={"a": None})(x), "returns a value"),
        (
            lambda m, x: nnx.vmap(lambda a: 0, in_axes=(0, 0))(x),
            "for 2 arguments, but was called with 1",
        ),
        (lambda m, x: nnx.vmap(lambda a: 0, in_axes=((0, 0),))((x,)), "not a prefix of it"),
        (lambda m, x: nnx.vmap(lambda a: 0, in_axes=({"params": 0},))(x), "has no Refs there"),
    ],
)
def test_axes_that_do_not_fit(dense, data, call, message):
    with pytest.raises(nnx.AxisError, match=message):
        call(dense, data[0])


def test_nested_and_compiled_and_of_methods(data):
    x, y = data
    layers = stack(2)

    @nnx.jit
    def f(ms, x):
        return nnx.vmap(lambda m: nnx.vmap(lambda row: row @ m.w)(x))(ms)

    assert jnp.allclose(f(layers, x), jnp.einsum("bi,nio->nbo", x, layers.w))
    model = Dense()
    assert jnp.allclose(nnx.vmap(model.__call__)(x), x @ model.w) and model.calls == 1
    assert jnp.allclose(nnx.vmap(model, in_axes=0)(x), x @ model.w)
    grads = nnx.vmap(nnx.grad(lambda m, x, y: ((m(x) - y) ** 2).sum()), in_axes=(None, 0, 0))(
        model, x, y
    )
    each = jax.vmap(jax.grad(lambda w, x, y: ((x @ w - y) ** 2).sum()), (None, 0, 0))(model.w, x, y)
    assert jnp.allclose(grads["w"], each, atol=1e-5)


def test_kwargs_axis_size_and_exceptions(dense):
    assert nnx.vmap(lambda *, x: x * 2)(x=jnp.arange(3)).tolist() == [0, 2, 4]
    assert nnx.vmap(lambda: 1.0, axis_size=3)().tolist() == [1.0, 1.0, 1.0]

    def bad(x):
        dense.b = dense.b + 1
        raise ZeroDivisionError

    with nnx.scope(0):
        with pytest.raises(ZeroDivisionError):
            nnx.vmap(bad)(jnp.ones(2))
        first = nnx.make_rng()
    with nnx.scope(0):
        assert jnp.array_equal(first, nnx.make_rng())
    assert (dense.b == 0).all()


def test_no_leaks(dense, data):
    with jax.check_tracer_leaks():
        nnx.vmap(lambda x: dense(x))(data[0])
        nnx.jit(lambda x: nnx.vmap(lambda x: dense(x))(x))(data[0])


def test_shard_map_shards_by_spec():
    P = jax.sharding.PartitionSpec
    mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    model = Dense()
    model.rows = nnx.Ref(jnp.zeros((8, 2)), "rows")
    x = jnp.arange(16.0).reshape(8, 2)

    @nnx.jit
    @nnx.shard_map(mesh=mesh, in_specs=({"rows": P("d"), ...: P()}, P("d")), out_specs=P("d"))
    def f(m, x):
        assert x.shape == (2, 2) and m.rows.value.shape == (2, 2)
        m.rows.value = m.rows.value + x
        m.b = m.b + jax.lax.psum(x.sum(0), "d")
        return x @ m.w

    assert jnp.allclose(f(model, x), x @ model.w)
    assert jnp.allclose(model.rows.value, x) and jnp.allclose(model.b, x.sum(0))
    with pytest.raises(nnx.AxisError, match="two specifications"):
        nnx.shard_map(lambda a, b: a, mesh=mesh, in_specs=(P(), P("d")), out_specs=P())(
            model, model
        )


def test_shard_map_says_which_refs_would_differ_between_devices():
    P = jax.sharding.PartitionSpec
    auto = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, 2), ("d", "e"), axis_types=auto)
    x = jnp.arange(16.0).reshape(8, 2)
    both = ("d", "e")

    def sharded(f, *first, rows=both):
        return nnx.shard_map(f, mesh=mesh, in_specs=(*first, P(rows)), out_specs=P(rows))

    def normed(axis_name):
        model = nnx.Sequential(nnx.BatchNorm(2, axis_name=axis_name))
        sharded(lambda m, x: m(x), P())(model, x)
        return model.layers[0]

    with pytest.raises(nnx.AxisError) as caught:
        normed(None)
    text = str(caught.value)
    assert "writes values to 'layers.0.mean', 'layers.0.var' that differ" in text
    assert "jax.lax.pmean(value, ('d', 'e'))" in text and "BatchNorm" in text and "in_specs" in text
    with pytest.raises(nnx.AxisError, match=r"between the shards along 'e'.*pmean\(value, 'e'\)"):
        normed("d")
    expected = nnx.BatchNorm(2)
    expected(x)
    assert jnp.allclose(normed(both).mean, expected.mean)

    total = nnx.Ref(jnp.zeros(()))
    with pytest.raises(
        nnx.AxisError, match=r"writes values to .* along 'd', but such a Ref has one value"
    ):
        sharded(lambda x: (setattr(total, "value", x.sum()), x)[1], rows="d")(x)
    assert total.value == 0
    # Another mistake keeps its own message.
    with pytest.raises(ValueError, match="replica"):
        nnx.shard_map(lambda x: x, mesh=mesh, in_specs=P("d"), out_specs=P())(x)


def test_axes_as_a_tree_that_is_made_of_the_module(data):
    """Like `jax.vmap`: a module with an axis or None for each value."""
    x, _ = data
    layers = stack()
    axes = jax.tree.map(lambda v: 0, layers)
    expected = nnx.vmap(lambda m, x: m(x), in_axes=(0, None))(nnx.clone(layers), x)
    copies = [nnx.clone(layers) for _ in range(3)]
    assert jnp.allclose(nnx.vmap(lambda m, x: m(x), in_axes=(axes, None))(copies[0], x), expected)
    assert copies[0].calls.tolist() == [1, 1, 1]
    by_jax = jax.vmap(lambda m, x: x @ m.w, in_axes=(axes, None))(copies[1], x)
    by_nnx = nnx.jit(nnx.vmap(lambda m, x: x @ m.w, in_axes=(axes, None)))(copies[1], x)
    assert jnp.allclose(by_jax, by_nnx)
    # Not all of them along one axis, and some not at all.
    some = nnx.Partition({path: 1 if path == ("w",) else None for path in nnx.refs(layers)})
    other = nnx.clone(layers)
    nnx.update(other, {"w": jnp.moveaxis(layers.w, 0, 1)}, strict=False)
    out = nnx.vmap(lambda m, x: x @ m.w, in_axes=(some, None))(other, x)
    assert jnp.allclose(out, by_jax)
    with pytest.raises(nnx.AxisError, match=r"which has none for 'w'\. Make it from the argument"):
        nnx.vmap(lambda m: m.w, in_axes=(nnx.Partition({"other": 0}),))(layers)


class Twice(nnx.Module):
    """A module that holds one array two times in a tuple, which has no identity of its own."""

    def __init__(self):
        x = jnp.arange(3.0)
        self.pair = (x, x)


@pytest.mark.parametrize("shared", [False, True])
def test_one_array_twice_in_a_tuple(shared):
    f = lambda a, b: a.pair[0] + 10 * a.pair[1] + 100 * b.pair[1]  # noqa: E731
    a, b = Twice(), Twice()
    if shared:
        b.pair = a.pair
    expected = [0, 111, 222]
    assert nnx.jit(f)(a, b).tolist() == expected
    assert nnx.vmap(f)(a, b).tolist() == expected
    assert nnx.scan(lambda c, ab: (c, f(*ab)), None, (a, b))[1].tolist() == expected
    gradient = nnx.grad(lambda a, b: f(a, b).sum(), wrt=...)(a, b)
    assert {path: float(x[0]) for path, x in gradient.items()} == {
        ("pair", "0"): 1,
        ("pair", "1"): 10,
    }
