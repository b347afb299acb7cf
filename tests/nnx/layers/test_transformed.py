"""Transformations as modules: their results, sharing, saving and messages."""

import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nnx
from tests.models import Dense, Net

X = jnp.asarray(np.random.default_rng(0).normal(size=(4, 2)), jnp.float32)


def loss(model, x):
    return jnp.mean(model(x) ** 2)


@pytest.mark.parametrize(
    "wrap",
    [
        nnx.Jit,
        nnx.VMap,
        nnx.Remat,
        nnx.Partial,
        lambda m: nnx.Jit(nnx.VMap(m)),
        lambda m: nnx.Jit(m.__call__),
        lambda m: nnx.VMap(nnx.Remat(m), in_axes=0, out_axes=0),
        lambda m: nnx.Partial(nnx.Jit(lambda m, x: m(x)), m),
        lambda m: nnx.Sequential(nnx.Jit(m)),
    ],
)
def test_they_compute_share_split_and_save(wrap, tmp_path):
    model = Dense()
    plain = model.w
    wrapped = wrap(model)
    np.testing.assert_allclose(wrapped(X), X @ plain, rtol=1e-5)
    assert model.calls == 1
    # The Refs are those of the model.
    assert [ref for ref in nnx.refs(wrapped).values()] == list(nnx.refs(model).values())
    model.w = jnp.zeros((2, 2))
    assert (wrapped(X) == 0).all()
    model.w = plain
    for copy in (nnx.merge(*nnx.split(wrapped)), nnx.clone(wrapped)):
        np.testing.assert_allclose(copy(X), X @ plain, rtol=1e-5)
    assert "float32[2,2]" in repr(wrapped) and model.calls == 2
    gradient = nnx.grad(loss)(wrapped, X)
    assert len(gradient) == 2
    np.testing.assert_allclose(
        jax.tree.leaves(gradient)[0], nnx.grad(loss)(model, X)["w"], rtol=1e-4, atol=1e-6
    )
    np.testing.assert_allclose(
        jax.jit(lambda f, x: nnx.clone(f)(x))(wrapped, X), X @ plain, rtol=1e-5
    )


def test_they_come_back_from_a_file(tmp_path):
    model = nnx.Jit(nnx.VMap(Net(), in_axes=0))
    partial = nnx.Partial(jax.nn.softmax, axis=-1)
    whole = nnx.Sequential(model, nnx.Remat(partial), nnx.Jit(model.fn.fn.__call__))
    nnx.save(tmp_path / "m.npz", whole)
    back = nnx.load(tmp_path / "m.npz")
    assert jnp.array_equal(back(X), whole(X))
    assert back.layers[2].fn.__self__ is back.layers[0].fn.fn


def test_jit_compiles_once_for_a_class():
    traces = []

    class Counted(nnx.Module):
        def __init__(self, w):
            self.w = nnx.Ref(w, "params")

        def __call__(self, x, power=1):
            traces.append(power)
            return self.w.value * x**power

    a, b = nnx.Jit(Counted(jnp.array(2.0))), nnx.Jit(Counted(jnp.array(3.0)))
    assert [float(f(2.0)) for f in (a, b, a, b)] == [4, 6, 4, 6] and len(traces) == 1
    static = nnx.Jit(Counted(jnp.array(2.0)), static_argnums=1)
    assert float(static(2.0, 3)) == 16 and traces[-1] == 3 and type(traces[-1]) is int
    named = nnx.Jit(Counted(jnp.array(2.0)), static_argnames="power")
    assert float(named(2.0, power=2)) == 8 and type(traces[-1]) is int


def test_jit_writes_and_donates():
    model = Dense()
    old = model.w
    grow = nnx.Jit(lambda m: setattr(m, "w", m.w * 2), donate="params")
    grow(model)
    assert old.is_deleted()


def test_grad_of_modules_methods_and_functions():
    model = Dense()
    of_model = nnx.Grad(nnx.Partial(loss, model))(X)
    np.testing.assert_allclose(of_model["args.0.w"], nnx.grad(loss)(model, X)["w"], rtol=1e-6)
    gm, gx = nnx.Grad(loss, argnums=(0, 1))(model, X)
    assert gm["w"].shape == (2, 2) and gx.shape == X.shape
    g, aux = nnx.Grad(lambda m, x: (loss(m, x), 3), has_aux=True, wrt=nnx.PathContains("b"))(
        model, X
    )
    assert list(g) == [("b",)] and aux == 3


def test_vmap_axes_by_filter():
    stack = nnx.vmap(lambda seed: Dense(seed=0))(jnp.arange(3))
    each = nnx.VMap(lambda m, x: x @ m.w, in_axes=({"params": 0, ...: 0}, None))
    assert each(stack, X).shape == (3, 4, 2)


@pytest.mark.parametrize("kind", ["Jit", "VMap", "Grad", "Remat", "Partial"])
def test_what_cannot_be_called(kind):
    with pytest.raises(TypeError, match=rf"nnx.{kind} takes a module, .* but got int: 3"):
        getattr(nnx, kind)(3)
    with pytest.raises(
        TypeError, match=rf"an instance, but got the class Dense. .*nnx.{kind}\(Dense"
    ):
        getattr(nnx, kind)(Dense)


def test_jit_of_a_function_does_not_outlive_it():
    model = Dense()
    alive = weakref.ref(model)
    double = nnx.Jit(lambda x, model=model: model(x) * 2)
    double(X)
    traced = double._compiled[2]
    double(X)
    assert double._compiled[2] is traced
    del model, double, traced
    gc.collect()
    assert alive() is None
    with pytest.raises(nnx.FilterError, match="use a tuple"):
        nnx.Jit(Dense(), donate=["params"])
