"""Placement of slices and stacks, rules for compiled functions, and placement inside a body."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import nnx


def mesh_of(kind):
    return jax.make_mesh((2, 4), ("data", "model"), axis_types=(kind,) * 2)


AUTO, EXPLICIT = mesh_of(AxisType.Auto), mesh_of(AxisType.Explicit)
KINDS = pytest.mark.parametrize("mesh", [AUTO, EXPLICIT], ids=["auto", "explicit"])


def entries(module, name="kernel"):
    return nnx.get_ref(module, name).metadata["sharding"]


def spec(x):
    return tuple(x.sharding.spec) + (None,) * (x.ndim - len(x.sharding.spec))


def linear(said=("embed", "mlp")):
    # Uniform numbers take a third of the time that the default ones take to compile.
    uniform = nnx.initializers.uniform()
    return nnx.Linear(
        8, 16, use_bias=False, kernel_init=uniform, kernel_metadata={"sharding": said}
    )


def stack_of(count=4, **options):
    with nnx.scope(0):
        return nnx.Stack(linear, count, **options)


def fails(match, error=nnx.ShardingError):
    return pytest.raises(error, match=match)


# The mapped values, and what a body sees of them.


@pytest.mark.parametrize("said", [("embed", "mlp"), P("embed", "mlp"), P("embed")])
@pytest.mark.parametrize("axis", [0, 1, 2, -1, -2, -3])
def test_a_lane_has_no_entry_for_the_axis_that_is_mapped(said, axis):
    seen = []

    def look(layer):
        seen.append(entries(layer))
        assert layer.kernel.shape == (8, 16)
        layer.kernel = layer.kernel * 2

    with nnx.scope(0):
        many = nnx.vmap(lambda: linear(said), axis_size=3, out_axes=axis, partition_name="lanes")()
    before, kernel = entries(many), np.asarray(many.kernel)
    assert before[axis % 3] == "lanes" and type(before) is type(said)
    nnx.vmap(look, in_axes=axis)(many)
    assert seen[0] in (said, P(*said, None)) and entries(many) == before
    np.testing.assert_array_equal(many.kernel, 2 * kernel)


def test_an_axis_that_is_not_mapped_keeps_its_entry_and_two_maps_take_two():
    seen = []

    def inner(layer, x):
        seen.append(entries(layer))
        return layer.kernel.sum() + x

    stack = stack_of(2)
    nnx.vmap(inner, in_axes=(None, 0))(stack.layers, jnp.ones(3))
    with nnx.scope(0):
        twice = nnx.vmap(nnx.vmap(linear, axis_size=3, partition_name="in"), axis_size=2)()
    assert entries(twice) == (None, "in", "embed", "mlp")
    nnx.vmap(nnx.vmap(inner))(twice, jnp.ones((2, 3)))
    assert seen == [(None, "embed", "mlp"), ("embed", "mlp")]


@pytest.mark.parametrize("jit", [True, False])
def test_a_step_of_a_loop_has_none_either_and_what_it_makes_is_stacked(jit):
    seen = []

    def step(x, layer):
        seen.append(entries(layer))
        return x + layer.kernel.sum(), nnx.clone(layer)

    stack = stack_of(partition_name="layers")
    with jax.disable_jit(not jit):
        total, copies = nnx.scan(step, 0.0, stack.layers)
        mapped = nnx.map(lambda layer: nnx.clone(layer), stack.layers)
    assert set(seen) == {("embed", "mlp")} and entries(stack.layers)[0] == "layers"
    np.testing.assert_allclose(total, stack.layers.kernel.sum(), rtol=1e-5)
    for made in (copies, mapped):
        assert entries(made) == (None, "embed", "mlp")
        np.testing.assert_array_equal(made.kernel, stack.layers.kernel)


def test_what_a_loop_carries_keeps_its_entries():
    seen = []

    def step(layer, _):
        seen.append(entries(layer))
        layer.kernel = layer.kernel + 1
        return layer, None

    layer = nnx.Linear.init(0)(8, 16, kernel_metadata=META)
    nnx.scan(step, layer, None, length=2)
    assert set(seen) == {("embed", "mlp")}
    seen.clear()
    stack = stack_of()
    nnx.scan(
        lambda c, m: (c, seen.append(entries(m))), 0, stack.layers, length=2, axes={...: nnx.CARRY}
    )
    assert set(seen) == {(None, "embed", "mlp")}


META = {"sharding": ("embed", "mlp")}


def test_a_layer_of_a_stack_is_placed_by_its_own_entries():
    class Layer(nnx.Module):
        def __init__(self):
            self.up = nnx.Linear(8, 8, use_bias=False, kernel_metadata=META)

        def __call__(self, x):
            found.append((entries(self.up), nnx.shardings(self, mesh=AUTO)["up.kernel"].spec))
            return self.up(x)

    found = []
    with jax.set_mesh(AUTO), nnx.axis_rules({"mlp": "model", "layers": None}):
        stack = nnx.Stack.init(0)(Layer, 2, partition_name="layers")
        alone = stack.unstack()
        y = stack(jnp.ones((4, 8)))
    assert set(found) == {(("embed", "mlp"), P(None, "model"))}
    assert spec(stack.layers.up.kernel) == (None, None, "model")
    want = np.ones((4, 8))
    for layer in alone:
        want = want @ np.asarray(layer.up.kernel)
    np.testing.assert_allclose(y, want, rtol=1e-5)


def test_a_new_ref_that_is_hung_on_a_lane_gets_the_entry():
    def grow(layer):
        layer.extra = nnx.Ref(layer.kernel[0], "params", sharding=("mlp",))
        layer.two = nnx.Ref(
            {"a": layer.kernel, "b": layer.kernel}, "params", sharding=META["sharding"]
        )

    stack = stack_of()
    nnx.vmap(grow, partition_name="layers")(stack.layers)
    assert entries(stack.layers, "extra") == ("layers", "mlp")
    assert entries(stack.layers, "two") == ("layers", "embed", "mlp")
    np.testing.assert_array_equal(stack.layers.extra.value, stack.layers.kernel[:, 0])


@KINDS
def test_partition_name_says_where_the_added_axis_is(mesh):
    def make(**options):
        return nnx.vmap(lambda: linear((None, "model")), axis_size=4, **options)()

    with jax.set_mesh(mesh):
        with nnx.scope(0):
            by_axis, by_spmd = make(partition_name="data"), make(spmd_axis_name="data")
            both = make(partition_name=("data", "rest"), spmd_axis_name="data")
            stack = nnx.Stack(lambda: linear((None, "model")), 2, partition_name="data")
            layers = [linear((None, "model")) for _ in range(2)]
            joined = nnx.Stack.of(layers, partition_name="data")
            with nnx.axis_rules({"many": "data"}):
                by_rule = make(partition_name="many")
    for module in (by_axis, by_spmd, by_rule, stack.layers):
        assert spec(module.kernel) == ("data", None, "model")
    assert entries(both) == (("data", "rest"), None, "model")
    assert entries(joined.layers) == ("data", None, "model")
    np.testing.assert_array_equal(joined.layers.kernel[1], layers[1].kernel)
    assert entries(stack[:1].layers) == ("data", None, "model")
    assert entries(stack[1]) == (None, "model")


def test_a_sharding_of_another_rank_cannot_follow():
    def ref(**facts):
        return nnx.Ref(jnp.ones((4, 8)), "params", **facts)

    read = lambda m: jax.tree.leaves(m)[0].sum()  # noqa: E731

    class Wrong(nnx.Module):
        def __init__(self):
            self.w = ref(sharding=("data",))

    wrong = Wrong()
    said = r"Ref 'w' has the shape \(4, 8\), but its sharding \('data',\) has 1 entry, so it cannot"
    for f in (nnx.vmap, lambda f: lambda m: nnx.scan(lambda c, m: (c, f(m)), 0, m)):
        with fails(rf"nnx\.\w+\(.*\): {said}"):
            f(lambda m: read(m))(wrong)
    with fails(r"P\('a', 'b', 'c'\) has 3 entries, so it cannot follow when an axis is added"):
        nnx.vmap(read)(ref(sharding=P("a", "b", "c")))
    with fails(r"nnx.vmap\(.*\): a new Ref has the shape \(4, 8\), but its sharding \(None,\)"):
        nnx.vmap(lambda x: nnx.Ref(x, sharding=()), axis_size=4)(jnp.ones((4, 8)))
    layer = nnx.Linear.init(0)(2, 2)
    layer.kernel = nnx.Ref(layer.kernel, "params", sharding=("data",))
    with fails(r"Stack.of: Ref 'kernel' has the shape \(2, 2\)"):
        nnx.Stack.of([layer])
    # Values that are not mapped do not matter.
    assert nnx.vmap(lambda m, x: read(m) * x, in_axes=(None, 0))(wrong, jnp.ones(3)).shape == (3,)


def test_a_partition_name_is_a_name():
    for call in (
        lambda: nnx.vmap(linear, partition_name=3),
        lambda: nnx.Stack.init(0)(linear, 2, partition_name=("a", 3)),
        lambda: nnx.Stack.of([nnx.Linear.init(0)(2, 2)], partition_name=3),
    ):
        with fails(
            r"got the partition name .*3\)?\. It must be the name of an axis, a tuple", TypeError
        ):
            call()


# Specs with unknown names, and filters that select nothing.


def test_unknown_names_in_specs_are_errors_and_metadata_serves_every_mesh():
    net = nnx.Linear.init(0)(8, 16, kernel_metadata=META)
    kernel = nnx.PathContains("kernel")
    said = r"Ref 'kernel' got a spec with 'dta', which is not an axis of the mesh and has no rule; "
    with fails(said + "there are 'data', 'model'. Name one of these, or add a rule"):
        nnx.shard(net, {kernel: P("dta")}, mesh=AUTO)
    with fails(said + "there are 'data', 'model', 'embed'"):
        nnx.shardings(
            net, lambda path, ref: P(None, ("data", "dta")), axes={"embed": None}, mesh=AUTO
        )
    found = nnx.shardings(
        net, {kernel: P("embed", "dta")}, axes={"embed": "x", "dta": "data"}, mesh=AUTO
    )
    assert found["kernel"].spec == P(None, "data")  # a rule may name an axis that the mesh lacks
    assert nnx.shardings(net, mesh=AUTO)["kernel"].spec == P()


@pytest.mark.parametrize(
    "filter",
    [
        nnx.PathMatches("**.krnel"),
        nnx.PathContains("krnel"),
        nnx.Any(nnx.PathContains("krnel"), nnx.PathContains("krn")),
        nnx.All("params", nnx.PathContains("krnel")),
        (nnx.PathContains("krnel"), "lora"),
    ],
    ids=str,
)
def test_a_filter_by_path_that_selects_nothing_is_an_error(filter):
    net = nnx.Linear.init(0)(8, 16)
    before = net.kernel
    with fails(
        r"krnel.* of specs selects nothing; the paths are 'kernel', 'bias'", nnx.FilterError
    ):
        nnx.shard(net, {filter: P("data"), ...: P()}, mesh=AUTO)
    assert net.kernel is before
    # A collection that a model lacks is not an error, nor is a filter that excludes everything.
    rest = nnx.All("params", nnx.Not(nnx.PathContains("*")))
    assert (
        nnx.shardings(net, {"batch_stats": P("data"), rest: P("data")}, mesh=AUTO)["bias"].spec
        == P()
    )


@pytest.mark.parametrize("said", [(("data", "data"), None), P(("a", "b")), (("a", "data"), None)])
def test_a_mesh_axis_twice_in_one_dimension(said):
    tree = {"w": nnx.Ref(jnp.ones((16, 8)), sharding=said)}
    with fails("Ref 'w' would be divided twice along the mesh axis 'data': for .* and for "):
        nnx.shard(tree, axes={"a": "data", "b": "data"}, mesh=AUTO)


# Specs in other forms.


def test_a_partition_of_shardings_says_where_by_path():
    def make(seed):
        net = nnx.Linear.init(seed)(8, 16)
        return {"net": net, "optimizer": nnx.Optimizer(net, optax.adam(1e-2)), "n": nnx.Ref(3)}

    rules = {nnx.PathContains("kernel"): nnx.fsdp("model", 1), "params": P("data")}
    where = nnx.shardings(make(0), rules, mesh=AUTO)
    assert where["net.kernel"].spec == P(None, "model") and where["net.bias"].spec == P("data")
    run, values = make(1), make(1)
    nnx.shard(run, where, mesh=AUTO)
    for path, x in nnx.get_partition(run).items():
        if path != ("n",):
            assert x.sharding.is_equivalent_to(where[path], x.ndim)
            np.testing.assert_array_equal(x, nnx.get_partition(values)[path])
    moments = run["optimizer"].opt_state[0].mu
    assert {path[0]: spec(x) for path, x in moments.items()} == {
        "kernel": (None, "model"),
        "bias": (None,),
    }
    with fails(
        r"The Partition of shardings has none for 'bias'; it has 'kernel'. Make it from a tree"
    ):
        nnx.shard(run["net"], nnx.Partition({"kernel": where["net.kernel"]}), mesh=AUTO)


def test_a_named_sharding_and_a_tree_of_them():
    tree = nnx.Ref({"a": jnp.ones((8, 4)), "b": 2.0, "c": jnp.ones(8)}, "params")
    rows = NamedSharding(AUTO, P("data"))
    given = {"a": rows, "b": None, "c": P("model")}
    nnx.shard(tree, lambda path, ref: given, mesh=AUTO)
    assert spec(tree.value["a"]) == ("data", None) and spec(tree.value["c"]) == ("model",)
    assert tree.value["b"] == 2.0
    again = nnx.shardings(tree, nnx.shardings(tree, lambda path, ref: given, mesh=AUTO), mesh=AUTO)
    assert jax.tree.map(lambda s: s.spec, again[()]) == {"a": P("data"), "b": None, "c": P("model")}
    with fails(
        r"A Ref got \{'a': P\('data',\)\}, which is neither a sharding nor a tree of shardings"
    ):
        nnx.shard(tree, lambda path, ref: {"a": P("data")}, mesh=AUTO)
    with fails(r"Ref 'w' has shape \(3,\), and its dimension of size 3 cannot be divided into 2"):
        nnx.shard({"w": nnx.Ref(jnp.ones(3))}, {...: rows}, mesh=AUTO)


# Placement inside a body.


@KINDS
def test_what_a_step_places_stays_there(mesh):
    @nnx.jit
    def step(net):
        net.kernel = net.kernel + 1
        nnx.shard(nnx.get_ref(net, "kernel"), {...: P(None, "model")}, mesh=mesh)
        net.bias = net.bias + 1  # this one goes back to its place

    net = nnx.shard(nnx.Linear.init(0)(8, 16), {"params": P("data")}, mesh=mesh)
    kernel = np.asarray(net.kernel)
    with jax.set_mesh(mesh):
        for i in (1, 2):
            step(net)
            assert spec(net.kernel) == (None, "model") and spec(net.bias) == ("data",)
            np.testing.assert_allclose(net.kernel, kernel + i, rtol=1e-6)


@KINDS
@pytest.mark.parametrize("inner", [False, True])
def test_what_is_made_and_placed_in_a_body_stays_though_its_metadata_says_otherwise(mesh, inner):
    def make():
        net = nnx.Linear.init(0)(8, 16, kernel_metadata={"sharding": ("data", None)})
        return nnx.shard(net, {nnx.PathContains("kernel"): P(None, "model")}, mesh=mesh)

    compiled = nnx.jit(make)
    with jax.set_mesh(mesh):
        net = nnx.jit(lambda: compiled())() if inner else compiled()
        left = nnx.jit(
            lambda: nnx.Linear.init(0)(8, 16, kernel_metadata={"sharding": ("data", None)})
        )()
    assert spec(net.kernel) == (None, "model") and spec(left.kernel) == ("data", None)
    np.testing.assert_array_equal(net.kernel, left.kernel)


# Rules for the arguments and results of a compiled function.


def model_of_8():
    return nnx.Linear.init(0)(8, 16)


@KINDS
@pytest.mark.parametrize(
    ("rules", "kernel", "bias"),
    [
        (nnx.fsdp("model", 32), (None, "model"), (None,)),
        (
            {nnx.PathContains("bias"): P("data"), ...: nnx.fsdp("data", 1)},
            (None, "data"),
            ("data",),
        ),
        ({nnx.PathContains("kernel"): ("rows", None), ...: None}, ("data", None), None),
        (lambda path, ref: P("model") if path == ("bias",) else P(), (None, None), ("model",)),
    ],
    ids=["fsdp", "dict", "names", "function"],
)
def test_out_shardings_are_rules_for_a_module_that_is_returned(mesh, rules, kernel, bias):
    with jax.set_mesh(mesh), nnx.axis_rules({"rows": "data"}):
        net = nnx.jit(model_of_8, out_shardings=rules)()
        count, pair = nnx.jit(
            lambda: (1.0, {"a": model_of_8()}), out_shardings=(None, {"a": rules})
        )()
    for found in (net, pair["a"]):
        assert spec(found.kernel) == kernel
        assert bias is None or spec(found.bias) == bias
        np.testing.assert_allclose(found.kernel, model_of_8().kernel, atol=1e-6)
    assert count == 1.0


def test_out_shardings_win_over_the_metadata_and_say_where_arrays_in_a_module_go():
    class Table(nnx.Module):
        def __init__(self):
            self.plain = jnp.arange(8.0)
            self.net = nnx.Linear(8, 16, kernel_metadata={"sharding": ("data", None)})
            self.tree = nnx.Ref({"a": jnp.ones((8, 4)), "b": jnp.ones(16)}, "cache")

    rules = {"params": nnx.fsdp("model", 1), "cache": P("data"), ...: P("model")}
    with jax.set_mesh(AUTO):
        table = nnx.jit(Table.init(0), out_shardings=rules)()
        again = nnx.jit(lambda t: (t, nnx.clone(t)), out_shardings={...: P()})(table)
    assert spec(table.net.kernel) == (None, "model") and spec(table.plain) == ("model",)
    assert {spec(x)[0] for x in jax.tree.leaves(table.tree.value)} == {"data"}
    # A module that came in stays where it is; the new one goes where it was said.
    assert again[0] is table and spec(table.net.kernel) == (None, "model")
    assert spec(again[1].net.kernel) == (None, None)


def test_bad_out_shardings_are_errors():
    def call(rules):
        return nnx.jit(model_of_8, out_shardings=rules)()

    with jax.set_mesh(AUTO):
        with fails(r"nnx.jit\(model_of_8\): the output 'kernel' got a spec with 'dta'"):
            call({nnx.PathContains("kernel"): P("dta"), ...: P()})
        with fails("the output 'bias' has shape .*has 2 entries"):
            call({...: P("data", "model")})
        with fails("selects 'bias' .* of the output. Add an entry for the rest", nnx.AxisError):
            call({nnx.PathContains("kernel"): P("data")})
        with fails(r"got \('data', 'model'\) for the output, but that has another structure: it holds "
                   r"'kernel'. For a module or a Ref, write \{\.\.\.: ", nnx.AxisError):  # fmt: skip
            call(("data", "model"))
    with fails(r"the output 'kernel' has the sharding \('data', None\), which needs a mesh"):
        call({nnx.PathContains("kernel"): ("data", None), ...: None})


@KINDS
@pytest.mark.parametrize("form", ["fsdp", "dict", "function", "partition", "module"])
@pytest.mark.parametrize("donate", [None, "params"])
def test_in_shardings_are_rules_for_a_module_that_is_passed(mesh, form, donate):
    rules = {
        "fsdp": nnx.fsdp("data", 1),
        "dict": {nnx.PathContains("kernel"): (None, "data"), ...: nnx.fsdp("data", 1)},
        "function": lambda path, ref: P(*[None] * (ref.value.ndim - 1), "data"),
        "partition": nnx.shardings(model_of_8(), nnx.fsdp("data", 1), mesh=mesh),
        "module": jax.tree.map(
            lambda x: NamedSharding(mesh, P(*[None] * (x.ndim - 1), "data")), model_of_8()
        ),
    }[form]

    @nnx.jit(in_shardings=(rules, None), donate=donate)
    def step(net, x):
        net.kernel = net.kernel * x
        return net.bias.sum()

    net = model_of_8()  # on one device that nobody chose, so it moves
    with jax.set_mesh(mesh):
        step(net, 2.0)
        assert spec(net.kernel) == (None, "data")
        step(net, 2.0)
    assert spec(net.kernel) == (None, "data")
    np.testing.assert_allclose(net.kernel, 4 * model_of_8().kernel, rtol=1e-6)


def test_bad_in_shardings_are_errors():
    f = lambda rules: nnx.jit(lambda net: net.bias.sum(), in_shardings=(rules,))(model_of_8())  # noqa: E731
    with jax.set_mesh(AUTO):
        with fails(r"nnx.jit\(.*\): the input 'kernel' got a spec with 'dta'"):
            f({...: P("dta")})
        with fails("the input 'bias' has shape .*has 2 entries"):
            f({...: P("data", "model")})
    with fails(r"the input 'kernel' has the sharding \('data', None\), which needs a mesh"):
        f({nnx.PathContains("kernel"): ("data", None), ...: None})


# Values with a place that nobody chose.


@pytest.mark.parametrize(
    "count", [jnp.array(0), 0, np.zeros((), np.int32)], ids=["jax", "int", "numpy"]
)
@pytest.mark.parametrize("donate", [None, True])
def test_a_counter_without_a_place_compiles_a_step_once(count, donate):
    traced = []

    @nnx.jit(donate=donate)
    def step(tree):
        traced.append(1)
        tree["w"].value = tree["w"].value + 1
        tree["n"].value = tree["n"].value + 1
        return tree["read"].value.sum()

    tree = {
        "w": nnx.Ref(jax.device_put(jnp.zeros(8), NamedSharding(AUTO, P("data"))), "params"),
        "n": nnx.Ref(count, "counters"),
        "read": nnx.Ref(jnp.ones(3), "cache"),
    }
    read = tree["read"].value
    for i in range(3):
        assert step(tree) == 3
        assert tree["n"].value == i + 1 and spec(tree["w"].value) == ("data",)
        before = len(traced) if i == 0 else before
    assert len(traced) == before and step.explain(tree).compiled
    assert tree["n"].value.sharding.is_fully_replicated
    assert tree["n"].value.sharding.device_set == set(jax.devices())
    assert tree["read"].value is read  # what is only read is not moved


def test_what_in_shardings_say_of_a_value_without_a_place_counts():
    @nnx.jit(in_shardings=({"params": P("data"), "cache": P("model"), ...: None},))
    def step(tree):
        for ref in tree.values():
            ref.value = ref.value + 1

    def ref(x, collection):
        return nnx.Ref(x, collection)

    placed = jax.device_put(jnp.zeros(8), NamedSharding(AUTO, P("data")))
    tree = {
        "w": ref(placed, "params"),
        "c": ref(jnp.zeros(8), "cache"),
        "n": ref(jnp.zeros(8), "n"),
    }
    with jax.set_mesh(AUTO):
        step(tree)
        step(tree)
    assert [spec(r.value) for r in tree.values()] == [("data",), ("model",), (None,)]
    assert all((r.value == 2).all() for r in tree.values())


# Rules, meshes and programs that are traced.


@KINDS
def test_plain_jit_has_a_program_for_each_set_of_rules(mesh):
    traced = []

    @jax.jit
    def f(x):
        traced.append(1)
        return nnx.constrain(jnp.sin(x), "batch", None)

    x = jnp.ones((8, 8))
    with jax.set_mesh(mesh):
        for axis in ("data", "model", "data"):
            with nnx.axis_rules({"batch": axis}):
                assert spec(f(x)) == (axis, None)
        assert spec(f(x)) == (None, None)
    assert len(traced) == 3


def test_inside_shard_map_the_axes_that_it_maps_over_are_not_there():
    mesh = AUTO

    @nnx.jit
    @nnx.shard_map(mesh=mesh, in_specs=(P("data"),), out_specs=P("data"), axis_names={"data"})
    def f(x):
        assert x.shape == (4, 8)
        made = nnx.Ref(x, sharding=("data", "model"))  # 4 rows are not divided again
        return nnx.constrain(made.value, "data", "model")

    @nnx.jit
    @nnx.shard_map(mesh=mesh, in_specs=(P("data", "model"),), out_specs=P("data", "model"))
    def g(x):
        assert x.shape == (4, 2)
        return nnx.constrain(x, "data", "model") + nnx.constrain(x, "nothing", None)

    x = jnp.arange(64.0).reshape(8, 8)
    with jax.set_mesh(mesh):
        np.testing.assert_array_equal(f(x), x)
        np.testing.assert_array_equal(g(x), 2 * x)


def test_a_constant_of_a_program_is_placed():
    with jax.set_mesh(AUTO):
        f = nnx.jit(lambda: nnx.Ref(np.ones((8, 4), np.float32), sharding=("data", None)))
        assert spec(f().value) == ("data", None)


def test_an_abstract_mesh_places_shapes():
    shapes = nnx.eval_shape(lambda: stack_of(2, partition_name="data"))
    abstract = AbstractMesh((2, 4), ("data", "model"))
    nnx.shard(shapes, axes={"mlp": "model"}, mesh=abstract)
    assert shapes.layers.kernel.sharding.spec == P("data", None, "model")
    assert shapes.layers.kernel.shape == (2, 8, 16)
