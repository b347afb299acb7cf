"""Help for classes of modules: clear errors for habits from other libraries, and `__check_init__`."""

from __future__ import annotations

import difflib
import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from refx import Node
from refx.node import set_on_class

__all__: list[str] = []

_HINTS = {
    "parameters named_parameters": "the values are model['params'], a Partition by path",
    "buffers variables": "the values are model[...], or those of a collection, model['batch_stats']",
    "state_dict": (
        "nnx.save(path, model) writes a file, model[...] gives the values by path, and "
        "nnx.bridge.to_state_dict(model) a state dict for PyTorch"
    ),
    "load_state_dict": (
        "nnx.load_state(path, model) reads a file, nnx.update(model, partition) writes values by path"
    ),
    "named_modules children named_children iter_modules": "nnx.modules(model) gives them by path",
    "zero_grad backward": "gradients are a value: grads = nnx.grad(loss)(model)",
    "requires_grad_ freeze": "say what is trained by a filter: nnx.grad(loss, wrt='params')",
    "to cuda cpu": "jax.device_put(model[...], device), then nnx.update; arrays know where they are",
    "half bfloat16 float double": "layers take dtype= and param_dtype=",
    "register_forward_hook": "nnx.capture(model, where)(x) gives outputs, nnx.patch changes them",
    "register_buffer": "declare a field in the class, mean: jax.Array = nnx.ref('batch_stats')",
    "register_parameter add_module": "assign it: self.name = ...",
    "sow perturb": "nnx.capture(model, where)(x) gives outputs, nnx.output_grad their gradients",
    "variable param": "declare a field in the class: w: jax.Array = nnx.param()",
    "tabulate": "nnx.tabulate(model, x)",
    "forward": "call the module itself, model(x)",
    "split": "nnx.split(model, ...)",
    "state": "the values are model[...], a Partition by path",
}
HINTS = {name: hint for names, hint in _HINTS.items() for name in names.split()}


def no_attribute(module: Node, name: str) -> AttributeError:
    """The error for an attribute that a module does not have."""
    text = f"{type(module).__name__!r} object has no attribute {name!r}"
    if name in HINTS:
        text = f"{text}: {HINTS[name]}."
    # Given the object, Python suggests a similar name.
    return AttributeError(text, name=name, obj=module)


def check_arguments(cls: type, kwargs: dict[str, Any]) -> None:
    """Refuse constructor arguments that other libraries take, and strings that do not name a dtype.

    Raises:
      TypeError: the class does not take the given `rngs`; a layer was given a string that does not
        name a dtype.
    """
    if "rngs" in kwargs:
        parameters = inspect.signature(cls.__init__).parameters.values()
        if not any(p.name == "rngs" or p.kind is p.VAR_KEYWORD for p in parameters):
            raise TypeError(
                f"{cls.__name__} does not take rngs: its keys come from the scope around it. Make "
                "the model with Net.init(jax.random.key(0))(...), or in "
                "`with nnx.scope(jax.random.key(0)):`."
            )
    if not any(base.__module__.startswith("nnx.layers.") for base in cls.__mro__):
        return
    for name in ("dtype", "param_dtype"):
        if isinstance(given := kwargs.get(name), str):
            try:
                jnp.dtype(given)
            except TypeError:
                close = difflib.get_close_matches(given, _DTYPES, 1, 0.5)
                meant = f" Did you mean {close[0]!r}?" if close else ""
                raise TypeError(
                    f"{cls.__name__} got {name}={given!r}, which is not a dtype of JAX.{meant}"
                ) from None


_DTYPES = ("bfloat16", "float16", "float32", "float64", "int8", "int32", "complex64")
CHECKED = frozenset({"rngs", "dtype", "param_dtype"})
"""The arguments that `check_arguments` checks."""


def explain_data(cls: type, args: Any, kwargs: Any, error: TypeError) -> None:
    """Explain a failed constructor call, if it failed because it was given data."""
    arrays = (jax.Array, np.ndarray)
    given = next((x for x in (*args, *kwargs.values()) if isinstance(x, arrays)), None)
    if given is None or jnp.issubdtype(given.dtype, jax.dtypes.prng_key):
        return
    try:
        inspect.signature(cls.__init__).bind(None, *args, **kwargs)
    except TypeError:
        name = cls.__name__
        raise TypeError(
            f"{error}. {name}.init(key)(...) makes a {name}, with the arguments of its constructor, but "
            f"it was given data, {given.dtype}{list(given.shape)}. That comes with the call: "
            f"model = {name}.init(key)(...), then model(x)."
        ) from None


def forward_instead(cls: type) -> Any:
    """A `__call__` for a class that only has a method `forward`."""

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(
            f"A {type(self).__name__} cannot be called: it has a method named forward, but no "
            "__call__. Rename it: def __call__(self, ...)."
        )

    return __call__


def check_after_init(cls: type) -> None:
    """Make a class call the `__check_init__` of each of its classes after `__init__`, base classes first.

    The hook comes from Equinox. It runs by itself, so a subclass cannot forget to call it.
    """
    checks = [vars(b)["__check_init__"] for b in cls.__mro__[::-1] if "__check_init__" in vars(b)]
    if not checks:
        return
    init = _unchecked(cls.__init__)

    @functools.wraps(init)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        if type(self) is cls:
            for check in checks:
                check(self)

    vars(__init__)["_unchecked"] = init
    set_on_class(cls, "__init__", __init__)


def own_init(cls: type) -> None:
    """Undo `check_after_init`: the class gets back the `__init__` that its user wrote, if any."""
    init = vars(cls).get("__init__")
    own = _unchecked(init)
    if own is init:
        return
    if any(_unchecked(vars(base).get("__init__")) is own for base in cls.__mro__[1:]):
        type.__delattr__(cls, "__init__")
    else:
        set_on_class(cls, "__init__", own)


def _unchecked(init: Any) -> Any:
    return getattr(init, "_unchecked", init)
