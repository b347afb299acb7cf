"""Operations of other libraries on a module as a pytree are right, or an error says what to do."""

import collections
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify
from jax.sharding import PartitionSpec

import nnx

X = jnp.ones((3, 2))


class Net(nnx.Module):
    def __init__(self):
        self.linear = nnx.Linear(2, 2)
        self.table = jnp.arange(4.0)
        self.tables = [jnp.ones(2), (jnp.zeros(1), {"a": jnp.ones(3)})]
        self.k = 2.0

    def __call__(self, x):
        return self.linear(x) * self.k + self.table[:2]


@pytest.fixture
def net():
    return Net.init(0)()


LEAVES = {
    "bools": lambda i: i % 2 == 0,
    "numbers": lambda i: i,
    "texts": str,
    "none": lambda i: ...,
    "objects": lambda i: object(),
    "specs": lambda i: PartitionSpec("x"),
    "shapes": lambda i: jax.ShapeDtypeStruct((i,), jnp.float32),
    "numpy": lambda i: np.float32(i),
    "functions": lambda i: lambda: i,
}


@pytest.mark.parametrize("kind", LEAVES)
@pytest.mark.parametrize("how", ["flatten", "clone", "deepcopy", "submodule", "surgery"])
def test_a_tree_of_anything_flattens_to_what_it_was_made_of(net, kind, how):
    import copy

    leaves, treedef = jax.tree.flatten(net)
    others = [LEAVES[kind](i) for i in range(len(leaves))]
    tree = jax.tree.unflatten(treedef, others)
    if how == "clone":
        tree = nnx.clone(tree)
    if how == "deepcopy":
        if kind in ("objects", "functions"):
            others = [0] * len(leaves)
            tree = jax.tree.unflatten(treedef, others)
        tree = copy.deepcopy(tree)
    if how == "submodule":
        assert jax.tree.leaves(tree.linear) == others[:2]
        return
    if how == "surgery":
        tree.table = others[0]
        others[[x is net.table for x in leaves].index(True)] = others[0]
    now, again = jax.tree.flatten(tree)
    assert again == treedef
    assert all(a is b or a == b for a, b in zip(now, others, strict=True))


def test_trees_of_trees(net):
    nested = jax.tree.map(lambda x: [x, (x + 1,)], net)
    expected = [y for x in jax.tree.leaves(net) for y in (x, x + 1)]
    assert all(map(jnp.array_equal, jax.tree.leaves(nested), expected))
    rows = jax.hessian(lambda m: (m.linear.kernel**2).sum() * m.table.sum())(net)
    flat, unravel = jax.flatten_util.ravel_pytree(net)
    plain = jax.hessian(
        lambda v: (lambda m: (m.linear.kernel**2).sum() * m.table.sum())(unravel(v))
    )
    assert sum(x.size for x in jax.tree.leaves(rows)) == plain(flat).size


@pytest.mark.parametrize("transform", [nnx.jit, nnx.jit_filter, jax.jit])
def test_a_mask_is_a_constant_that_is_never_stale(net, transform):
    mask = jax.tree.map(lambda x: x.ndim == 2, net)
    masked = lambda m: jax.tree.map(lambda x, on: x * 2 if on else x, m, mask)
    f = transform(lambda m: jax.tree.leaves(masked(m)))
    assert jnp.array_equal(f(net)[0], net.linear.kernel * 2)
    if transform is jax.jit:
        with pytest.raises(nnx.ClosureError, match="written after it was read by closure"):
            mask.linear.kernel = False
        return
    mask.linear.kernel = False
    assert jnp.array_equal(f(net)[0], net.linear.kernel)
    mask.table = True
    assert jnp.array_equal(jax.tree.leaves(f(net))[2], net.table * 2)


def test_a_mask_becomes_a_model_where_it_is_given_values(net):
    mask = jax.tree.map(lambda x: x.ndim == 2, net)
    mask.linear.kernel = net.linear.kernel

    @nnx.jit
    def double(mask):
        mask.linear.kernel = mask.linear.kernel * 2

    double(mask)
    assert jnp.array_equal(mask.linear.kernel, net.linear.kernel * 2)
    # The leaf that held the bool of a plain array is now a subtree.
    mask.table = nnx.Linear.init(0)(2, 2)
    assert nnx.refs(mask)["table", "kernel"].value is mask.table.kernel
    assert any(x is mask.table.kernel for x in jax.tree.leaves(mask))


