"""Capturing: the right values, in every transformation, with nothing left behind."""

import gc
import re
import threading
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nnx
from nnx import ProbeError, capture, sow
from tests.models import Dense, Net

X = jnp.asarray(np.random.default_rng(0).normal(size=(3, 2)), jnp.float32)


def classes(model):
    return {kind: dict(vars(kind)) for kind in {type(model), Dense, nnx.Linear, nnx.Module}}


def close(a, b):
    np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-6)


def by_hand(model, x):
    """What each call in Net returns, in order."""
    seen = []
    for block in model.blocks:
        seen.append(block(x))
        x = jnp.tanh(seen[-1]) * model.scale
    return x, seen


def check(captured, y, model):
    out, seen = by_hand(nnx.clone(model), X)
    assert list(captured) == [(), ("blocks", "0"), ("blocks", "1")]
    close(y, out)
    close(captured[()], out)
    assert type(captured["blocks.0"]) is tuple and len(captured["blocks.0"]) == 2
    close(captured["blocks.0"][0], seen[0])
    close(captured["blocks.0"][1], seen[2])
    close(captured["blocks.1"], seen[1])


def test_outputs_by_path_with_no_change_to_the_model_or_its_classes():
    model = Net()
    before, text, held = classes(model), repr(model), dict(vars(model))
    cells = nnx.refs(model)
    y, captured = capture(model)(X)
    assert isinstance(captured, nnx.Partition)
    assert classes(model) == before and dict(vars(model)) == held
    assert nnx.refs(model) == cells
    # The counters are read, and the printed model shows them.
    assert re.sub(r"calls = \d", "calls = 0", repr(model)) == text
    # It is a call like any other: its writes take effect.
    assert int(model.blocks[0].calls) == 2 and int(model.blocks[1].calls) == 1
    check(captured, y, model)


@pytest.mark.parametrize(
    "run",
    [
        lambda m: nnx.jit(lambda m, x: capture(m)(x))(m, X),
        lambda m: nnx.jit(lambda x: capture(m)(x))(X),
        lambda m: nnx.grad(lambda m: ((r := capture(m)(X))[0].sum(), r), has_aux=True)(m)[1],
        lambda m: nnx.remat(lambda m, x: capture(m)(x))(m, X),
        lambda m: nnx.cond(True, lambda m: capture(m)(X), lambda m: capture(m)(X), m),
        lambda m: nnx.jit(nnx.jit(lambda m, x: capture(m)(x)))(m, X),
    ],
    ids=["jit", "closure", "grad", "remat", "cond", "jit in jit"],
)
def test_inside_a_transformation(run):
    model = Net()
    y, captured = run(model)
    assert int(model.blocks[0].calls) == 2
    check(captured, y, model)


def test_inside_scan_and_vmap():
    model = Net()
    xs = jnp.stack([X, 2 * X])
    _, (y, captured) = nnx.scan(lambda _, x: (None, capture(model)(x)), None, xs)
    assert captured["blocks.0"][1].shape == (2, 3, 2) and int(model.blocks[0].calls) == 4
    check(jax.tree.map(lambda x: x[0], captured), y[0], model)
    linears = nnx.Sequential(nnx.Linear.init(0)(2, 2), nnx.relu)
    plain = jax.jit(jax.vmap(lambda m, x: capture(m)(x), in_axes=(None, 0)))
    y, captured = plain(linears, xs)
    close(captured["layers.0"], linears.layers[0](xs))


def test_gradients_flow_through_what_is_captured():
    model = Net()

    def loss(model):
        _, captured = capture(model)(X)
        return (captured["blocks.1"] ** 2).sum()

    def hand(model):
        return (by_hand(model, X)[1][1] ** 2).sum()

    a, b = nnx.grad(loss)(model), nnx.grad(hand)(model)
    for path, value in b.items():
        close(a[path], value)


@pytest.mark.parametrize(
    "filter, paths",
    [
        (..., ["", "layers.0", "layers.2"]),
        (nnx.OfType(nnx.Linear), ["layers.0", "layers.2"]),
        (nnx.PathContains("2"), ["layers.2"]),
        (lambda path, module: not path, [""]),
        (nnx.All(nnx.OfType(nnx.Linear), nnx.Not(nnx.PathContains("0"))), ["layers.2"]),
        (None, []),
    ],
)
def test_filters_are_over_modules(filter, paths):
    with nnx.scope(0):
        model = nnx.Sequential(nnx.Linear(2, 4), nnx.relu, nnx.Linear(4, 1))
    _, captured = capture(model, filter)(X)
    assert [".".join(path) for path in captured] == paths


