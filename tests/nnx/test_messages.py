"""Messages name what the user wrote, in the user's terms."""

import functools

import jax
import jax.numpy as jnp
import pytest

import nnx
from nnx.transforms.callables import function_name


class Net(nnx.Module):
    def __init__(self):
        self.inner = nnx.Linear.init(0)(2, 2)

    def __call__(self, x):
        return self.inner(x)


class Called:
    def __init__(self):
        self.net = Net()

    def __call__(self, x):
        return self.net(x)

    def __repr__(self):
        return repr(self.net)


x = jnp.ones((3, 2))
FAILING = {
    "vmap": lambda f: nnx.vmap(f, in_axes=5)(x),
    "grad": lambda f: nnx.grad(f, argnums=7)(x),
    "value_and_grad": lambda f: nnx.value_and_grad(f)(x),
    "jit": lambda f: nnx.jit(f, static_argnums=7),
    "jit_filter": lambda f: nnx.jit_filter(f, static_argnums=7),
    "grad_filter": lambda f: nnx.grad_filter(f, argnums=7)(x),
    "value_and_grad_filter": lambda f: nnx.value_and_grad_filter(f, argnums=7)(x),
    "custom_vjp": lambda f: nnx.custom_vjp(f)(x),
    "custom_jvp": lambda f: nnx.custom_jvp(f)(x),
    "jvp": lambda f: nnx.jvp(f, (x,), ()),
}


@pytest.mark.parametrize(
    "fn", [Net(), Called(), functools.partial(Net())], ids=lambda f: type(f).__name__
)
@pytest.mark.parametrize("kind", FAILING)
def test_a_module_as_the_function_is_named_by_its_class(kind, fn):
    with pytest.raises((nnx.RefError, ValueError, TypeError)) as error:
        FAILING[kind](fn)
    text = str(error.value)
    name = type(fn).__name__ if not isinstance(fn, functools.partial) else "functools.partial(Net)"
    assert f"nnx.{kind}({name}" in text, text
    assert "kernel" not in text and len(text.splitlines()) <= 4


def test_names_of_functions():
    net = Net()
    assert function_name(net) == "Net" and function_name(Called()) == "Called"
    assert function_name(net.__call__) == "Net.__call__"
    assert function_name(functools.partial(functools.partial(net, 1), 2)).count("kernel") == 0
    assert function_name(len) == "len" and "<lambda>" in function_name(lambda: 0)


@pytest.mark.parametrize("use", [lambda m: m.inner.kernel, lambda m: setattr(m.inner, "kernel", x)])
def test_a_callback_is_told_to_take_the_value(use):
    errors = []

    @nnx.jit
    def step(model):
        def late():
            try:
                use(model)
            except nnx.EndedTraceError as error:
                errors.append(str(error))

        jax.debug.callback(late)
        return model.inner.kernel

    step(Net())
    jax.effects_barrier()
    (text,) = errors
    assert "callback" in text and "pass it the value: jax.debug.callback(fn, model.kernel)" in text
    assert "NoneType" not in text and "'params'" in text


PLAIN = {
    "jax.eval_shape": lambda f: jax.eval_shape(f),
    "jax.make_jaxpr": lambda f: jax.make_jaxpr(f)(),
    "compiles (jax.jit": lambda f: jax.jit(f)(),
    "compiles (jax.jit, lax.scan": lambda f: jax.lax.scan(
        lambda c, _: (c, f()), None, None, length=2
    ),
}


@pytest.mark.parametrize("name", PLAIN)
def test_what_a_plain_program_closes_over(name):
    net = Net()
    with pytest.raises(nnx.ClosureError) as error:
        PLAIN[name](lambda: net(x))
    text = str(error.value)
    abstract = name in ("jax.eval_shape", "jax.make_jaxpr")
    assert name in text and ("compile" in text) is not abstract
    assert (f"nnx.{name[4:]}" if abstract else "nnx.jit, nnx.scan") in text
    assert nnx.eval_shape(lambda: net(x)).shape == (3, 2)