@pytest.mark.parametrize("transform", [nnx.jit, jax.jit])
def test_axes_shapes_labels_and_shardings_made_of_a_module(net, transform):
    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), net)
    axes = jax.tree.map(lambda x: 0, net)
    out = transform(lambda m: jax.vmap(lambda m: m(X), in_axes=(axes,))(m))(stacked)
    assert jnp.allclose(out[1], net(X))
    shapes = jax.eval_shape(lambda m: m, net)
    zeros = transform(lambda: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes))()
    assert zeros.linear.kernel.shape == (2, 2) and not zeros.table.any()
    labels = jax.tree.map(lambda x: "big" if x.size > 3 else "small", net)
    sizes = transform(lambda: jax.tree.map(lambda n: {"big": 1.0, "small": 0.0}[n], labels))()
    assert jax.tree.leaves(sizes)[0] == 1
    filled = jax.eval_shape(lambda: Net.init(0)())
    nnx.update(filled, {p: v for p, v in net["params"].items()})
    assert jnp.allclose(nnx.jit(lambda: filled.linear(X))(), net.linear(X))
    with pytest.raises(nnx.ClosureError, match=r"nnx\.frozen\(model\), a constant"):
        jax.jit(lambda: filled.linear(X))()


def test_partition_and_combine(net):
    """The idiom of Equinox, written out."""
    is_none = lambda x: x is None
    params = jax.tree.map(lambda x: x if jnp.issubdtype(x.dtype, jnp.floating) else None, net)
    static = jax.tree.map(lambda x: None if jnp.issubdtype(x.dtype, jnp.floating) else x, net)
    combine = lambda p: jax.tree.map(lambda a, b: b if a is None else a, p, static, is_leaf=is_none)
    assert jnp.allclose(jax.jit(lambda p: combine(p)(X))(params), net(X))
    grads = jax.grad(lambda p: combine(p)(X).sum())(params)
    assert jnp.allclose(grads.table, jnp.array([3.0, 3.0, 0, 0]))


class Affine:
    def __init__(self, net):
        self.net = net

    def __call__(self, x):
        return x * self.net(x)


def _unflatten(treedef, leaves):
    new = object.__new__(Affine)
    new.__dict__.update(jax.tree.unflatten(treedef, leaves))
    return new


jax.tree_util.register_pytree_node(Affine, lambda a: jax.tree.flatten(a.__dict__), _unflatten)


@pytest.mark.parametrize("wrap", [lambda net: net, lambda net: [net], lambda net: {"a": (net,)}])
def test_a_pytree_that_flattens_a_module_itself(wrap):
    class Flow(nnx.Module):
        def __init__(self):
            self.net = nnx.Linear(2, 2)
            self.bijector = Affine(wrap(self.net))

        def inner(self):
            return next(x for x in [self.bijector.net] if True)

        def __call__(self, x):
            held = self.bijector.net
            while not isinstance(held, nnx.Module):
                held = held[0] if isinstance(held, list | tuple) else held["a"]
            return (x * held(x)).sum()

    flow = Flow.init(0)()
    for grads in (
        nnx.grad(lambda m: m(X))(flow)["net.kernel"],
        nnx.jit(nnx.grad(lambda m: m(X)))(flow)["net.kernel"],
        jax.grad(lambda m: m(X))(flow).net.kernel,
        jax.jit(jax.grad(lambda m: m(X)))(flow).net.kernel,
    ):
        assert (grads == 3).all()
    copy = nnx.clone(flow)
    assert len(nnx.refs(copy)) == 2 and copy.bijector is not flow.bijector
    step = nnx.jit(lambda m: m(X))
    step(flow)
    flow.bijector.net = wrap(nnx.Linear.init(1)(2, 2))
    assert jnp.allclose(step(flow), flow(X))


def _both(m, held):
    """Writes by one name and reads by the other."""
    m.bias = m.bias + 1
    return held(X).sum()