def test_methods():
    class Coder(nnx.Module):
        def __init__(self):
            self.enc, self.dec = nnx.Linear(2, 3), nnx.Linear(3, 2)

        def encode(self, x, *, scale):
            return self.enc(x) * scale

    model = Coder.init(0)()
    y, captured = capture(model.encode)(X, scale=2.0)
    close(y, 2 * captured["enc"])
    assert list(captured) == [("enc",)]


def test_a_compiled_call_method_and_a_module_that_has_none():
    class Compiled(nnx.Module):
        def __init__(self):
            self.inner = nnx.Linear(2, 2)

        @nnx.jit
        def __call__(self, x):
            return jnp.tanh(self.inner(x))

    model = Compiled.init(0)()
    model(X)
    y, captured = capture(model)(X)
    close(captured["inner"], model.inner(X))
    close(y, model(X))
    with pytest.raises(
        ProbeError,
        match=r"capture with \.\.\. selects no callable module of Bare\. Its modules are: ''",
    ):
        capture(type("Bare", (nnx.Module,), {})())(X)


class Block(nnx.Module):
    def __init__(self):
        self.linear, self.norm, self.drop = nnx.Linear(2, 2), nnx.BatchNorm(2), nnx.Dropout(0.5)

    def __call__(self, x):
        sow(self, "mean", x.mean())
        return self.drop(self.norm(self.linear(x)))


@pytest.mark.parametrize("remat", [False, True])
def test_a_stack_of_layers_gives_stacked_outputs(remat):
    stack = nnx.Stack.init(0)(Block, 3, remat=remat)
    plain = nnx.clone(stack)
    with nnx.scope(1):
        y, captured = nnx.jit(lambda s, x: capture(s)(x))(stack, X)
    with nnx.scope(1):
        expected = nnx.jit(lambda s, x: s(x))(plain, X)
    close(y, expected)
    for path, value in plain["batch_stats"].items():
        close(stack["batch_stats"][path], value)
    assert [".".join(path) for path in captured] == [
        "",
        "layers",
        "layers.mean",
        "layers.linear",
        "layers.norm",
        "layers.drop",
    ]
    assert captured["layers"].shape == (3, 3, 2)
    captured = {".".join(path): np.asarray(value) for path, value in captured.items()}
    close(captured["layers"][-1], y)
    inputs = np.stack([X, *captured["layers"][:-1]])
    kernel, bias = (np.asarray(x) for x in (stack.layers.linear.kernel, stack.layers.linear.bias))
    close(captured["layers.linear"], inputs @ kernel + bias[:, None])
    close(captured["layers.mean"], inputs.mean((1, 2)))


def test_transformations_inside_the_model():
    @nnx.jit
    def compiled(layer, x):
        return layer(x)

    class Inner(nnx.Module):
        def __init__(self):
            self.a, self.b, self.c = (nnx.Linear(2, 2) for _ in range(3))
            self.lanes = nnx.vmap(lambda key: nnx.Linear.init(key)(2, 2))(
                jax.random.split(jax.random.key(0), 3)
            )

        def __call__(self, x):
            x = compiled(self.a, x)
            x = nnx.cond(x.sum() > 1e9, lambda c, x: c(x), lambda c, x: x, self.c, x)
            x = nnx.vmap(lambda m, x: m(x), in_axes=(0, None))(self.lanes, x).sum(0)
            return nnx.scan(lambda h, _: (self.b(h), None), x, None, length=2)[0]

    model = Inner.init(0)()
    compiled(model.a, X)
    for _ in range(2):  # compiled code must not hide anything
        y, captured = capture(model)(X)
        a = model.a(X)
        close(captured["a"], a)
        lanes = jnp.stack([a @ k + b for k, b in zip(model.lanes.kernel, model.lanes.bias)])
        close(captured["lanes"], lanes)
        # Every step of a loop, and a branch that was not taken.
        close(captured["b"][1], y)
        close(captured["b"][0], model.b(lanes.sum(0)))
        close(y, model.b(model.b(lanes.sum(0))))
        assert jnp.isnan(captured["c"]).all()
    assert set(model["params"]) == set(Inner.init(0)()["params"])