class TestAdviceByCollection:
    """The error for a forbidden write suggests what users usually want, depending on the collection."""

    def step(self, gradient, deterministic, use_running_average=False):
        class Net(nnx.Module):
            def __init__(self):
                self.linear = nnx.Linear(2, 2)
                self.norm = nnx.BatchNorm(2, use_running_average=use_running_average)
                self.drop = nnx.Dropout(0.5, deterministic=deterministic)

            def __call__(self, x):
                return self.drop(self.norm(self.linear(x))).sum()

        model = Net.init(0)()
        loss = lambda m, x: (gradient(lambda x: m(x))(x) ** 2).sum()
        return model, nnx.jit(lambda m, x: nnx.grad(lambda m: loss(m, x))(m))

    @pytest.mark.parametrize("gradient", [jax.grad, nnx.grad])
    def test_a_norm_in_the_gradient_of_a_penalty(self, gradient):
        model, step = self.step(gradient, True)
        advice = r"keep the statistics as they are: model\.apply\(use_running_average=True\)\(x\)\."
        with pytest.raises(nnx.TraceLevelError, match=rf"'norm\.mean'.*{advice}"):
            step(model, jnp.ones((3, 2)))
        model, step = self.step(gradient, True, use_running_average=True)
        assert step(model, jnp.ones((3, 2)))
        with pytest.raises(nnx.ReadOnlyError, match=advice):
            jax.jit(lambda m: m(jnp.ones((3, 2))))(nnx.BatchNorm(2))

    def test_a_dropout_in_a_solver(self):
        drop = nnx.Dropout(0.5)
        solve = lambda f: jax.lax.while_loop(lambda y: y.sum() < 9, lambda y: y + f(y), jnp.ones(3))
        advice = r"or draw with its own key: model\.apply\(rngs=key\)\(x\)\."
        with nnx.scope(0), pytest.raises(nnx.TraceLevelError, match=advice):
            nnx.jit(lambda m: solve(m))(drop)
        key = jax.random.key(0)
        assert nnx.jit(lambda m: solve(lambda y: m.apply(rngs=key)(y)))(drop).sum() >= 9


def test_a_write_on_a_copy_names_the_path_of_a_ref_in_an_ordinary_attribute():
    class Counter(nnx.Module):
        def __init__(self):
            self.count = nnx.Ref(jnp.zeros(()), "counters")
            self.many = [nnx.Ref(jnp.zeros(2))]

    class Net(nnx.Module):
        def __init__(self):
            self.blocks = [Counter(), Counter()]

    net = Net()
    for transform in (jax.jit, jax.grad, jax.linearize):
        for find, path in (
            (lambda m: m.blocks[1].count, "blocks.1.count"),
            (lambda m: m.blocks[0].many[0], "blocks.0.many.0"),
        ):
            wrong = lambda m, find=find: setattr(find(m), "value", find(m).value + 1)
            arguments = (net,) if transform is jax.linearize else ()
            with pytest.raises(nnx.ReadOnlyError, match=f"^Ref '{path}' of a Net .*was written"):
                transform(wrong, *arguments)(net)


def test_a_parameter_of_functions_is_refused_by_the_name_of_its_attribute():
    class Layer(nnx.Module):
        inner: object = nnx.param()

        def __init__(self, value):
            self.inner = value

    for value in (jnp.tanh, {"w": jnp.ones(2), "act": [jax.nn.relu]}, "text"):
        with pytest.raises(
            nnx.ValueTypeError, match=r"^Ref Layer\.inner was given a value that holds"
        ):
            Layer(value)
    layer = Layer(jnp.ones(2))
    with pytest.raises(nnx.ValueTypeError, match=r"^Ref Layer\.inner \(collection 'params'"):
        layer.inner = {"act": jnp.tanh}