OWN_ARGUMENT = {
    "jit": lambda net, held: nnx.jit(_both)(net, held),
    "keywords": lambda net, held: nnx.jit(_both)(m=net, held=held),
    "remat": lambda net, held: nnx.remat(_both)(net, held),
    "cond": lambda net, held: nnx.cond(True, _both, lambda m, held: 0.0, net, held),
    "switch": lambda net, held: nnx.switch(0, [_both, lambda m, held: 0.0], net, held),
    "scan": lambda net, held: nnx.scan(lambda c, _: (c, _both(*c)), (net, held), None, length=1)[1][
        0
    ],
    "fori_loop": lambda net, held: nnx.fori_loop(
        0, 1, lambda i, c: (c[0], c[1], _both(c[0], c[1])), (net, held, jnp.zeros(()))
    )[2],
    "while_loop": lambda net, held: nnx.while_loop(
        lambda c: c[2] == 0, lambda c: (c[0], c[1], _both(c[0], c[1])), (net, held, jnp.zeros(()))
    )[2],
    "map": lambda net, held: nnx.map(lambda x: _both(net, held), jnp.zeros(1))[0],
    "checkify": lambda net, held: nnx.checkify(_both)(net, held)[1],
    "value_and_grad": lambda net, held: nnx.value_and_grad(_both)(net, held)[0],
    "functional": lambda net, held: nnx.functional(lambda: _both(net, held), net)[0](
        nnx.get_partition(net)
    )[0],
    "jit_filter": lambda net, held: nnx.jit_filter(_both)(net, held),
}


@pytest.mark.parametrize("name", OWN_ARGUMENT)
@pytest.mark.parametrize("around", [lambda a: a, lambda a: Affine(a)], ids=["alone", "nested"])
def test_it_shares_with_another_argument(name, around):
    net = nnx.Linear.init(0)(2, 2)
    copy = nnx.clone(net)
    expected = _both(copy, around(Affine(copy)))
    assert jnp.allclose(OWN_ARGUMENT[name](net, around(Affine(net))), expected, atol=1e-5)
    assert net.bias.tolist() == ([0, 0] if name in ("functional", "jit_filter") else [1, 1])


@pytest.mark.parametrize(
    "transform",
    [lambda f: f, nnx.jit, nnx.jit_filter, nnx.remat, lambda f: nnx.jit(nnx.jit(f))],
    ids=["grad", "jit", "jit_filter", "remat", "jit twice"],
)
def test_its_gradient_is_that_of_the_module(transform):
    net = nnx.Linear.init(0)(2, 2)
    held = Affine([net])
    call = lambda held: (X * held.net[0](X)).sum()
    loss = transform(lambda m, held: call(held))
    assert (nnx.grad(loss)(net, held)["kernel"] == 3).all()
    assert (nnx.grad(loss, argnums=1)(net, held)["net.0.kernel"] == 3).all()
    assert (nnx.grad(lambda m: call(held))(net)["kernel"] == 3).all()
    tangent = jax.tree.map(jnp.ones_like, net["params"])
    assert nnx.jvp(lambda m: call(Affine([m])), (net,), (tangent,))[1] == 18
    out = nnx.vmap(lambda held, x: held.net[0](x), in_axes=({"params": None}, 0))(held, X)
    assert jnp.allclose(out, net(X))
    with pytest.raises(nnx.DifferentiationError, match="arguments 0 and 1 share it"):
        nnx.grad(loss, argnums=(0, 1))(net, held)


def test_it_comes_out_and_goes_round():
    net = nnx.Linear.init(0)(2, 2)
    held = nnx.jit(lambda m: Affine([m]))(net)
    assert type(held) is Affine and held.net[0] is net
    held.scale, held.fn, held.power = jnp.array(2.0), jnp.tanh, 2

    @nnx.jit
    def step(held):
        assert held.power == 2 and held.fn is jnp.tanh
        held.net[0].bias = held.net[0].bias + held.scale
        return held

    again = step(held)
    assert again is not held and again.net[0] is net and again.scale == 2 and again.power == 2
    assert net.bias.tolist() == [2, 2]
    calls = [step(held) for _ in range(2)]
    assert calls[1].net[0] is net and nnx.jit(step).explain(held).reasons
    assert step.explain(held).compiled
    layers = [held]  # in a container that a loop closes over

    def body(i, total):
        net.bias = net.bias + 1
        return total + layers[0].net[0].bias.sum()

    assert nnx.fori_loop(0, 2, body, 0.0) == 14 + 16
    with pytest.raises(nnx.StructureError, match="is an argument of nnx.jit.*was changed inside"):
        nnx.jit(lambda held: held.net.append(nnx.Linear.init(0)(2, 2)))(held)


