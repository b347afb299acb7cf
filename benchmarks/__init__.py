"""Benchmarks: nnx, hand-written JAX, Equinox and flax.nnx, interleaved in one process."""
