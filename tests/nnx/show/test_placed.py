"""Specs and bytes per device in printed models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import nnx


def test_a_model_that_is_divided_prints_its_specs_and_the_bytes_of_a_device():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    with nnx.scope(0):
        model = nnx.Sequential(nnx.Linear(16, 8), nnx.Linear(8, 16))
    assert "on each device" not in repr(model)
    nnx.shard(model, {nnx.PathContains("kernel"): P("data")}, mesh=mesh)
    text = repr(model)
    assert "kernel = float32[16,8] P('data',)" in text or "kernel = float32[16,8] P('data')" in text
    assert "bias = float32[8]  # params" in text
    held = sum(x.addressable_shards[0].data.nbytes for x in model["params"].values())
    assert held == 2 * 128 * 4 // 8 + 24 * 4
    assert f"on each device: {held} B" in text
    table = nnx.tabulate(model, jnp.ones((4, 16)), console_width=120)
    assert table.device_bytes == held and [row.device_bytes for row in table.rows[1:]] == [96, 128]
    assert f"{held} B" in str(table).splitlines()[-2] and "on each device" in str(table)


class Decoder(nnx.Module):
    def __init__(self):
        self.attention = nnx.MultiHeadAttention(
            64, 8192, num_kv_heads=8, use_bias=False, param_dtype=jnp.bfloat16
        )
        options = {"use_bias": False, "param_dtype": jnp.bfloat16}
        self.gate, self.up = nnx.Linear(8192, 28672, **options), nnx.Linear(8192, 28672, **options)
        self.down = nnx.Linear(28672, 8192, **options)
        self.norm1 = nnx.RMSNorm(8192, param_dtype=jnp.bfloat16)
        self.norm2 = nnx.RMSNorm(8192, param_dtype=jnp.bfloat16)

    def __call__(self, x):
        x += self.attention(self.norm1(x), is_causal=True)
        h = self.norm2(x)
        return x + self.down(nnx.silu(self.gate(h)) * self.up(h))


class Model(nnx.Module):
    def __init__(self):
        self.embed = nnx.Embed(128256, 8192, param_dtype=jnp.bfloat16)
        self.layers = nnx.Stack(Decoder, 80)
        self.norm = nnx.RMSNorm(8192, param_dtype=jnp.bfloat16)
        self.head = nnx.Linear(8192, 128256, use_bias=False, param_dtype=jnp.bfloat16)

    def __call__(self, ids):
        return self.head(self.norm(self.layers(self.embed(ids))))


def test_seventy_billion_parameters_are_planned_on_a_mesh_that_is_not_there():
    mesh = AbstractMesh((8, 8), ("data", "model"))
    model = nnx.eval_shape(lambda: Model.init(0)())

    def specs(path, ref):
        # The layers are along the first axis of a stack.
        lead = (None,) if "layers" in path else ()
        if ref.value.ndim - len(lead) < 2:
            return None
        row = path[-2] in ("down", "out", "embed")
        return P(*lead, *(("model", "data") if row else ("data", "model")))

    table = nnx.tabulate(model, jax.ShapeDtypeStruct((8, 128), "int32"), mesh=mesh, specs=specs)
    count, size = table.sizes["params"]
    assert count == 70_553_706_496 and size == 2 * count
    whole = 2 * (80 * 2 + 1) * 8192
    assert table.device_bytes == (size - whole) // 64 + whole
    expected = sum(
        np.prod(s.shard_shape(value.shape)) * 2
        for value, s in zip(
            model["params"].values(), nnx.shardings(model, specs, mesh=mesh).values(), strict=True
        )
    )
    assert table.device_bytes == expected
    assert all(isinstance(ref.value, jax.ShapeDtypeStruct) for ref in nnx.refs(model).values())


def test_a_spec_that_does_not_fit_is_an_error():
    model = nnx.eval_shape(lambda: nnx.Linear.init(0)(6, 4))
    with pytest.raises(nnx.ShardingError, match="kernel"):
        nnx.tabulate(model, mesh=AbstractMesh((4,), ("data",)), specs={"params": P("data")})
    placed = nnx.shard(model, {...: P()}, mesh=AbstractMesh((4,), ("data",)))
    assert isinstance(placed.kernel.sharding, NamedSharding)
    assert "on each device" not in str(nnx.tabulate(placed))