def test_a_plain_transformation_inside_the_model_is_an_error_that_says_what_to_do():
    class Plain(nnx.Module):
        def __init__(self):
            self.inner = nnx.Linear(2, 2)

        def __call__(self, x):
            return jax.vmap(self.inner)(x)

    model = Plain.init(0)()
    with pytest.raises(
        ProbeError,
        match=r"'inner' cannot be seen in a plain jax.vmap .* Use the nnx transformation",
    ):
        capture(model)(X)
    y, captured = capture(model, nnx.Not(nnx.PathContains("inner")))(X)
    close(captured[()], model.inner(X))
    with pytest.raises(
        ProbeError, match="the function .*lambda.*, whose first argument must be the model"
    ):
        capture(lambda x: x)(X)
    with pytest.raises(
        ProbeError, match="whose first argument is a module, but got an int: 3. Set keys"
    ):
        capture(3)
    with pytest.raises(ProbeError, match="but got a _Applied.*with nnx.scope"):
        capture(model.apply(training=True))


def test_sow():
    class Deep(nnx.Module):
        def __init__(self):
            self.net = Net()

        def __call__(self, x):
            sow(self, "twice", x)
            sow(self, "twice", {"x": x + 1})
            sow(self, "other", x, "debug")
            return self.net(x)

    model = Deep()
    _, captured = capture(model, None)(X)
    assert list(captured) == [("twice",)]
    close(captured["twice"][1]["x"], X + 1)
    assert list(capture(model, None, collection="debug")(X)[1]) == [("other",)]
    assert set(nnx.refs(model)) == set(nnx.refs(Deep()))
    model(X)


def test_an_error_leaves_no_trace():
    class Fails(nnx.Module):
        def __init__(self):
            self.net = Net()

        def __call__(self, x):
            self.net(x)
            raise ZeroDivisionError

    model = Fails()
    before = classes(model)
    with pytest.raises(ZeroDivisionError):
        capture(model)(X)
    assert classes(model) == before and type(model.net.blocks[0]) is Dense
    check(*reversed(capture(model.net)(X)), model.net)


def test_changes_of_structure_are_made_in_the_model():
    class Grows(nnx.Module):
        def __init__(self):
            self.layers, self.calls, self.last = [Dense()], 0, jnp.zeros(())

        def __call__(self, x):
            self.calls += 1
            self.last = x
            self.layers.append(Dense(seed=self.calls))
            self.extra = nnx.Ref(jnp.ones(()), "cache")
            return self

    model = Grows()
    first = model.layers[0]
    y, _ = capture(model)(X)
    assert y is model and model.calls == 1 and model.last is X and len(model.layers) == 2
    assert model.layers[0] is first and type(model.layers[1]) is Dense
    assert float(model.extra.value) == 1
    nnx.jit(lambda m, x: capture(m)(x) and None)(model, X)
    assert model.calls == 2 and len(model.layers) == 3
    assert [type(layer) for layer in model.layers] == [Dense] * 3
    assert not any("capture" in name for name in vars(model))


def test_modules_that_the_call_makes():
    @nnx.dataclass
    class Powers(nnx.Module):
        n: int = 1
        w: jax.Array = nnx.param(default_factory=lambda: jnp.ones(2))

        def __call__(self, x):
            if self.n == 2:
                return x**2
            self.last = type(self)(2)
            return self.last(x) * nnx.clone(self).w

    model = Powers()
    y, captured = capture(model)(X)
    close(y, X**2)
    assert list(captured) == [()] and type(model.last) is Powers
    close(model.last(X), X**2)
    assert "capture" not in repr(model)


def test_nested_captures():
    class Outer(nnx.Module):
        def __init__(self):
            self.net, self.seen = Net(), nnx.Ref(jnp.zeros((3, 2)), "seen")

        def __call__(self, x):
            y, captured = capture(self.net)(x)
            self.seen.value = captured["blocks.1"]
            return y

    model = Outer()
    y, captured = capture(model)(X)
    close(captured[()], y)
    close(model.seen.value, by_hand(nnx.clone(model.net), X)[1][1])
    assert type(model.net) is Net


def test_threads_do_not_see_each_other():
    model, results, errors = Net(), [], []
    start = threading.Barrier(4)

    def work(i):
        try:
            start.wait()
            mine = Net()
            for _ in range(3):
                if i % 2:
                    results.append(capture(mine)(X * i))
                else:
                    mine(X)
                    assert type(mine.blocks[0]) is Dense
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not errors and len(results) == 6
    assert all(len(captured["blocks.0"]) == 2 for _, captured in results)
    assert int(model.blocks[0].calls) == 0


