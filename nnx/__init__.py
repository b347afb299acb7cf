"""nnx: modules for JAX that read like PyTorch and train in plain JAX, on refx.

A module holds its values in Refs. The nnx transformations (`nnx.jit`, `nnx.grad`, ...) split it into
pure values for JAX and write the updates back, so a training step returns nothing. To plain
`jax.*` a module is a pytree of its values.
"""

import importlib
from typing import TYPE_CHECKING

import refx
from nnx._hints import no_name as _no_name
from nnx.fields import dataclass, param, ref, static
from nnx.module import Module
from nnx.purify import purify
from nnx.rng import RngStream
from nnx.scope import MissingFlagError, MissingStreamError, get_flag, make_rng, scope
from nnx.sharding import ShardingError, axis_rules, constrain, fsdp, shard, shardings
from refx import *  # noqa: F403

__version__ = "0.1.0"

__all__ = [
    "MissingFlagError",
    "MissingStreamError",
    "Module",
    "RngStream",
    "ShardingError",
    "axis_rules",
    "bridge",
    "constrain",
    "dataclass",
    "debug",
    "display",
    "fsdp",
    "get_flag",
    "graph",
    "make_rng",
    "param",
    "purify",
    "ref",
    "scope",
    "shard",
    "shardings",
    "static",
    "tabulate",
]

if TYPE_CHECKING:
    # What follows is loaded when it is first used, so that an import of nnx is quick.
    from nnx import bridge, debug, layers, probe, serialize, surgery, training, transforms
    from nnx.layers import *  # noqa: F403
    from nnx.probe import *  # noqa: F403
    from nnx.serialize import *  # noqa: F403
    from nnx.show.graph import graph
    from nnx.show.html import display
    from nnx.show.tabulate import tabulate
    from nnx.surgery import *  # noqa: F403
    from nnx.training import *  # noqa: F403
    from nnx.transforms import *  # noqa: F403

    __all__ += layers.__all__
    __all__ += transforms.__all__
    __all__ += serialize.__all__
    __all__ += training.__all__
    __all__ += surgery.__all__
    __all__ += probe.__all__
    __all__ += refx.__all__
else:
    _OWN = __all__
    # It would take everything to know them all: `from nnx import *` asks the function below.
    del __all__
    _PACKAGES = ("transforms", "layers", "training", "serialize", "surgery", "probe")
    _SHOWN = {"graph": "graph", "display": "html", "tabulate": "tabulate"}

    def __getattr__(name):
        if name == "__all__":
            packages = [importlib.import_module(f"nnx.{package}") for package in _PACKAGES]
            found = [*_OWN, *(x for package in packages for x in package.__all__), *refx.__all__]
        elif name.startswith("__"):
            raise AttributeError(f"module 'nnx' has no attribute {name!r}", name=name)
        elif name in (*_PACKAGES, "bridge", "debug"):
            found = importlib.import_module(f"nnx.{name}")
        elif name in _SHOWN:
            found = getattr(importlib.import_module(f"nnx.show.{_SHOWN[name]}"), name)
        else:
            for package in _PACKAGES:
                module = importlib.import_module(f"nnx.{package}")
                if name in module.__all__:
                    found = getattr(module, name)
                    break
            else:
                raise _no_name(name)
        # The next time Python finds it without this function.
        globals()[name] = found
        return found

    def __dir__():
        return sorted({*globals(), *__getattr__("__all__")})