def test_one_that_keeps_its_module_in_a_slot_is_an_error():
    class Slotted:
        __slots__ = ("net",)

        def __init__(self, net):
            self.net = net

    jax.tree_util.register_pytree_node(
        Slotted,
        lambda a: jax.tree.flatten(a.net),
        lambda treedef, leaves: Slotted(jax.tree.unflatten(treedef, leaves)),
    )
    net = nnx.Linear.init(0)(2, 2)
    for use in (nnx.split, nnx.jit(lambda a: a.net(X)), nnx.grad(lambda a: a.net(X).sum())):
        with pytest.raises(nnx.StructureError, match=r"(?s)holds a Linear in a slot.*__slots__"):
            use(Slotted(net))


def test_a_function_that_closes_over_its_module_is_an_error():
    class Net(nnx.Module):
        def __init__(self):
            self.net = nnx.Linear(2, 2)
            self.fn = lambda x: self.net(x)

    net = Net.init(0)()
    message = r"(?s)Attribute 'fn' is a function that closes over a (Net|Linear).*Make it a method"
    for use in (jax.tree.leaves, nnx.split, nnx.jit(lambda m: m.net(X))):
        with pytest.raises(nnx.StructureError, match=message):
            use(net)


class TestFrozen:
    def test_any_program_takes_it_as_a_constant(self, net):
        frozen = nnx.frozen(net)
        expected = net(X)
        model_of = lambda x: frozen(x)
        assert jnp.allclose(jax.jit(model_of)(X), expected)
        assert jnp.allclose(nnx.jit(model_of)(X), expected)
        assert jnp.allclose(jax.lax.map(model_of, X), expected)
        assert jnp.allclose(jax.vmap(model_of)(X), expected)
        error, out = checkify.checkify(model_of)(X)
        assert jnp.allclose(out, expected) and error.get() is None
        assert jnp.allclose(nnx.scan(lambda c, x: (c, frozen(x)), None, X)[1], expected)
        net.linear.bias = net.linear.bias + 1
        assert jnp.allclose(frozen(X), expected)

    def test_nobody_writes_it(self, net):
        frozen = nnx.frozen(net)
        kernel = frozen.linear.kernel

        def write():
            frozen.linear.kernel = kernel + 1

        def attribute():
            frozen.k = 3.0

        writes = [
            write, attribute, nnx.jit(write), frozen.train and (lambda: setattr(frozen, "new", 1)),
            lambda: nnx.update(frozen, net["params"]),
            lambda: nnx.jit(lambda m: setattr(m.linear, "kernel", kernel + 1))(frozen),
            lambda: setattr(jax.tree.map(lambda x: x, frozen).linear, "kernel", kernel),
        ]  # fmt: skip
        for wrong in writes:
            with pytest.raises(nnx.ReadOnlyError, match=r"frozen.*nnx\.clone of it"):
                wrong()
        assert frozen.linear.kernel is kernel and frozen.k == 2

    def test_tree_operations_leave_it_frozen_and_clone_does_not(self, net):
        frozen = nnx.frozen(net)
        leaves, treedef = jax.tree.flatten(frozen)
        assert treedef == jax.tree.structure(jax.tree.map(lambda x: x * 2, frozen))
        grads = jax.jit(jax.grad(lambda m: m(X).sum()))(frozen)
        with pytest.raises(nnx.ReadOnlyError):
            grads.linear.bias = leaves[0]
        free = nnx.clone(frozen)
        free.linear.bias = free.linear.bias + 1
        assert jax.tree.structure(free) == jax.tree.structure(net) != treedef
        assert nnx.frozen(frozen).linear.kernel is net.linear.kernel