def test_nothing_is_kept_alive_and_no_tracer_leaks():
    model = Net()
    with jax.checking_leaks():
        nnx.jit(lambda m, x: capture(m)(x))(model, X)
    alive = weakref.ref(model.blocks[1])
    capture(model)(X)
    del model
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("axes", [None, (None, 0)])
def test_layers_that_every_lane_shares_are_stacked_by_lane(axes):
    class Mapped(nnx.Module):
        def __init__(self):
            self.layer = nnx.Linear(2, 2)

        def __call__(self, x):
            if axes is None:
                return nnx.vmap(lambda x: self.layer(x))(x)
            return nnx.vmap(lambda layer, x: layer(x), in_axes=axes)(self.layer, x)

    model, x = Mapped.init(0)(), jnp.arange(6.0).reshape(3, 2)
    y, captured = capture(model, "layer")(x)
    close(captured["layer"], model.layer(x))
    close(y, model(x))


def test_layers_on_shards_are_stacked_by_shard_and_axes_of_the_model_are_its_own():
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("x")
    layer = nnx.Linear.init(0)(2, 2)

    class Sharded(nnx.Module):
        def __init__(self):
            self.layer = layer

        def __call__(self, x):
            return nnx.shard_map(
                lambda x: self.layer(x), mesh=mesh, in_specs=(spec,), out_specs=spec
            )(x)

    x = jnp.arange(8.0).reshape(4, 2)
    y, captured = capture(Sharded())(x)
    close(captured["layer"], layer(x).reshape(2, 2, 2))
    close(y, layer(x))

    class Wrong(nnx.Module):
        def __call__(self, x):
            return nnx.vmap(lambda x, y: x, in_axes=(0, 0))(x, x[0])

    with pytest.raises(nnx.AxisError, match="two sizes"):
        capture(Wrong())(jnp.ones((4, 2)))


# ---- the call, and the selection


class Tokens(nnx.Module):
    def __init__(self):
        self.embed, self.mix = nnx.Embed(5, 3), nnx.Linear(3, 3)

    def encode(self, x):
        return self.mix(self.embed(x))

    def __call__(self, x):
        return self.embed.attend(self.encode(x))

    @staticmethod
    def helper(x):
        return x


def test_methods_of_modules_are_named_after_them():
    model, x = Tokens.init(0)(), jnp.array([1, 2])
    y, captured = capture(model, ("embed.attend", "mix", "encode", ""))(x)
    assert [".".join(path) for path in captured] == ["", "encode", "embed.attend", "mix"]
    close(captured["embed.attend"], y)
    close(captured["encode"], captured["mix"])
    assert not nnx.patch(model, {"embed.attend": lambda logits: 0 * logits})(x).any()
    grads = nnx.output_grad(lambda m, x: m(x).sum(), "encode")(model, x)
    close(grads["encode"], jnp.broadcast_to(model.embed.embedding.sum(0), (2, 3)))
    close(nnx.patch(model.encode, {nnx.Linear: jnp.negative})(x), -model.encode(x))
    for wrong in ("helper", "embed.nothing", "embed.init", "nothing.attend"):
        with pytest.raises(
            ProbeError, match="capture with .* selects no callable module of Tokens"
        ):
            capture(model, wrong)(x)


def test_a_whole_training_step():
    model = nnx.Sequential(Dense(), nnx.tanh, Dense(seed=1))
    before = model.layers[0].w
    hand = jnp.tanh(nnx.clone(model.layers[0])(X))

    @nnx.jit
    def step(model, x):
        loss, grads = nnx.value_and_grad(lambda m: (m(x) ** 2).sum())(model)
        model["params"] = jax.tree.map(lambda w, g: w - 0.1 * g, model["params"], grads)
        return loss

    loss, captured = capture(step, "layers.0")(model, X)
    close(jnp.tanh(captured["layers.0"]), hand)
    assert loss > 0 and not jnp.array_equal(model.layers[0].w, before)
    with pytest.raises(
        ProbeError,
        match="the function .*step, whose first argument must be the model, but is missing",
    ):
        capture(step)()


def plain(layer):
    w, b = layer.w, layer.b
    return lambda x: x @ w + b


