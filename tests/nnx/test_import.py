"""`import nnx` computes nothing, so JAX can still be configured afterwards."""

import subprocess
import sys
import textwrap


def test_import_starts_no_backend():
    program = """
        import importlib
        import pkgutil

        import jax
        import refx
        import nnx

        for package in (refx, nnx):
            for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
                importlib.import_module(module.name)

        # JAX refuses this once a backend has started, and so does jax.distributed.initialize.
        jax.config.update("jax_num_cpu_devices", 4)
        jax.config.update("jax_platforms", "cpu")
        print(len(jax.devices()))
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["4"]


def run(program):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_names_are_loaded_when_they_are_used(tmp_path):
    said = run("""
        import sys, nnx
        assert "nnx.layers" not in sys.modules and "nnx.serialize" not in sys.modules
        from nnx import *
        assert Linear is nnx.Linear and jit is nnx.jit and set(nnx.__all__) <= set(dir(nnx))
        assert all(hasattr(nnx, name) for name in nnx.__all__)
        assert nnx.training.mask and nnx.bridge.from_flax and nnx.transforms.jit is nnx.jit
        assert not hasattr(nnx, "Parameter") and callable(nnx.purify)
        print(len(nnx.__all__) > 150)
    """)
    assert said == ["True"]


def test_a_program_that_only_loads_knows_every_class_of_ours(tmp_path):
    path = str(tmp_path / "model.npz")
    run(f"""
        import nnx, optax
        model = nnx.Sequential(nnx.Linear.init(0)(2, 3), nnx.relu)
        nnx.save({path!r}, (model, nnx.EMA(model, 0.9), nnx.metrics.Average()))
    """)
    said = run(f"""
        import nnx
        model, ema, average = nnx.load({path!r})
        print(type(model).__name__, type(ema).__name__, type(average).__name__)
    """)
    assert said == ["Sequential", "EMA", "Average"]
