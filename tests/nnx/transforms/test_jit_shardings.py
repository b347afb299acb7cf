"""Shardings of `nnx.jit` as PartitionSpecs, for the mesh of `jax.set_mesh`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import nnx


class Wide(nnx.Module):
    def __init__(self):
        self.w = nnx.Ref(jnp.ones((8, 4)), "params")
        self.n = nnx.Ref(jnp.array(0), "counters")
        self.table = jnp.ones(4)


def step(m, x):
    m.w.value = m.w.value + x.sum() * m.table
    m.n.value += 1
    return m.w.value * 2


def mesh_of(count, kind):
    return jax.make_mesh((count,), ("x",), axis_types=(kind,), devices=jax.devices()[:count])


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("donate", [None, True])
def test_arrays_that_are_committed_and_those_that_are_not(kind, donate):
    sharded = nnx.jit(
        step,
        in_shardings=({"params": P("x"), ...: P()}, P("x")),
        out_shardings=P("x"),
        donate=donate,
    )
    for count in (4, 2):
        mesh = mesh_of(count, kind)
        rows, whole = NamedSharding(mesh, P("x")), NamedSharding(mesh, P())
        fresh, ones, model = Wide(), jnp.ones(4), Wide()
        with jax.set_mesh(mesh):
            placed = {"w": jax.device_put(model.w.value, rows), "n": jax.device_put(0, whole)}
            nnx.update(model, placed, strict=False)
            model.table = jax.device_put(model.table, whole)
            x = jax.device_put(ones, rows)
            for i in (1, 2):
                out = sharded(model, x)
                assert out.sharding.is_equivalent_to(rows, 2)
                assert model.w.value.sharding.is_equivalent_to(rows, 2)
                assert len(model.w.value.sharding.device_set) == count
                np.testing.assert_array_equal(out, np.full((8, 4), 2.0 + 8 * i))
            np.testing.assert_array_equal(sharded(fresh, ones), np.full((8, 4), 10.0))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_what_jax_refuses_is_refused(kind):
    mesh = mesh_of(4, kind)
    f = nnx.jit(lambda m, x: x.sum(), in_shardings=(None, P("x")))
    with jax.set_mesh(mesh):
        whole = jax.device_put(jnp.ones(4), NamedSharding(mesh, P()))
        with pytest.raises(ValueError, match="does not match the sharding"):
            f(Wide(), whole)
    with pytest.raises(RuntimeError, match="jax.set_mesh"):
        f(Wide(), jnp.ones(4))
