import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nnx


def draw(name="x"):
    return jax.random.normal(nnx.make_rng(name), ())


def test_streams_are_deterministic_and_differ_by_name_and_by_call():
    def run():
        with nnx.scope(jax.random.key(0)):
            return [float(draw(n)) for n in ("a", "a", "b")]

    assert run() == run() and len(set(run())) == 3


@pytest.mark.parametrize("key", [jax.random.key(0), jax.random.PRNGKey(0), 0, np.int64(0)])
def test_typed_and_legacy_keys_and_seeds(key):
    with nnx.scope(key):
        first = nnx.make_rng("params")
    typed = not isinstance(key, jax.Array) or jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    assert jnp.issubdtype(first.dtype, jax.dtypes.prng_key) == typed
    with nnx.scope(jax.random.key(0)):
        assert draw() == jax.random.normal(nnx.RngStream(jax.random.key(0)).next("x"), ())


@pytest.mark.parametrize("bad", ["seed", 1.5, True, jnp.zeros(2)])
def test_what_is_not_a_key_is_an_error(bad):
    with (
        pytest.raises(TypeError, match=r"needs a key, as from jax\.random\.key\(0\)"),
        nnx.scope(bad),
    ):
        pass


def test_named_streams_and_the_missing_one():
    with nnx.scope({"params": 1}):
        draw("params")
        with pytest.raises(nnx.MissingStreamError, match=r"'dropout'.*only \['params'\].*apply\("):
            draw("dropout")
        with nnx.scope({"dropout": 2}):
            draw("params")
            draw("dropout")
    with pytest.raises(nnx.MissingStreamError, match=r"no scope with keys is active.*Cls\.init"):
        nnx.Linear(2, 2)


def test_flags_nest_and_the_missing_one_is_named(dense):
    with nnx.scope(a=1, b=2), nnx.scope(0, b=3):
        assert (nnx.get_flag("a"), nnx.get_flag("b"), nnx.get_flag("c", 4)) == (1, 3, 4)
        dense.a, dense.d = 10, 5
        assert (dense.get_flag("a"), dense.get_flag("d"), dense.get_flag("e", 6)) == (1, 5, 6)
        with pytest.raises(nnx.MissingFlagError, match=r"No scope sets the flag 'e' \(set: a, b\)"):
            dense.get_flag("e")


def test_scope_ends_with_an_exception_and_is_of_one_thread():
    seen = []
    with pytest.raises(ZeroDivisionError), nnx.scope(a=1):
        thread = threading.Thread(target=lambda: seen.append(nnx.get_flag("a", None)))
        thread.start()
        thread.join()
        raise ZeroDivisionError
    assert seen == [None] and nnx.get_flag("a", None) is None


def test_streams_advance_through_jit_as_they_do_without():
    def three():
        return [float(draw()), float(compiled()), float(draw()), float(compiled())]

    compiled = nnx.jit(draw)
    with nnx.scope(3):
        mixed = three()
    with nnx.scope(3):
        assert mixed == [float(draw()) for _ in range(4)]
    with nnx.scope(4):
        assert not set(three()) & set(mixed)


def test_flags_retrace_and_streams_do_not():
    traces = []

    @nnx.jit
    def f(x):
        traces.append(nnx.get_flag("mode", None))
        return draw() + x

    for seed, mode in [(0, "a"), (1, "a"), (0, "b"), (0, "a")]:
        with nnx.scope(seed, mode=mode):
            f(1.0)
            f(1.0)
    assert traces == ["a", "b"]
    with (
        pytest.raises(nnx.UnhashableStaticError, match=r"flags\.mode"),
        nnx.scope(0, mode={1}),
    ):
        f(1.0)


def test_a_failing_call_leaves_the_stream_as_it_was():
    @nnx.jit
    def bad():
        draw()
        raise ZeroDivisionError

    with nnx.scope(0):
        with pytest.raises(ZeroDivisionError):
            bad()
        first = draw()
    with nnx.scope(0):
        assert first == draw()


@pytest.mark.parametrize(
    "flags, message",
    [
        (
            {"key": jax.random.key(0)},
            r"flag 'key' of a scope is an array, key<fry>\[\]\. Did you mean "
            r"rngs=key\?",
        ),
        ({"rng": jax.random.PRNGKey(0)}, r"uint32\[2\]\. Did you mean rngs=key\?"),
        ({"dropout": jax.random.key(0)}, r"Did you mean rngs=\{'dropout': key\}\?"),
        ({"training": jnp.array(True)}, r"'training' .* bool\[\], but flags are static.*bool\("),
        ({"scale": np.ones(2)}, r"'scale' .* float64\[2\], but flags are static"),
    ],
)
def test_an_array_is_not_a_flag(dense, flags, message):
    for use in (dense.apply, nnx.scope, nnx.Linear.init):
        with pytest.raises(nnx.UnhashableStaticError, match=message):
            use(**flags).__enter__()


class TestUnusedFlags:
    class Net(nnx.Module):
        def __init__(self, width=2):
            self.linear = nnx.Linear(2, width)
            self.hidden = self.get_flag("hidden", False)

        def __call__(self, x):
            return self.linear(x) * self.get_flag("gain", 1.0)

        @nnx.jit
        def compiled(self, x):
            return self.linear(x) * self.get_flag("gain_inside", 1.0)

    def test_a_flag_that_nobody_asks_for_is_a_warning(self):
        net = self.Net.init(0)()
        x = jnp.ones(2)
        message = r"(?s)flag 'gian' of Net\.apply, so it changed nothing.*: gain\. A module reads a flag with"
        with pytest.warns(UserWarning, match=message) as seen:
            net.apply(gian=2.0)(x)
        assert seen[0].filename == __file__
        with pytest.warns(UserWarning, match=r"'gain' of Net\.apply.*were read: none"):
            net.apply(gain=2.0).linear(x)
        with pytest.warns(UserWarning, match=r"'width' of Net\.init.*Net\.init\(0\)\(\.\.\.\)"):
            self.Net.init(0, width=8)()

    def test_flags_that_somebody_asks_for_or_that_are_general(self):
        net = self.Net.init(0, hidden=True, training=True)()
        assert net.hidden is True
        x = jnp.ones(2)
        for call in (net, lambda x: nnx.jit(net)(x), lambda x: net.apply(0)(x)):
            out = self.applied(call, x)
            assert jnp.allclose(out, 2 * net.linear(x))
        net.apply(deterministic=True, use_running_average=True, training=False, decode=False)(x)
        # The second call runs a program that was traced before, for the same flag.
        for _ in range(2):
            assert jnp.allclose(net.apply(gain_inside=2.0).compiled(x), 2 * net.linear(x))

    @staticmethod
    def applied(call, x):
        class Outer(nnx.Module):
            def __call__(self, x):
                return call(x)

        return Outer().apply(gain=2.0)(x)

    def test_in_compiled_code_too(self):
        net = self.Net.init(0)()
        with pytest.warns(UserWarning, match="'gian' of Net"):
            net.apply(gian=2.0).compiled(jnp.ones(2))
        with pytest.warns(UserWarning, match="'gian' of Net"):
            nnx.jit(lambda x: net.apply(gian=2.0)(x))(jnp.ones(2))
        with pytest.raises(TypeError):
            net.apply(gian=2.0)()