def test_patches_in_order_and_all_probes_together():
    model = nnx.Sequential(Dense(), jnp.tanh, Dense(seed=1))
    first, last = (plain(layer) for layer in model.layers[::2])
    twice = nnx.patch(nnx.patch(model, {"layers.0": lambda h: h + 1}), {Dense: lambda h: 2 * h})
    y, captured = capture(twice)(X)
    close(captured["layers.0"], 2 * (first(X) + 1))
    close(y, 2 * last(jnp.tanh(2 * (first(X) + 1))))

    # The gradient covers everything afterwards, including patches and captured values.
    def loss(m, x):
        y, captured = capture(nnx.patch(m, {"layers.2": lambda h: 3 * h}), "layers.0")(x)
        return y.sum() + (captured["layers.0"] ** 2).sum()

    grads = nnx.output_grad(loss, "layers.0")(model, X)
    expected = jax.grad(lambda h: 3 * last(jnp.tanh(h)).sum() + (h**2).sum())(first(X))
    close(grads["layers.0"], expected)
    several = {"layers.0": lambda h: h + 1, Dense: lambda h: 2 * h}
    close(capture(nnx.patch(model, several), "layers.0")(X)[1]["layers.0"], 2 * (first(X) + 1))


def test_a_layer_that_is_called_twice_has_two_gradients():
    class Twice(nnx.Module):
        def __init__(self):
            self.a = Dense()

        def __call__(self, x):
            return self.a(jnp.tanh(self.a(x)))

    model = Twice()
    layer = plain(model.a)
    one, two = nnx.output_grad(lambda m, x: (m(x) ** 2).sum(), "a")(model, X)["a"]
    close(two, 2 * layer(jnp.tanh(layer(X))))
    close(one, jax.grad(lambda h: (layer(jnp.tanh(h)) ** 2).sum())(layer(X)))
    assert int(model.a.calls) == 2


def test_outputs_that_are_not_arrays_and_aux():
    class Odd(nnx.Module):
        def __call__(self, x):
            return x, "name", None, jnp.arange(2), {"f": jnp.sum}

    class Holder(nnx.Module):
        def __init__(self):
            self.odd = Odd()

        def __call__(self, x):
            return nnx.jit(lambda odd, x: odd(x)[0])(self.odd, x)

    out = capture(Holder(), "odd")(X)[1]["odd"]
    assert out[1:3] == ("name", None) and out[4]["f"] is jnp.sum
    close(out[0], X)
    grads, aux = nnx.output_grad(lambda m, x: (m(x).sum(), "aux"), Odd, has_aux=True)(Holder(), X)
    close(grads["odd"][0], jnp.ones_like(X))
    assert aux == "aux" and grads["odd"][3].dtype == jax.dtypes.float0


def test_settings_of_a_loss_stay_settings():
    model = nnx.Sequential(Dense())

    def loss(m, x, mode, *, power=1):
        return (m(x) ** power).sum() if mode == "sum" else m(x).mean()

    grads = nnx.output_grad(loss, Dense)(model, X, "sum", power=2)
    close(grads["layers.0"], 2 * nnx.clone(model)(X))


def test_options_of_jitted_methods():
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    class Model(nnx.Module):
        def __init__(self):
            self.layer = nnx.Linear(2, 2)

        @nnx.jit(static_argnames="k", donate="params")
        def __call__(self, x, k=1):
            assert type(k) is int
            self.layer.kernel = self.layer.kernel + 0
            return self.layer(x) * k

        @nnx.jit(static_argnums=1, out_shardings=device)
        def other(self, k, x):
            return self.layer(x) * k

    model = Model.init(0)()
    expected = nnx.clone(model.layer)(X)
    expected = jnp.array(expected)
    for args, kwargs in [((X, 3), {}), ((X,), {"k": 3})]:
        y, captured = capture(model, "layer")(*args, **kwargs)
        close(captured["layer"], expected)
        close(y, 3 * expected)
    y, captured = capture(model.other, "layer")(3, X)
    close(y, 3 * captured["layer"])


def test_modules_that_are_transformations_and_recurrent_ones():
    with nnx.scope(0):
        model = nnx.Jit(nnx.Sequential(nnx.Remat(Dense()), nnx.VMap(Dense()), nnx.Partial(Dense())))
        rnn = nnx.RNN(nnx.SimpleCell(2, 3))
    y, captured = capture(model, Dense)(X)
    assert [".".join(path) for path in captured] == [f"fn.layers.{i}.fn" for i in range(3)]
    close(captured["fn.layers.2.fn"], y)
    y, captured = capture(rnn, "cell")(jnp.ones((1, 5, 2)))
    close(captured["cell"][1][:, 0], y[0])


