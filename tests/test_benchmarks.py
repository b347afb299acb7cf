"""The contenders of the benchmarks compute the same numbers."""

import jax
import pytest

from benchmarks import report, sharded


@pytest.mark.parametrize("kind", sharded.KINDS)
def test_steps_of_sharded_arrays_have_the_same_numbers_in_the_same_places(kind):
    start = sharded.contenders(kind, 2)["jax.jit"][1]()
    assert start.addressable_shards[0].data.shape == (1, 4)
    entries = sharded.contenders(kind, 2)
    jax.block_until_ready(entries["nnx.jit"][0](1))
    moved = entries["nnx.jit"][1]()
    assert abs(moved - start).max() > 1e-5  # or there is nothing to compare
    ratios = sharded.compare(kind, 4, rounds=1)  # it checks the numbers
    assert set(ratios) == {"jax.jit", "nnx.jit", "flax cached_partial"}
    assert "| nnx.jit | " in report.by_size(kind, {4: ratios})
