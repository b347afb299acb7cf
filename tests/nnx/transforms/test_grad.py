import jax
import jax.numpy as jnp
import pytest

import nnx
from tests.models import Dense, Net


def loss(m, x, y):
    return jnp.mean((m(x) - y) ** 2)


def pure_loss(net, params, x, y):
    model = nnx.clone(net)
    model["params"] = params
    return loss(model, x, y)


def test_gradients_are_those_of_jax_with_sharing_summed(net, data):
    x, y = data
    value, grads = nnx.value_and_grad(loss)(net, x, y)
    expected_value, expected = jax.value_and_grad(lambda p: pure_loss(net, p, x, y))(net["params"])
    assert jnp.allclose(value, expected_value) and list(grads) == list(net["params"])
    for path in grads:
        assert jnp.allclose(grads[path], expected[path], atol=1e-6)
    assert net.blocks[0].calls == 2 * 1 + 0


@pytest.mark.parametrize(
    "wrt, paths",
    [
        (nnx.PathContains("b"), ["blocks.0.b", "blocks.1.b"]),
        (nnx.All("params", nnx.Not(nnx.PathContains("1"))), ["blocks.0.w", "blocks.0.b"]),
        (lambda path, ref: path == ("blocks", "1", "w"), ["blocks.1.w"]),
    ],
)
def test_wrt_is_any_filter(net, data, wrt, paths):
    grads = nnx.grad(loss, wrt=wrt)(net, *data)
    assert [".".join(p) for p in grads] == paths


def test_plain_array_attributes_by_filter(data):
    class Plain(nnx.Module):
        def __init__(self):
            self.w = jnp.ones((2, 2))
            self.pair = (jnp.ones(2), 3)

    grads = nnx.grad(lambda m: m.w.sum() * 2 + m.pair[0].sum() * m.pair[1], wrt=...)(Plain())
    assert (grads["w"] == 2).all() and (grads["pair.0"] == 3).all()


def test_argnums_and_plain_arguments(dense, data):
    x, y = data
    gm, gx = nnx.grad(loss, argnums=(0, 1))(dense, x, y)
    assert isinstance(gm, nnx.Partition) and gx.shape == x.shape
    gy = nnx.grad(loss, argnums=-1)(dense, x, y)
    assert jnp.allclose(gy, jax.grad(lambda y: jnp.mean((x @ dense.w - y) ** 2))(y))
    tree = nnx.grad(lambda p: (p["a"] ** 2 + p["b"][0]).sum())({"a": x, "b": [y]})
    assert jnp.allclose(tree["a"], 2 * x) and (tree["b"][0] == 1).all()


def test_modules_nested_in_arguments_and_shared_between_them(dense):
    other = Dense(seed=2)
    grads = nnx.grad(lambda ms, m: (ms[0].w * ms[1]["x"].w * m.w).sum())(
        [dense, {"x": other}], dense
    )
    assert jnp.allclose(grads["0.w"], 2 * dense.w * other.w, atol=1e-6)
    assert jnp.allclose(grads["1.x.w"], dense.w**2, atol=1e-6)
    with pytest.raises(nnx.DifferentiationError, match=r"'w' twice: arguments 0 and 1 share it"):
        nnx.grad(lambda a, b: a.w.sum() * b.w.sum(), argnums=(0, 1))(dense, dense)


def test_has_aux_and_updates_inside(dense, data):
    def f(m, x):
        out = m(x)
        return out.sum(), {"out": out, "module": m, "made": nnx.Ref(out.mean(), "new")}

    (value, aux), grads = nnx.value_and_grad(f, has_aux=True)(dense, data[0])
    assert dense.calls == 1 and aux["module"] is dense
    assert jnp.allclose(aux["made"].value, aux["out"].mean()) and value.shape == ()
    grads, aux = nnx.grad(f, has_aux=True)(dense, data[0])
    assert dense.calls == 2 and set(grads) == {("w",), ("b",)}


def test_batch_statistics_propagate(data):
    norm = nnx.BatchNorm(2, momentum=0.5)
    x, _ = data
    nnx.jit(nnx.grad(lambda m, x: (m(x) ** 3).sum()))(norm, x)
    assert jnp.allclose(norm.mean, 0.5 * x.mean(0), atol=1e-6)


def test_a_gradient_of_a_gradient_and_under_vmap(dense, data):
    x, y = data
    twice = nnx.grad(lambda m: nnx.grad(lambda m: (m.w**3).sum())(m)["w"].sum())(dense)
    assert jnp.allclose(twice["w"], 6 * dense.w, atol=1e-4)
    each = nnx.vmap(lambda m, x, y: nnx.grad(loss)(m, x[None], y[None])["w"], in_axes=(None, 0, 0))
    whole = nnx.grad(loss)(dense, x, y)["w"]
    assert jnp.allclose(each(dense, x, y).mean(0), whole, atol=1e-5)


def test_values_that_are_trees():
    ref = nnx.Ref({"a": jnp.ones(2), "b": (jnp.array(3.0),)}, "params")
    grads = nnx.grad(lambda r: (r.value["a"] * r.value["b"][0]).sum())(ref)
    assert (grads[()]["a"] == 3).all() and grads[()]["b"][0] == 2


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda m: nnx.grad(lambda m: m.w)(m), r"array of shape \(2, 2\)\. Reduce it"),
        (lambda m: nnx.grad(lambda m: (m.w.sum(), 1))(m), r"returned tuple\. Pass has_aux=True"),
        (lambda m: nnx.grad(lambda m: m.w.sum(), has_aux=True)(m), r"must return \(scalar, aux\)"),
        (
            lambda m: nnx.grad(lambda m: 0.0, wrt="param")(m),
            r"'param' has nothing .*'counters', 'par",
        ),
        (lambda m: nnx.grad(lambda m: 0.0, wrt=...)(m), r"cannot differentiate 'calls'.*int32"),
        (lambda m: nnx.grad(lambda m: 0.0, argnums=1)(m), r"argument 1, but .* 1 positional"),
    ],
)
def test_errors_say_what_is_wrong(dense, call, message):
    with pytest.raises(nnx.DifferentiationError, match=message):
        call(dense)


def test_an_exception_changes_nothing(dense, data):
    def bad(m):
        m(data[0])
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        nnx.grad(bad)(dense)
    assert dense.calls == 0


def test_no_leaks(net, data):
    with jax.check_tracer_leaks():
        nnx.value_and_grad(loss)(net, *data)
        nnx.grad(loss)(Net(), *data)
