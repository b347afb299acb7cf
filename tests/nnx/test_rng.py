"""Streams give the right keys, and advance in the same way wherever they run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nnx
from nnx import RngStream


def data(key):
    return jax.random.key_data(key).tolist()


def test_the_nth_key_is_folded_from_the_count():
    for key in (jax.random.key(3), jax.random.PRNGKey(3)):
        stream = RngStream(key)
        got = [data(stream.next()) for _ in range(70)]
        assert got == [data(jax.random.fold_in(key, n)) for n in range(70)]
        assert stream.count.value == 70


def test_names_give_different_keys_and_one_count():
    stream = RngStream(0)
    a, b = stream.next("a"), stream.next("b")
    other = RngStream(0)
    other.advance()
    assert data(b) == data(other.next("b")) != data(RngStream(0).next("b"))
    assert data(a) == data(RngStream(0).next("a"))


def test_keys_are_those_of_a_traced_stream():
    eager, traced = RngStream(5), RngStream(5)
    draw = nnx.jit(lambda s: s.next("x"))
    for _ in range(3):
        assert data(eager.next("x")) == data(draw(traced))
    assert data(eager.next()) == data(traced.next())
    assert eager.count.value == traced.count.value == 4


def test_a_key_that_is_replaced_is_taken_at_once():
    stream = RngStream(0)
    stream.next()
    stream.key.value = jax.random.key(9)
    assert data(stream.next()) == data(jax.random.fold_in(jax.random.key(9), 1))
    stream.count.value = 0
    assert data(stream.next()) == data(jax.random.fold_in(jax.random.key(9), 0))


def test_a_stream_is_split_saved_and_cloned_like_any_module():
    stream = RngStream(jax.random.key(1))
    stream.next()
    other = nnx.clone(stream)
    assert data(other.next()) == data(stream.next())
    assert list(nnx.refs(stream)) == [("key",), ("count",)]
    assert all(ref.collection == "rngs" for ref in nnx.refs(stream).values())


def test_a_model_may_own_its_stream():
    class Noisy(nnx.Module):
        def __init__(self):
            self.rng = RngStream(0)

        def __call__(self, x):
            return x + jax.random.normal(self.rng.next(), x.shape)

    eager, compiled = Noisy(), Noisy()
    f = nnx.jit(lambda m, x: m(x))
    outs = [f(compiled, jnp.zeros(2)) for _ in range(3)]
    for out in outs:
        np.testing.assert_allclose(out, eager(jnp.zeros(2)), rtol=1e-6)
    assert not np.allclose(outs[0], outs[1])


def test_one_stream_may_serve_two_scopes():
    stream = RngStream(0)
    with nnx.scope({"a": stream}):
        first = data(nnx.make_rng("a"))
    with nnx.scope({"b": stream}):
        second = data(nnx.make_rng("b"))
    assert first != second and stream.count.value == 2


@pytest.mark.parametrize("transform", ["grad", "vmap", "jit of grad", "scan", "cond", "remat"])
def test_streams_move_on_by_what_was_drawn_inside(transform):
    def draw(x=0.0):
        nnx.make_rng("a")
        nnx.make_rng("a")
        return x * 1.0

    run = {
        "grad": lambda: nnx.grad(draw)(1.0),
        "vmap": lambda: nnx.vmap(draw)(jnp.ones(2)),
        "jit of grad": lambda: nnx.jit(nnx.grad(draw))(1.0),
        "scan": lambda: nnx.scan(lambda c, x: (c, draw(x)), None, jnp.ones(1)),
        "cond": lambda: nnx.cond(True, draw, draw, 1.0),
        "remat": lambda: nnx.remat(draw)(1.0),
    }[transform]
    stream = RngStream(0)
    with nnx.scope({"a": stream}):
        run()
        first = int(stream.count.value)
        run()
    assert first > 0 and stream.count.value == 2 * first


def test_gradients_see_the_same_numbers_with_and_without_jit():
    def loss(r):
        return r.value * jax.random.normal(nnx.make_rng("noise"), ())

    def two(grad):
        ref = nnx.Ref(jnp.array(1.0), "params")
        with nnx.scope(0):
            return [float(grad(ref)[()]) for _ in range(2)]

    eager = two(nnx.grad(loss))
    assert eager == two(nnx.jit(nnx.grad(loss))) and eager[0] != eager[1]


@pytest.mark.parametrize("bad", [None, "key", 1.5, [0, 1], jnp.zeros((2,), "int32")])
def test_the_error_for_a_bad_key_says_what_to_pass(bad):
    with pytest.raises(TypeError, match=r"needs a key, as from jax\.random\.key\(0\)"):
        RngStream(bad)


def test_a_seed_that_is_an_array_is_told_how_to_become_a_key():
    message = r"but got .*Tracer.*as a seed, write jax\.random\.key\(seed\)"
    with pytest.raises(TypeError, match=message):
        jax.vmap(lambda seed: nnx.Linear.init(seed)(2, 2))(jnp.arange(3))
    seeds = jnp.arange(3)
    models = jax.vmap(lambda seed: nnx.Linear.init(jax.random.key(seed))(2, 2))(seeds)
    assert models.kernel.shape == (3, 2, 2)
