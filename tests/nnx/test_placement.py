"""Specs: names and filters that mean nothing, other forms of specs, rules where programs are traced."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import nnx


def mesh_of(kind):
    return jax.make_mesh((2, 4), ("data", "model"), axis_types=(kind,) * 2)


AUTO, EXPLICIT = mesh_of(AxisType.Auto), mesh_of(AxisType.Explicit)
KINDS = pytest.mark.parametrize("mesh", [AUTO, EXPLICIT], ids=["auto", "explicit"])


def spec(x):
    return tuple(x.sharding.spec) + (None,) * (x.ndim - len(x.sharding.spec))


def fails(match, error=nnx.ShardingError):
    return pytest.raises(error, match=match)


META = {"sharding": ("embed", "mlp")}


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
    # A collection that a model lacks is none, nor is a filter that excludes all there is.
    rest = nnx.All("params", nnx.Not(nnx.PathContains("*")))
    assert (
        nnx.shardings(net, {"batch_stats": P("data"), rest: P("data")}, mesh=AUTO)["bias"].spec
        == P()
    )


@pytest.mark.parametrize("said", [(("data", "data"), None), P(("a", "b")), (("a", "data"), None)])
def test_a_mesh_axis_twice_in_one_dimension(said):
    tree = {"w": nnx.Ref(jnp.ones((16, 8)), sharding=said)}
    with fails("Ref 'w' would be divided twice along the mesh axis 'data', for .* and for "):
        nnx.shard(tree, axes={"a": "data", "b": "data"}, mesh=AUTO)


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
        r"The Partition of shardings has none for 'bias'; it has 'kernel'. Make it of a tree"
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
        r"A Ref got the sharding \{'a': P\('data',\)\}, which is not one, nor a tree of them"
    ):
        nnx.shard(tree, lambda path, ref: {"a": P("data")}, mesh=AUTO)
    with fails(
        r"Ref 'w' has the shape \(3,\), and its dimension of size 3 cannot be divided into 2"
    ):
        nnx.shard({"w": nnx.Ref(jnp.ones(3))}, {...: rows}, mesh=AUTO)


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