def test_values_that_modules_store_in_a_loop_and_random_streams_go_on_as_always():
    stack = nnx.Stack.init(0)(Block, 3)
    with nnx.scope(1):
        expected = nnx.clone(stack)(X)
    with nnx.scope(1):
        y, captured = capture(stack, None)(X)
    close(y, expected)
    assert list(captured) == [("layers", "mean")] and captured["layers.mean"].shape == (3,)


def test_no_tracer_leaks_from_any_probe():
    class Loop(nnx.Module):
        def __init__(self):
            self.layer = nnx.Linear(2, 2)

        def __call__(self, x):
            return nnx.jit(lambda m, x: nnx.scan(lambda h, _: (m(h), None), x, None, length=2)[0])(
                self.layer, x
            )

    model = Loop.init(0)()
    with jax.checking_leaks():
        nnx.jit(lambda m, x: capture(m)(x))(model, X)
        nnx.jit(lambda m, x: nnx.patch(m, {"layer": lambda h: h + x.sum()})(x))(model, X)
        nnx.output_grad(lambda m, x: m(x).sum(), "layer")(model, X)


def test_a_plain_program_inside_is_not_patched_for_ever():
    class Plain(nnx.Module):
        def __init__(self):
            self.inner = nnx.Linear(2, 2)

        def __call__(self, x):
            return jax.jit(lambda m, x: m(x))(self.inner, x)

    model = Plain.init(0)()
    with pytest.raises(
        ProbeError, match="'inner' cannot be patched in a plain jax .* JAX caches the program"
    ):
        nnx.patch(model, {"inner": lambda h: -h})(X)
    close(model(X), model.inner(X))

    class Mapped(Plain):
        def __call__(self, x):
            return jax.vmap(self.inner)(x)

    model = Mapped.init(0)()
    close(nnx.patch(model, {"inner": lambda h: -h})(X), -model.inner(X))


def test_mistakes():
    model = nnx.Sequential(Dense())
    with pytest.raises(
        ProbeError, match="takes a dict from a selector of modules .* got a function"
    ):
        nnx.patch(model, lambda h: h)
    with pytest.raises(ProbeError, match="got an int for 'layers.0', but needs a function"):
        nnx.patch(model, {"layers.0": 3})
    with pytest.raises(ProbeError, match="patch of The output of 'layers.0' returned None"):
        nnx.patch(model, {"layers.0": lambda h: None})(X)
    with pytest.raises(
        ProbeError, match="found no call of the modules that 'layers.0' selects .* layers.0"
    ):
        nnx.output_grad(lambda m, x: x.sum(), "layers.0")(model, X)
    with pytest.raises(nnx.DifferentiationError, match="must return a scalar"):
        nnx.output_grad(lambda m, x: m(x), "layers.0")(model, X)
    with pytest.raises(nnx.FilterError, match="3 does not select modules"):
        capture(model, 3)(X)


def test_compiled_models_and_methods_and_the_method_that_is_called():
    model = Tokens.init(0)()
    x = jnp.array([1, 2])
    for encode in (model.encode, nnx.jit(model.encode)):
        y, captured = capture(encode, ("encode", "mix"))(x)
        assert [".".join(path) for path in captured] == ["encode", "mix"]
        close(captured["encode"], y)
    y, captured = capture(nnx.jit(model), ("", "mix"))(x)
    close(captured[()], y)
    close(y, model(x))
    assert not nnx.patch(nnx.jit(model), {"mix": lambda h: 0 * h})(x).any()


def test_why_something_compiles_under_a_probe():
    class Compiled(nnx.Module):
        def __init__(self):
            self.inner = Dense()

        def __call__(self, x):
            return nnx.scan(lambda h, _: (double(self.inner, h), None), x, None, length=2)[0]

    double = nnx.jit(lambda m, x: 2 * m(x))
    model = Compiled()
    with nnx.debug.retraces() as seen:
        capture(model, "inner")(X)
        capture(model, "inner")(X)
    assert len(seen) == 2
    assert sum("a probe (nnx.capture and its kin) is active" in str(e) for e in seen) == 1
    assert not any("another function" in str(e) for e in seen)
