"""An import of nnx computes nothing: JAX can still be configured after it."""

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
