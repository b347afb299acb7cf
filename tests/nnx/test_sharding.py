"""Placement that is said once: by metadata or by rule, for existing values and for new ones."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import nnx

RULES = {"embed": "data", "mlp": "model", "batch": "data"}


class Net(nnx.Module):
    w: jax.Array = nnx.param(sharding=("embed", "mlp"))
    seen: jax.Array = nnx.ref("counters")

    def __init__(self):
        self.w = jax.random.normal(self.make_rng("params"), (8, 16))
        self.out = nnx.Linear(16, 8, kernel_metadata={"sharding": ("mlp", "embed")})
        self.seen = jnp.zeros((), jnp.int32)

    def __call__(self, x):
        self.seen += 1
        return self.out(nnx.relu(x @ self.w))


def mesh_of(kind):
    return jax.make_mesh((2, 4), ("data", "model"), axis_types=(kind,) * 2)


AUTO, EXPLICIT = mesh_of(AxisType.Auto), mesh_of(AxisType.Explicit)
KINDS = pytest.mark.parametrize("mesh", [AUTO, EXPLICIT], ids=["auto", "explicit"])


def spec(x):
    parts = list(x.sharding.spec)
    while parts and parts[-1] is None:
        parts.pop()
    return P(*parts)


def specs(partition):
    return {".".join(path): spec(x) for path, x in partition.items()}


PLACED = {"w": P("data", "model"), "out.kernel": P("model", "data"), "out.bias": P()}


@KINDS
def test_values_are_made_where_their_metadata_says(mesh):
    whole = Net.init(0)()
    with jax.set_mesh(mesh), nnx.axis_rules(RULES):
        eager = Net.init(0)()
        compiled = nnx.jit(lambda: Net.init(0)())()
        shapes = nnx.eval_shape(lambda: Net.init(0)())
    for net in (eager, compiled):
        assert specs(net["params"]) == PLACED
    assert spec(shapes.w) == PLACED["w"] and spec(shapes.out.kernel) == PLACED["out.kernel"]
    for net in (eager, compiled):
        for a, b in zip(jax.tree.leaves(net), jax.tree.leaves(whole), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6)
    shard = compiled.out.kernel.addressable_shards[0]
    assert shard.data.shape == (4, 4)


def test_a_layer_is_drawn_in_parts():
    with jax.set_mesh(AUTO):
        wide = nnx.Linear.init(0)(256, 512, kernel_metadata={"sharding": (None, "model")})
    assert spec(wide.kernel) == P(None, "model")
    assert {s.data.shape for s in wide.kernel.addressable_shards} == {(256, 128)}


@KINDS
@pytest.mark.parametrize("where", ["outside", "inside"])
def test_the_state_of_an_optimizer_goes_where_its_parameters_are(mesh, where):
    def make():
        net = Net.init(0)()
        return net, nnx.Optimizer(net, optax.adam(1e-2))

    with jax.set_mesh(mesh), nnx.axis_rules(RULES):
        net, optimizer = make() if where == "outside" else nnx.jit(make)()
    state = specs(optimizer["opt_state"])
    for moment in ("mu", "nu"):
        for path, want in PLACED.items():
            assert state[f"state.0.{moment}.{path}"] == want
    assert specs(net["params"]) == PLACED


def test_a_factored_state_has_what_is_left_of_the_sharding():
    class Wide(nnx.Module):
        w: jax.Array = nnx.param(sharding=("data", "model"))
        square: jax.Array = nnx.param(sharding=P("data", "model"))

        def __init__(self):
            self.w, self.square = jnp.ones((128, 256)), jnp.ones((128, 128))

    def make():
        wide = Wide()
        return nnx.Optimizer(wide, optax.adafactor(1e-2, min_dim_size_to_factor=64))

    with jax.set_mesh(AUTO):
        state = nnx.jit(make)()["opt_state"]
    # optax keeps the sums over the longest dimension as v_row, those over the second as v_col.
    found = {".".join(p[-2:]): (x.shape, spec(x)) for p, x in state.items() if x.size > 1}
    assert found["v_row.w"] == ((128,), P("data")) and found["v_col.w"] == ((256,), P("model"))
    assert found["v_row.square"] == ((128,), P("data"))
    assert found["v_col.square"] == ((128,), P("model"))


@KINDS
def test_a_step_keeps_every_value_in_its_place(mesh):
    traced = []

    @nnx.jit
    def step(net, optimizer, x):
        traced.append(1)
        loss, grads = nnx.value_and_grad(lambda net: jnp.mean((net(x) - 1) ** 2))(net)
        optimizer.update(net, grads)
        return loss

    x = jnp.ones((8, 8))
    alone = Net.init(0)()
    expected = [step(alone, state, x) for state in [nnx.Optimizer(alone, optax.adam(1e-2))] * 3]
    net = Net.init(0)()
    optimizer = nnx.Optimizer(net, optax.adam(1e-2))
    rule = {nnx.PathContains("w"): P("data"), ...: P()}
    assert nnx.shard((net, optimizer), rule, mesh=mesh)[0] is net
    before = specs(nnx.get_partition((net, optimizer)))
    traced.clear()
    with jax.set_mesh(mesh):
        x = jax.device_put(x, NamedSharding(mesh, P("data") if mesh is AUTO else P()))
        losses = [step(net, optimizer, x) for _ in range(3)]
        assert len(traced) == 1 and step.explain(net, optimizer, x).compiled
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    assert specs(nnx.get_partition((net, optimizer))) == before and net.seen == 3


def test_a_model_that_was_moved_compiles_once_more_and_moves_back():
    double = nnx.jit(lambda net: setattr(net, "w", net.w * 2))
    net = Net.init(0)()
    double(net)
    nnx.shard(net, {"params": P("data")}, mesh=AUTO)
    reasons = double.explain(net).reasons
    assert any(r.startswith("net.w") and "sharded otherwise" in r for r in reasons)
    double(net)
    assert spec(net.w) == P("data") and double.explain(net).compiled
    four = jax.make_mesh((4,), ("x",), devices=jax.devices()[:4], axis_types=(AxisType.Auto,))
    nnx.shard(net, {nnx.PathContains("w"): P("x")}, mesh=four)
    double(net)
    assert spec(net.w) == P("x") and len(net.w.sharding.device_set) == 4


def test_donation_keeps_the_place():
    step = nnx.jit(lambda net: setattr(net, "w", net.w + 1), donate=True)
    net = nnx.shard(Net.init(0)(), {...: P()}, mesh=AUTO)
    nnx.shard(net, {"params": P(None)}, mesh=AUTO)
    net.w = jax.device_put(net.w, NamedSharding(AUTO, P("data", "model")))
    step(net)
    step(net)
    assert spec(net.w) == P("data", "model")


def test_where_things_belong_wins_by_order():
    net = nnx.eval_shape(lambda: Net.init(0)())
    abstract = AbstractMesh((2, 4), ("data", "model"))
    with nnx.axis_rules({"mlp": "model"}):
        by_rules = nnx.shardings(net, mesh=abstract)
        inner = nnx.shardings(net, axes={"embed": ("data",)}, mesh=abstract)
        with nnx.axis_rules([("mlp", None)]):
            none = nnx.shardings(net, mesh=abstract)
    assert by_rules["w"].spec == P(None, "model") and by_rules["seen"].spec == P()
    assert inner["w"].spec == P("data", "model") and none["w"].spec == P()
    # A name without a rule is a mesh axis or nothing.
    assert nnx.shardings(net, mesh=AbstractMesh((2,), ("mlp",)))["w"].spec == P(None, "mlp")
    said = {nnx.PathContains("out"): P("data"), "params": P("model", "data")}
    wins = nnx.shardings(net, said, mesh=abstract)
    assert wins["out.kernel"].spec == P("data") and wins["w"].spec == P("model", "data")
    by_call = nnx.shardings(
        net, lambda path, ref: P("data") if path == ("w",) else None, mesh=abstract
    )
    assert by_call["w"].spec == P("data") and by_call["out.kernel"].spec == P()


def test_fsdp_divides_the_largest_axis_that_it_can():
    class Arrays(nnx.Module):
        def __init__(self):
            for i, shape in enumerate([(6, 16), (16, 6), (7, 5), (4,), (), (24, 8)]):
                setattr(self, f"a{i}", nnx.Ref(jnp.zeros(shape), "params"))

    found = nnx.shardings(
        Arrays(), nnx.fsdp("data", min_size=8), mesh=AbstractMesh((8,), ("data",))
    )
    got = {path[0]: s.spec for path, s in found.items()}
    wanted = [P(None, "data"), P("data"), P(), P(), P(), P("data")]
    assert got == {f"a{i}": want for i, want in enumerate(wanted)}
    both = nnx.shardings(Arrays(), nnx.fsdp(("x", "y"), 0), mesh=AbstractMesh((2, 4), ("x", "y")))
    assert both["a5"].spec == P(("x", "y"))


def test_shard_takes_keys_plain_arrays_trees_and_numbers():
    class All(nnx.Module):
        def __init__(self):
            self.stream = nnx.RngStream(jax.random.key(0))
            self.plain = jnp.ones((8, 2))
            self.items = [np.ones((8,)), nnx.Ref(2, "counters")]
            self.tree = nnx.Ref({"a": jnp.ones((8, 4)), "b": 3.0}, "params")

    model = nnx.shard(
        All(), lambda path, ref: P("data") if path[0] in ("plain", "tree") else None, mesh=AUTO
    )
    assert spec(model.plain) == P("data") and spec(model.tree.value["a"]) == P()
    assert model.items[1].value == 2 and model.tree.value["b"] == 3.0
    assert model["rngs"]["stream.key"].sharding.device_set == set(jax.devices())
    assert jnp.array_equal(model.items[0], np.ones(8))


@KINDS
def test_constrain_an_activation(mesh):
    x = jnp.ones((8, 4))
    assert nnx.constrain(x, "batch", None) is x
    f = nnx.jit(lambda x: nnx.constrain(jnp.sin(x), "batch", "mlp"))
    with jax.set_mesh(mesh):
        with nnx.axis_rules(RULES):
            assert spec(f(x)) == P("data", "model") == spec(nnx.constrain(x, "batch", "mlp"))
        with nnx.axis_rules({"batch": "model"}):  # another program
            assert spec(f(x)) == P("model")
        assert spec(f(x)) == P()
    with jax.set_mesh(mesh), pytest.raises(nnx.ShardingError, match=r"\(8, 4\) and 1 names"):
        nnx.constrain(x, "batch")


def fails(match, error=nnx.ShardingError):
    return pytest.raises(error, match=match)


def test_bad_shardings_name_the_ref_and_change_nothing():
    net = Net.init(0)()
    before = {path: x for path, x in nnx.get_partition(net).items()}
    with fails(r"nnx\.shard needs a mesh, but there is none"):
        nnx.shard(net)
    with fails(
        r"Ref 'w' would be divided twice along the mesh axis 'data': for 'embed' and for 'mlp'"
    ):
        nnx.shard(net, axes={"embed": "data", "mlp": "data"}, mesh=AUTO)
    with fails(r"Ref 'out.bias' has shape \(8,\), but its sharding P\('data', 'model'\) has 2"):
        nnx.shard(net, {"params": P("data", "model")}, mesh=AUTO)
    with fails(
        r"Ref 'w' has shape \(8, 16\), and its dimension of size 8 cannot be divided into 3"
    ):
        nnx.shard(net, {"params": P("data")}, mesh=AbstractMesh((3,), ("data",)))
    with fails(r"no collection 'parms' here; did you mean 'params'", nnx.FilterError):
        nnx.shard(net, {"parms": P("data")}, mesh=AUTO)
    with fails(r"write \{\.\.\.: P\('data',\)\} for all", TypeError):
        nnx.shard(net, P("data"), mesh=AUTO)
    with fails(r"Write a tuple: \('data',\)", TypeError):
        nnx.shard(net, {"params": "data"}, mesh=AUTO)
    with fails(r"nnx.fsdp\('fsdp'\) needs a mesh axis 'fsdp', but the mesh has 'data', 'model'"):
        nnx.shard(net, nnx.fsdp("fsdp"), mesh=AUTO)
    with fails(r"specs must be a dict from filter", TypeError):
        nnx.shard(net, 3, mesh=AUTO)
    with fails(r"takes a jax.sharding.Mesh, but got an int", TypeError):
        nnx.shard(net, mesh=3)
    with fails(r"The axis rule for 'a' is 3", TypeError), nnx.axis_rules({"a": 3}):
        pass
    with fails(r"two axis rules for 'a'", TypeError), nnx.axis_rules([("a", "x"), ("a", "y")]):
        pass
    with fails(r"Axis rules must be a dict", TypeError), nnx.axis_rules(["ab"]):
        pass
    with fails(r"nnx.fsdp takes the name", TypeError):
        nnx.fsdp(())
    assert all(x is before[path] for path, x in nnx.get_partition(net).items())
    with jax.set_mesh(AUTO), fails(r"A new Ref of 'params' has shape \(3,\)"):
        nnx.Ref(jnp.ones(3), "params", sharding=("data",))
    frozen = nnx.frozen(net)
    with pytest.raises(nnx.ReadOnlyError):
        nnx.shard(frozen, mesh=AUTO)


def test_rules_are_those_of_the_thread_and_end_with_the_block():
    import threading

    seen = []
    with nnx.axis_rules({"embed": "data"}):
        net = nnx.eval_shape(lambda: Net.init(0)())
        thread = threading.Thread(
            target=lambda: seen.append(nnx.shardings(net, mesh=AUTO)["w"].spec)
        )
        thread.start()
        thread.join()
        assert nnx.shardings(net, mesh=AUTO)["w"].spec == P("data")
    assert seen == [P()] and nnx.shardings(net, mesh=AUTO)["w"].spec == P()


@pytest.mark.parametrize("said", [(None, "model"), P(None, "model")], ids=["tuple", "spec"])
@pytest.mark.parametrize(("out_axes", "want"), [(0, 2), (1, 2), (2, 1), (-1, 1), (-2, 2), (-3, 2)])
def test_vmap_adds_the_entry_where_it_adds_the_axis(said, out_axes, want):
    def make(key):
        return nnx.Linear.init(key)(8, 16, use_bias=False, kernel_metadata={"sharding": said})

    with jax.set_mesh(AUTO):
        many = nnx.vmap(make, out_axes=out_axes)(jax.random.split(jax.random.key(0), 4))
    assert many.kernel.shape[want] == 16
    assert spec(many.kernel) == P(*[None] * want, "model")


def test_a_stack_and_its_layers_have_the_entries_of_their_axes():
    def layer():
        return nnx.Linear(8, 8, kernel_metadata={"sharding": ("embed", "mlp")})

    def entries(module):
        return nnx.get_ref(module, "kernel").metadata["sharding"]

    with nnx.scope(0):
        stack = nnx.Stack(layer, 3)
    stacked = (None, "embed", "mlp")
    assert entries(stack.layers) == entries(stack[1:].layers) == stacked
    assert entries(stack[1]) == ("embed", "mlp")
    assert entries(nnx.Stack.of(stack.unstack()).layers) == stacked
