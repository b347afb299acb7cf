"""purify: names, trees, dtypes, flat parameters, and modules inside."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.extend.core import Primitive
from jax.sharding import PartitionSpec

import nnx
import refx
from nnx.purify import purify
from tests.nnx.test_purify import W, X, close

param = purify.param
fixed = purify.fixed
intermediate = purify.intermediate
prefix = purify.prefix


def test_pytrees_of_outputs_parameters_and_fixed_values():
    data = {"x": 3, "n": jax.ShapeDtypeStruct((2,), jnp.int32), "pair": [(2, 2), ()]}

    @purify
    def model():
        d = fixed(data, "data")
        w = param({"a": (3,), "b": ()}, "w")
        return {"out": w["a"] * d["x"], "rest": (d["n"].sum(), d["pair"][0] + w["b"], None)}

    shapes = model.fixed_shapes()
    assert jax.tree.map(lambda s: s.shape, shapes) == {
        "data": {"x": (3,), "n": (2,), "pair": [(2, 2), ()]}
    }
    given = jax.tree.map(lambda s: jnp.ones(s.shape, s.dtype), shapes)
    params = model.normal(jax.random.key(0))
    out = model(params, **given)
    close(out["out"], params["w"]["a"])
    assert out["rest"][0] == 2 and out["rest"][0].dtype == jnp.int32 and out["rest"][2] is None
    close(out["rest"][1], jnp.ones((2, 2)) + params["w"]["b"])


def test_the_example_of_the_seed():
    def field(n, alpha):
        k = jnp.fft.fftfreq(n).at[0].set(jnp.inf)
        power = jnp.abs(k) ** alpha
        xi = param(n, name="xi")
        f = jnp.fft.fft(jnp.sqrt(power) * xi)
        return f.real - f.imag

    @purify
    def model():
        x = jnp.linspace(0, 5, 100)
        alpha = -purify.log_normal_variable("alpha", mean=3.0, sigma=0.1)
        f = intermediate(field(x.shape[0], alpha), name="f")
        x_obs = fixed(3, name="x_obs")
        return jnp.interp(x_obs, x, f)

    shapes = model.shapes()
    assert {k: s.shape for k, s in shapes.items()} == {"alpha": (), "xi": (100,)}
    assert jax.tree.map(jnp.shape, model.zeros()) == {"alpha": (), "xi": (100,)}
    params = model.normal(jax.random.key(137))
    x_obs = jnp.array([1, 2, 3])
    result = jax.jit(model)(params, x_obs=x_obs)
    got = jax.jit(model.intermediates)(params, x_obs=x_obs)
    assert got["f"].shape == (100,) and set(got) == {"alpha", "f"}
    close(result, jnp.interp(x_obs, jnp.linspace(0, 5, 100), got["f"]))
    # The adjoint that the seed's inference takes, by shapes alone.
    linear = lambda p: model({**p, "alpha": params["alpha"]}, x_obs=x_obs)
    adjoint = jax.linear_transpose(linear, {"xi": shapes["xi"]})
    (back,) = jax.eval_shape(adjoint, result)
    assert back["xi"].shape == (100,)


def test_the_first_example_of_the_seed():
    @purify
    def model():
        x = param(3)
        return jnp.sin(x)

    params = model.normal(jax.random.key(0))
    assert list(params) == ["param_0"]
    close(model(params), jnp.sin(params["param_0"]))


def test_unpurified_functions_see_zeros():
    def f():
        return param(3, "w") + fixed((), "b") + intermediate(jnp.ones(3), "y")

    for g in (f, jax.jit(f), lambda: jax.vmap(lambda _: f())(jnp.arange(2))[0]):
        assert g().tolist() == [1.0, 1.0, 1.0]


def test_distributions():
    x = np.random.default_rng(0).normal(size=100_000).astype(np.float32)
    y = np.asarray(purify.log_normal(x, mean=3.0, sigma=0.5))
    assert abs(y.mean() - 3) < 0.01 and abs(y.std() - 0.5) < 0.01 and (y > 0).all()
    y = np.asarray(purify.normal(x, mean=-1.0, sigma=2.0))
    assert abs(y.mean() + 1) < 0.02 and abs(y.std() - 2) < 0.02
    y = np.asarray(purify.uniform(x, low=2.0, high=4.0))
    assert abs(y.mean() - 3) < 0.01 and abs(y.std() - 2 / 12**0.5) < 0.01
    assert y.min() >= 2 and y.max() <= 4

    @purify
    def model():
        return (
            purify.normal_variable("a", 1.0, 2.0, shape=3),
            purify.uniform_variable("b", low=1.0, high=3.0),
            purify.log_normal_variable("c", mean=2.0, sigma=1e-3),
        )

    a, b, c = model(model.zeros())
    assert a.tolist() == [1.0] * 3 and float(b) == 2.0 and abs(float(c) - 2) < 1e-4
    assert set(model.intermediates(model.zeros())) == {"a", "b", "c"} == set(model.shapes())


def dense(x, features):
    return x @ param((x.shape[-1], features), "w") + param(features, "b")


kept_dense = jax.jit(dense, static_argnums=1)


@pytest.mark.parametrize("layer", [dense, kept_dense], ids=["plain", "jit"])
def test_prefixes(layer):
    @purify
    def model(x):
        def block(x):
            return jnp.tanh(prefix("a", layer)(x, 3)) + prefix("b", layer)(x, 3)

        x = prefix("one", block)(x)
        x = jax.vmap(prefix("two", block))(x[None])[0]
        return jax.grad(lambda x: jax.checkpoint(prefix("three", block))(x).sum())(x)

    names = [f"{i}.{j}.{k}" for i in ("one", "two", "three") for j in "ab" for k in "wb"]
    # The biases of the last block do not affect its gradient, but they are still parameters.
    assert set(model.shapes(X)) == set(names)
    params = {
        k: np.full(s.shape, 0.1 * i, np.float32) for i, (k, s) in enumerate(model.shapes(X).items())
    }

    def hand(p, x):
        def layer(name, x):
            return x @ p[name + ".w"] + p[name + ".b"]

        def block(name):
            return lambda x: jnp.tanh(layer(name + ".a", x)) + layer(name + ".b", x)

        x = block("two")(block("one")(x))
        return jax.grad(lambda x: block("three")(x).sum())(x)

    both = lambda f: jax.jit(lambda p: (f(p, X), jax.jacrev(f)(p, X)))(params)
    close(both(model), both(hand))


def test_prefixes_reach_fixed_values_and_functions_that_return_anything():
    def part(x):
        return {"y": intermediate(x * fixed((), "scale"), "y"), "name": "part", "n": 3, "f": len}

    @purify
    def model():
        out = prefix("p", part)(jnp.float32(2.0))
        assert out["name"] == "part" and out["n"] == 3 and out["f"] is len
        return out["y"]

    assert list(model.fixed_shapes()) == ["p.scale"]
    assert float(model({}, **{"p.scale": 3.0})) == 6.0
    assert float(model.intermediates({}, **{"p.scale": 3.0})["p.y"]) == 6.0


def test_reuse_by_a_name_argument_and_in_python_loops():
    def layer(n_in, n_out, name):
        def apply(x):
            return param((n_out, n_in), name=f"{name}_w") @ x + param(n_out, name=f"{name}_b")

        return apply

    @purify
    def model():
        x = fixed(4, name="x")
        for i, (a, b) in enumerate([(4, 3), (3, 3), (3, 2)]):
            x = jax.nn.relu(jax.jit(layer(a, b, f"layer_{i}"))(x))
        return jax.nn.softmax(x)

    assert list(model.shapes()) == [f"layer_{i}_{k}" for i in range(3) for k in "bw"]
    assert model(model.normal(jax.random.key(0)), x=jnp.ones(4)).shape == (2,)


def test_names_of_a_loop_in_python_around_scan():
    @purify
    def model(x):
        for i in range(2):
            x, _ = lax.scan(lambda c, _: (c * param(3, f"w{i}"), None), x, None, length=2)
        return x

    close(model({"w0": W, "w1": 2 * W}, X), X * W**2 * (2 * W) ** 2)


def test_unnamed_parameters_are_numbered_in_order():
    def layer(x, n):
        return param((n, x.shape[0])) @ x + param(n)

    @purify
    def model():
        x = layer(fixed(4, "x"), 3)
        return jax.checkpoint(lambda x: prefix("last", lambda x: layer(x, 2))(x))(x)

    assert {k: s.shape for k, s in model.shapes().items()} == {
        "param_0": (3, 4),
        "param_1": (3,),
        "last.param_0": (2, 3),
        "last.param_1": (2,),
    }
    # A copy that a transformation makes is the same parameter.
    grad = purify(
        lambda x: jax.grad(jax.checkpoint(lambda x: jnp.sin(jnp.sin(param(3) * x)).sum()))(x)
    )
    assert list(grad.shapes(X)) == ["param_0"]


def test_ravel():
    def f():
        return param(2, "b") * param((), "a") + param((2, 2), "c").sum() * fixed((), "x")

    tree, flat = purify(f), purify(f, ravel=True)
    assert (
        purify(ravel=True)(f).shapes() == flat.shapes() == jax.ShapeDtypeStruct((7,), jnp.float32)
    )
    key = jax.random.key(3)
    v, params = flat.normal(key), tree.normal(key)
    assert v.shape == (7,) and flat.zeros().tolist() == [0.0] * 7
    close(flat.unravel(v), params)
    assert list(flat.unravel(v)) == list(params)
    close(flat.ravel(params), v)
    close(v, jax.flatten_util.ravel_pytree(params)[0])
    close(flat(v, x=2.0), tree(params, x=2.0))
    close(
        jax.grad(lambda v: flat(v, x=2.0).sum())(v),
        tree.ravel(jax.grad(lambda p: tree(p, x=2.0).sum())(params)),
    )
    assert flat.intermediates(v, x=2.0) == {}
    with pytest.raises(
        refx.ShapeError, match=r"have shape \(7,\), but got shape \(6,\). They are a: "
    ):
        flat(v[:6], x=2.0)
    with pytest.raises(refx.ShapeError, match=r"got a dictionary"):
        flat(params, x=2.0)


def test_ravel_of_several_dtypes_and_of_nothing():
    model = purify(lambda: (param(2, "a", jnp.bfloat16), param((), "b", jnp.complex64)), ravel=True)
    v = model.normal(jax.random.key(0))
    assert v.dtype == jnp.complex64 and v.shape == (3,)
    a, b = model(v)
    assert a.dtype == jnp.bfloat16 and b.dtype == jnp.complex64
    empty = purify(lambda: 1.0, ravel=True)
    assert (
        empty.shapes().shape == empty.zeros().shape == empty.normal(jax.random.key(0)).shape == (0,)
    )
    assert empty(empty.zeros()) == 1.0


def test_random_values_depend_on_key_and_name_alone():
    key = jax.random.key(1)
    one = purify(lambda: (param(3, "a"), param(3, "b", jnp.bfloat16)))
    two = purify(lambda: (param(2, "z"), param(3, "b", jnp.bfloat16), param(3, "a")))
    first, second = one.normal(key), two.normal(key)
    close(first["a"], second["a"])
    assert (first["b"] == second["b"]).all() and first["b"].dtype == jnp.bfloat16
    assert not np.allclose(first["a"], one.normal(jax.random.key(2))["a"])
    many = purify(lambda: [param(1000, f"w{i}") for i in range(8)]).normal(jax.random.PRNGKey(0))
    values = jnp.stack(list(many.values()))
    assert abs(values.mean()) < 0.05 and abs(values.std() - 1) < 0.05
    assert np.abs(np.corrcoef(values) - np.eye(8)).max() < 0.15


def test_every_dictionary_is_ordered_by_name():
    def f():
        z, a = param(2, "z"), prefix("m", lambda: param(2, "a"))()
        return intermediate(z, "late") + intermediate(a, "early") * fixed((), "y") + fixed((), "x")

    key = jax.random.key(0)
    for model in (purify(f), purify(f, jit=True)):
        params, data = model.normal(key), {"y": 1.0, "x": 2.0}
        assert list(model.shapes()) == list(model.zeros()) == list(params) == ["m.a", "z"]
        assert list(model.fixed_shapes()) == ["x", "y"]
        assert list(model.intermediates(params, **data)) == ["early", "late"]
        assert list(jax.grad(lambda p: model(p, **data).sum())(params)) == ["m.a", "z"]
        flat = model.ravel(params)
        assert list(model.unravel(flat)) == ["m.a", "z"]
        close(flat, jnp.concatenate([params["m.a"], params["z"]]))


def test_pytrees_like_others():
    tree = {
        "a": [np.ones((2, 3)), jnp.ones(3, jnp.bfloat16)],
        "b": (jax.ShapeDtypeStruct((2, 3), jnp.complex64), 1.5, None),
    }
    zeros, drawn = purify.zeros_like(tree), purify.normal_like(jax.random.key(0), tree)
    for made in (zeros, drawn):
        types = jax.tree.map(lambda x: (x.shape, x.dtype), made)
        assert types == {
            "a": [((2, 3), jnp.float32), ((3,), jnp.bfloat16)],
            "b": (((2, 3), jnp.complex64), ((), jnp.float32), None),
        }
    assert not any(x.any() for x in jax.tree.leaves(zeros))
    assert purify.zeros_like([3, True, np.arange(2)])[2].dtype == jnp.int32
    # Leaves are independent of each other and of other leaves in the tree.
    first = purify.normal_like(jax.random.key(0), {"a": [np.ones((2, 3))], "c": np.ones((2, 3))})
    close(first["a"][0], drawn["a"][0])
    assert not np.allclose(first["a"][0], first["c"])
    many = purify.normal_like(jax.random.key(1), [np.ones(20_000), np.ones(20_000)])
    assert abs(np.mean(many)) < 0.02 and abs(np.std(many) - 1) < 0.02
    assert abs(np.corrcoef(*many)[0, 1]) < 0.03
    # A model draws the same values, by the same names.
    model = purify(lambda: (param({"u": 3}, "w"), param((), "b")))
    close(model.normal(jax.random.key(2)), purify.normal_like(jax.random.key(2), model.shapes()))
    close(model.zeros(), purify.zeros_like(model.shapes()))


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: purify.zeros_like({"a": ["text"]}),
            r"zeros_like got a leaf at \['a'\]\[0\] that is 'text', a str. It takes a pytree of arrays",
        ),
        (
            lambda: purify.zeros_like(jax.random.key(0)),
            r"zeros_like got a leaf of dtype key<fry>, which has no zero. Leave it out.",
        ),
        (
            lambda: purify.normal_like(jax.random.key(0), {"n": np.arange(3)}),
            r"normal_like got a leaf at \['n'\] of dtype int32, which has no normal distribution. Leave",
        ),
    ],
)
def test_what_has_no_zero_or_no_normal_distribution(call, message):
    with pytest.raises(purify.MarkerError, match=message):
        call()


@pytest.mark.parametrize("several", [False, True], ids=["one", "several"])
def test_your_own_markers(several):
    mark_p = Primitive("mark")
    mark_p.multiple_results = several
    assert purify.trivialize(mark_p) is mark_p

    def mark(x):
        out = mark_p.bind(x, name="here", why=("any", "thing"))
        return out[0] if several else out

    f = lambda x: mark(jnp.sin(x)) * x
    hand = lambda x: jnp.sin(x) * x
    for g in (lambda f: f, jax.jit, jax.vmap, lambda f: jax.vmap(jax.grad(f))):
        close(g(f)(X), g(hand)(X))
    close(jax.jacfwd(jax.jacrev(f))(X), jax.jacfwd(jax.jacrev(hand))(X))
    close(jax.vmap(f, 1, 1)(jnp.ones((2, 3))), hand(jnp.ones((2, 3))))
    close(jax.linear_transpose(lambda x: mark(2 * x), X)(X)[0], 2 * X)
    close(jax.vjp(lambda x: mark(3 * x), X)[1](X)[0], 3 * X)
    found = [e.params for e in jax.make_jaxpr(f)(X).eqns if e.primitive is mark_p]
    assert found == [{"name": "here", "why": ("any", "thing")}]


def test_jit_true_compiles_once():
    traces = []

    @purify(jit=True)
    def model(x):
        traces.append(None)
        return x * param(3, "w")

    close(model({"w": W}, X), W * X)
    close(model({"w": 2 * W}, X), 2 * W * X)
    assert len(traces) == 1


def test_optax_trains_it():
    model = purify(lambda: jnp.polyval(param(3, "c"), fixed(20, "x")))
    x = jnp.linspace(-1, 1, 20)
    y = 2 * x**2 - x + 0.5
    params, tx = model.zeros(), optax.adam(0.1)
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        loss, grads = jax.value_and_grad(lambda p: jnp.mean((model(p, x=x) - y) ** 2))(params)
        updates, state = tx.update(grads, state)
        return optax.apply_updates(params, updates), state, loss

    for _ in range(200):
        params, state, loss = step(params, state)
    assert loss < 1e-4
    np.testing.assert_allclose(params["c"], [2, -1, 0.5], atol=0.05)


# Modules.


def test_the_parameters_of_a_module_as_one_parameter():
    @purify
    def model(x):
        net = nnx.Linear.init(jax.random.key(0))(3, 2)
        net["params"] = param(net["params"], "net")
        return jax.vmap(net)(x)

    x = jnp.ones((4, 3))
    params = model.normal(jax.random.key(1), x)
    assert isinstance(params["net"], nnx.Partition) and params["net"]["kernel"].shape == (3, 2)
    hand = lambda p: x @ p["net"]["kernel"] + p["net"]["bias"]
    close(model(params, x), hand(params))
    grads = jax.grad(lambda p: model(p, x).sum())(params)
    close(grads, jax.grad(lambda p: hand(p).sum())(params))


def test_modules_from_outside_are_constants_and_never_stale():
    net = nnx.Linear.init(jax.random.key(0))(3, 3)
    model = purify(lambda x: prefix("p", lambda x: net(x) * param(3, "w"))(x))
    close(model({"p.w": W}, X), (X @ net.kernel + net.bias) * W)
    net.kernel = net.kernel * 2
    close(model({"p.w": W}, X), (X @ net.kernel + net.bias) * W)
    close(jax.grad(lambda p: model(p, X).sum())({"p.w": W})["p.w"], X @ net.kernel + net.bias)
    with pytest.raises(refx.ClosureError, match="by closure inside a plain jax"):
        jax.jit(model)({"p.w": W}, X)

    @nnx.jit
    def step(net, params):
        return purify(lambda x: net(x) * param(3, "w"))(params, X)

    for _ in range(2):
        net.kernel = net.kernel + 1
        close(step(net, {"w": W}), (X @ net.kernel + net.bias) * W)
        close(nnx.jit(model)({"p.w": W}, X), model({"p.w": W}, X))


def test_writing_a_module_from_outside_is_an_error():
    net = nnx.Linear.init(jax.random.key(0))(3, 3)

    def f():
        net.bias = param(3, "b")

    with pytest.raises(refx.TraceLevelError, match="closes over it"):
        purify(f).shapes()
    assert isinstance(net.bias, jax.Array) and not isinstance(net.bias, jax.core.Tracer)


def test_streams_and_stateful_transformations_inside():
    key = jax.eval_shape(lambda: jax.random.key(0))

    @purify
    def model(x):
        with nnx.scope(fixed(key, "key")):
            drop = nnx.Dropout(0.5)
            out = nnx.jit(lambda d, x: d(x) * param(3, "w"))(drop, x)
            return out + jax.random.normal(nnx.make_rng("noise"), (3,))

    a, b = (model({"w": W}, X, key=jax.random.key(i)) for i in (0, 1))
    assert not np.allclose(a, b)
    close(a, model({"w": W}, X, key=jax.random.key(0)))


def test_shard_map_has_the_whole_parameter():
    mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    f = lambda x: x * param((), "w") + param(2, "b").sum()
    model = purify(
        lambda x: jax.shard_map(
            f, mesh=mesh, in_specs=PartitionSpec("d"), out_specs=PartitionSpec("d")
        )(x)
    )
    x = jnp.arange(8.0)
    params = {"w": 2.0, "b": jnp.ones(2)}
    assert {k: s.shape for k, s in model.shapes(x).items()} == {"w": (), "b": (2,)}
    close(model(params, x), 2 * x + 2)
    close(jax.grad(lambda p: model(p, x).sum())(params), {"w": x.sum(), "b": jnp.full(2, 8.0)})


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda: (param((), "a.b"), purify.prefix("a", lambda: param((), "b"))()),
            r"param\('a\.b'\) was declared by two calls\. Give each",
        ),
        (
            lambda: (param((), "a.b"), purify.prefix("a", lambda: param(3, "b"))()),
            r"param\('a\.b'\) was declared twice, with float32\[\] and with float32\[3\]",
        ),
        (
            lambda: (
                purify.prefix("a.b", lambda: purify.fixed((), "c"))(),
                purify.prefix("a", lambda: purify.fixed((), "b.c"))(),
            ),
            r"fixed\('a\.b\.c'\) was declared by two calls",
        ),
        (
            lambda: (
                purify.intermediate(1.0, "a.b"),
                purify.prefix("a", lambda: purify.intermediate(2.0, "b"))(),
            ),
            r"intermediate\('a\.b'\) was declared by two calls",
        ),
    ],
)
def test_a_name_with_a_prefix_is_the_same_name(make, message):
    with pytest.raises(purify.DuplicateNameError, match=message):
        purify(make).shapes()


@pytest.mark.parametrize("name", ["a)", "a(1)", "a;", ")", ";);", "vmap(a)"])
def test_prefixes_are_kept_as_they_are(name):
    part = purify.prefix(name, lambda x: x * param((), "w"))
    model = purify(lambda: jax.grad(jax.jit(lambda x: jax.vmap(part)(x).sum()))(jnp.ones(2)))
    assert list(model.shapes()) == [f"{name}.w"]
    close(model({f"{name}.w": 3.0}), jnp.full(2, 3.0))
