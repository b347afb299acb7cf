"""No argument is silently ignored or mistaken for another one."""

import jax
import jax.numpy as jnp
import pytest

import nnx


@pytest.fixture
def model():
    return nnx.Sequential(nnx.Linear.init(0)(2, 3))


@pytest.mark.parametrize(
    "flags, error, message",
    [
        (
            {"flags": {"training": True}},
            nnx.UnhashableStaticError,
            r"called 'flags'.*by name: training=True; from a dict, write \*\*flags",
        ),
        ({"rng": 0}, TypeError, r"'rng', which does not seed anything. Did you mean rngs=0\?"),
        ({"seed": 3}, TypeError, "Did you mean rngs=3"),
        ({"key": 1}, TypeError, "Did you mean rngs=1"),
    ],
)
def test_flags_of_a_scope(flags, error, message, model):
    for use in (model.apply, nnx.Linear.init, lambda **flags: nnx.scope(**flags).__enter__()):
        with pytest.raises(error, match=message) as caught:
            use(**flags)
        assert len(str(caught.value).splitlines()) <= 4


def test_what_looks_like_a_key_but_is_a_flag():
    with nnx.scope(0, flags=3, seed=None, key="major", rng=False):
        assert nnx.get_flag("flags") == 3 and nnx.get_flag("key") == "major"


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda m: nnx.get_partition("params", m), nnx.FilterError, "The tree comes first"),
        (lambda m: nnx.split(m, m["params"], ...), nnx.FilterError, "A Partition is not a filter"),
        (lambda m: m[nnx.get_ref(m.layers[0], "kernel")], nnx.FilterError, "A Ref is not a filter"),
        (lambda m: nnx.mutable(m).__enter__(), nnx.FilterError, "A Sequential is not a filter"),
        (lambda m: nnx.grad(lambda m: 0.0, wrt=m)(m), nnx.FilterError, "A Sequential is not"),
        (
            lambda m: nnx.merge(*nnx.split(m), jax.tree.map(jnp.zeros_like, m["params"])),
            nnx.UnknownPathError,
            r"'layers.0.kernel'.*first \| second",
        ),
        (
            lambda m: nnx.jit(lambda m: None, donate_argnums=0),
            TypeError,
            "has no donate_argnums.*donate=True.*nnx.jit_filter has donate_argnums",
        ),
        (lambda m: nnx.jit(lambda x: 0, donate_argnames="x"), TypeError, "no donate_argnames"),
        (lambda m: nnx.jit(lambda m: None, donate="all")(m), nnx.FilterError, "donate=True"),
        (
            lambda m: nnx.param(init=jax.nn.initializers.zeros),
            TypeError,
            "init of a field is a bool.*It got a function.*initializer",
        ),
        (lambda m: nnx.static(kw_only="x"), TypeError, "kw_only of a field"),
        (
            lambda m: nnx.scan(lambda c, x: (c, x), m, jnp.ones(3), axes={"params": nnx.CARRY}),
            nnx.AxisError,
            "xs holds no module or Ref.*leave axes out",
        ),
    ],
)
def test_arguments_that_are_taken_for_others(call, error, message, model):
    with pytest.raises(error, match=message) as caught:
        call(model)
    assert len(str(caught.value).splitlines()) <= 4


def test_partitions_that_agree_or_are_joined_can_be_merged(model):
    dagdef, params = nnx.split(model)
    new = jax.tree.map(jnp.zeros_like, params)
    assert not nnx.merge(dagdef, params | new).layers[0].kernel.any()
    assert nnx.merge(dagdef, params, params).layers[0].kernel is model.layers[0].kernel


def test_one_number_of_a_nondifferentiable_argument():
    f = nnx.custom_vjp(lambda n, x: n * x, nondiff_argnums=0)
    f.defvjp(lambda n, x: (n * x, None), lambda n, _, g: (10 * n * g,))
    assert jax.grad(lambda x: f(3.0, x))(1.0) == 30.0


@pytest.mark.parametrize(
    "transformation",
    [
        nnx.jit,
        nnx.vmap,
        nnx.grad,
        nnx.value_and_grad,
        nnx.jit_filter,
        nnx.grad_filter,
        nnx.value_and_grad_filter,
        nnx.remat,
        nnx.checkify,
        nnx.make_jaxpr,
        nnx.jacfwd,
        nnx.jacrev,
        nnx.hessian,
        nnx.eval_shape,
        lambda m: nnx.vjp(m, jnp.ones(2)),
        lambda m: nnx.jvp(m, (jnp.ones(2),), (jnp.ones(2),)),
        lambda m: nnx.shard_map(m, in_specs=None, out_specs=None),
    ],
)
def test_what_cannot_be_called(transformation):
    class Bag(nnx.Module):
        def __init__(self):
            self.secret_weights = nnx.Ref(jnp.ones(3), "params")

    for bad in (Bag(), 3):
        with pytest.raises(TypeError, match="takes a function, a module or a method, but got") as e:
            transformation(bad)
        assert "secret_weights" not in str(e.value)


def test_a_transformed_method_of_an_ordinary_class():
    class Trainer:
        @nnx.jit
        def step(self, x):
            return x

    message = r"Argument \[0\] is a Trainer.*self\.step = nnx\.jit\(self\._step\) in __init__, or make Trainer"
    with pytest.raises(nnx.ArgumentError, match=message):
        Trainer().step(1.0)


def test_argnums_are_positions(model):
    with pytest.raises(
        nnx.DifferentiationError, match="argument 'm', but argnums has the positions"
    ):
        nnx.grad(lambda m: m.w.sum(), argnums="m")(model)


def test_a_class_in_place_of_a_cell():
    with pytest.raises(TypeError, match=r"RNN takes a cell, but got the class LSTMCell"):
        nnx.RNN(nnx.LSTMCell)