class TestFunctional:
    def test_the_state_goes_in_and_comes_out(self, net):
        class Counter(nnx.Module):
            n: jax.Array = nnx.ref("counters")

            def __init__(self):
                self.n = jnp.zeros(())

        counter = Counter()

        def fn(x, scale=1.0):
            counter.n = counter.n + x.sum()
            return net(x) * scale

        pure, state = nnx.functional(fn, net, counter)
        for transform in (lambda f: f, jax.jit):
            out, new = transform(pure)(state, X, scale=2.0)
            assert jnp.allclose(out, net(X) * 2)
            assert new["1.n"] == 6 and state["1.n"] == 0 and counter.n == 0
        grads = jax.grad(lambda s: pure(s, X)[0].sum())(state)
        assert grads["0.linear.bias"].tolist() == [6, 6] and "0.table" not in state
        many = jax.vmap(lambda x: pure(state, x[None])[1])(X)
        assert many["1.n"].tolist() == [2, 2, 2]
        final, outs = jax.lax.scan(lambda s, x: pure(s, x[None])[::-1], state, X)
        assert final["1.n"] == 6 and outs.shape == (3, 1, 2)
        nnx.update((net, counter), {p: v for p, v in final.items() if p[0] == "1"})
        assert counter.n == 6

    def test_modules_and_methods_are_trees_themselves(self, net):
        pure, state = nnx.functional(net)
        assert jnp.allclose(pure(state, X)[0], net(X))
        doubled = jax.tree.map(lambda v: v * 2, state)
        assert jnp.allclose(pure(doubled, X)[0], net(X) * 2 - net.table[:2])

    def test_what_is_not_in_the_state(self, net):
        other = nnx.Ref(jnp.zeros(()))

        def fn(x):
            other.value = other.value + 1
            return net(x)

        pure, state = nnx.functional(fn, net)
        with pytest.raises(
            nnx.TraceLevelError, match=r"not part of the state.*nnx\.functional\(fn"
        ):
            pure(state, X)
        assert other.value == 0
        pure, state = nnx.functional(lambda: net.linear, net)
        with pytest.raises(nnx.StructureError, match="returns a module"):
            pure(state)
        pure, state = nnx.functional(lambda: setattr(net, "k", 3.0), net)
        with pytest.raises(nnx.RefError):
            pure(state)
        assert net.k == 2


class Slots:
    __slots__ = ("scale",)

    def __init__(self, scale):
        self.scale = scale

    def __eq__(self, other):
        return self.scale == other.scale

    __hash__ = None


class Frames(collections.UserDict):
    @property
    def scale(self):
        return self["scale"]

    @scale.setter
    def scale(self, value):
        self["scale"] = value


CONFIGS = {
    "namespace": lambda: types.SimpleNamespace(scale=2.0),
    "slots": lambda: Slots(2.0),
    "mapping": lambda: Frames(scale=2.0),
    "set": lambda: types.SimpleNamespace(scale=2.0, names={"a"}),
}


@pytest.mark.parametrize("transform", [nnx.jit, jax.jit])
@pytest.mark.parametrize("kind", CONFIGS)
def test_equal_settings_of_two_models_are_not_mixed_up(kind, transform):
    class Net(nnx.Module):
        def __init__(self):
            self.config = CONFIGS[kind]()
            self.w = nnx.Ref(jnp.ones(2), "params")

        def __call__(self):
            scale = self.config.scale * len(getattr(self.config, "names", "1"))
            return self.w.value.sum() * scale

    first, second = Net(), Net()
    assert jax.tree.structure(first) == jax.tree.structure(second)
    step = transform(lambda m: m())
    assert step(first) == step(first) == 4
    first.config.scale = 3.0
    assert step(first) == step(first) == 6
    # Now it is traced for the other one, whose settings equal the old ones of the first.
    assert transform(lambda m: m())(second) == 4 and nnx.clone(second)() == 4
    assert jax.tree.map(lambda x: x, second)() == 4
    first.config.scale = 2.0
    assert step(first) == transform(lambda m: m())(first) == 4
    if kind == "set":
        second.config.names.add("b")
        assert step(second) == 8
