"""Module: attributes that read like PyTorch, a pytree of values to JAX."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar, cast

import jax

import nnx._exported  # noqa: F401 — knows each class of modules
import refx
from nnx import show
from nnx._ambient import ambient
from nnx._class_checks import (
    CHECKED,
    check_arguments,
    explain_data,
    forward_instead,
)
from nnx._hints import no_attribute
from nnx._layer_names import layer_call
from nnx.fields import check_after_init
from nnx.scope import (
    MissingStreamError,
    Scope,
    entered,
    expected,
    get_flag,
    make_rng,
    make_scope,
    missing_stream,
)
from refx import (
    MISSING,
    Filter,
    Node,
    Partition,
    Ref,
    RefField,
    UnknownPathError,
    ValueTypeError,
)
from refx.dag import update_cells, values_of
from refx.field import Field
from refx.node import NodeType, attributes, set_on_class
from refx.partition import dotted
from refx.selection import check_selection
from refx.static import TRUSTED
from refx.text import ADVICE, ALTERNATIVES, a_kind
from refx.walk import walk

__all__ = ["Module"]

# Compare nnx's own objects in a module's attributes by identity.
TRUSTED.add("nnx")
ALTERNATIVES.update(
    {
        "library": "nnx",
        "clone": "an nnx.clone",
        "frozen": "nnx.frozen",
        "param": "nnx.param()",
        "field": "nnx.ref({!r})",
        "holder": (
            "nnx.Partial for a functools.partial; for a method that was transformed or wrapped, "
            "decorate it in the class, or use nnx.VMap, nnx.Grad or nnx.Remat; turn your own "
            "class into an nnx.Module or a registered pytree"
        ),
        "a transformation": "an nnx transformation",
        "same name": "the nnx transformation of the same name",
        "compiles": " (nnx.jit, nnx.scan, nnx.remat, ...)",
        "looks": " (nnx.{})",
        "mask": ", or nnx.training.mask(model, {!r})",
        "would pass over it": ", nnx.grad and nnx.jit",
        "writes back": " (nnx.jit, nnx.vmap, nnx.scan, ...)",
        "in its place": (
            "the nnx transformation instead (nnx.jit, nnx.grad, nnx.vmap, ...), which writes Refs "
            "back for you"
        ),
        "not on a copy": (
            "Use nnx.jit (updates propagate to the caller), nnx.jit_filter (modules in, modules "
            "out), or change an nnx.clone of the module and return that."
        ),
    }
)
ADVICE.update(
    batch_stats="keep the statistics as they are: model.apply(use_running_average=True)(x)",
    rngs="draw with its own key: model.apply(rngs=key)(x)",
)

M = TypeVar("M", bound="Module")
T = TypeVar("T")


class _ModuleType(NodeType):
    """The class of module classes."""

    def __setattr__(cls, name: str, value: Any) -> None:
        # A class decorator that checks types does this.
        super().__setattr__(name, layer_call(value) if name == "__call__" else value)


class Module(Node, metaclass=_ModuleType):
    """The base class of models and layers.

    Set attributes in `__init__`, as in any Python class. `param()` and `ref()` fields, and
    attributes that hold an `nnx.Ref`, are values that training may change. Array attributes are
    values too. Modules are structure, and so are plain lists, tuples and dicts of them. Everything
    else is static. You may change attributes later: the next transformation sees the change.

    To JAX, a module is a pytree of its values. So `jax.tree.map`, `jax.jit` and optax take it, with
    value semantics. The nnx transformations write updates back into it.

    >>> import jax, jax.numpy as jnp, nnx
    >>> class Affine(nnx.Module):
    ...     w: jax.Array = nnx.param()
    ...     def __init__(self, n: int):
    ...         self.w = jax.random.normal(self.make_rng("params"), (n,))
    ...     def __call__(self, x):
    ...         return x * self.w
    >>> model = Affine.init(jax.random.key(0))(3)
    >>> model(jnp.ones(3)).shape
    (3,)
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        call = vars(cls).get("__call__")
        if (layered := layer_call(call)) is not call:
            set_on_class(cls, "__call__", layered)
        elif call is None and callable(vars(cls).get("forward")):
            if not any("__call__" in vars(base) for base in cls.__mro__):
                set_on_class(cls, "__call__", forward_instead(cls))
        check_after_init(cls)

    if not TYPE_CHECKING:

        def __new__(cls, *args, **kwargs):
            if kwargs and not CHECKED.isdisjoint(kwargs):
                check_arguments(cls, kwargs)
            return super().__new__(cls, *args, **kwargs)

        def __getattr__(self, name):
            # Either the attribute is missing, or it is a property that raised an AttributeError:
            # keep that error.
            if any(name in vars(base) for base in type(self).__mro__):
                return object.__getattribute__(self, name)
            raise no_attribute(self, name)

    @classmethod
    def init(cls: type[M], rngs: Any = None, **flags: Any) -> type[M]:
        """Construct within a scope: `Cls.init(jax.random.key(0))(*constructor_arguments)`.

        Args:
          rngs: a key, a seed, or a mapping from stream name to key, as for `nnx.scope`.
          **flags: flags for the constructor. A flag that nothing reads gives a UserWarning.

        Returns:
          A callable that takes the constructor's arguments. Its type is that of the class.
        """
        inner = make_scope(rngs, **flags)
        name = cls.__name__

        @functools.wraps(cls, updated=())
        def construct(*args: Any, **kwargs: Any) -> M:
            advice = f"Put the constructor's arguments in the second brackets: {name}.init(0)(...)."
            with expected(flags, f"{name}.init", advice), entered(inner):
                try:
                    return cls(*args, **kwargs)
                except (TypeError, ValueError) as error:
                    explain_data(cls, args, kwargs, error)
                    raise

        return cast("type[M]", construct)

    def apply(self: M, rngs: Any = None, mutable: Filter = ..., **flags: Any) -> M:
        """Call within a scope: `model.apply(rngs=key, training=True)(x)`, or any method of it.

        Args:
          rngs: a key, a seed, or a mapping from stream name to key, as for `nnx.scope`.
          mutable: a filter. Writing a Ref of this module that the filter does not select is an error.
          **flags: flags for the call; they win over attributes of the same name. A flag that no
            module reads gives a UserWarning.

        Returns:
          A stand-in for the module. Its call and its methods run in the scope, and its type is that
          of the module.
        """
        return cast("M", _Applied(self, make_scope(rngs, **flags), mutable, flags))

    def make_rng(self, name: str = "default") -> jax.Array:
        """The next key of the ambient stream `name`; see `nnx.make_rng`."""
        try:
            return make_rng(name)
        except MissingStreamError:
            streams = ambient.scope.streams if ambient.scope is not None else {}
            raise missing_stream(name, streams, type(self).__name__) from None

    def get_flag(self, name: str, default: Any = MISSING) -> Any:
        """The flag `name`: from the ambient scope, else from the attribute of that name, else the default.

        Raises:
          MissingFlagError: none of the three exists.
        """
        own = attributes(self).get(name)
        if own is None:
            own = getattr(type(self), name, None)
        # A submodule or a value may have the same name.
        if own is None or isinstance(own, (Node, Ref, Field, jax.Array)):
            own = default
        return get_flag(name, own)

    def train(self: M) -> M:
        """Set the modules of the whole tree to training: dropout drops, batch norm uses the batch.

        This sets `training`, `deterministic` and `use_running_average` wherever they exist and are
        a bool or None. It returns the module. Flags of a scope win over these attributes.
        """
        return self._set_mode(training=True)

    def eval(self: M) -> M:
        """Set the modules of the whole tree to evaluation; see `train`."""
        return self._set_mode(training=False)

    def _set_mode(self: M, *, training: bool) -> M:
        flags = {
            "training": training,
            "deterministic": not training,
            "use_running_average": not training,
        }
        for node in walk(self).objects:
            for name, flag in flags.items():
                if isinstance(node, Node) and _is_flag(node, name):
                    setattr(node, name, flag)
        return self

    def __getitem__(self, filter: Filter) -> Partition:
        """The values that the filter selects: `model["params"]`; see `nnx.get_partition`."""
        return refx.get_partition(self, filter)

    def __setitem__(self, filter: Filter, partition: Mapping[Any, Any]) -> None:
        """Write the values of a partition into the Refs: `model["params"] = new`.

        Raises:
          UnknownPathError: the module does not have a path, or the filter excludes it.
          FilterError: the filter looks like a mistake and selects nothing; see `nnx.get_partition`.
        """
        selects = refx.to_predicate(filter)
        cells = refx.refs(self)
        selected = {path for path, cell in cells.items() if selects(path, cell)}
        if not selected:
            check_selection(filter, self)
        if not isinstance(partition, Mapping):
            raise ValueTypeError(
                f"model[{filter!r}] = ... takes a Partition, or another mapping from path to value, "
                f"but got {a_kind(type(partition))}.{values_of(partition, filter)}"
            )

        def check(given: Any, path: Any, cell: Ref[Any]) -> None:
            if path not in selected:
                raise UnknownPathError(
                    f"The filter {filter!r} does not select {dotted(given)!r} (collection "
                    f"{cell.collection!r}), so model[{filter!r}] cannot write it. Did this "
                    "partition come from another filter? nnx.update(model, partition) writes any "
                    "path."
                )

        update_cells(self, cells, [partition], check=check)

    # Brackets take filters, so iterating by number, Python's fallback, would never end.
    __iter__ = None

    def __dir__(self) -> list[str]:
        return sorted(set(object.__dir__(self)) - _INTERNAL)

    def __repr__(self) -> str:
        return show.tree_repr(self)

    def _repr_html_(self) -> str:
        return show.tree_html(repr(self))

    def __treescope_repr__(self, path: str | None, subtree_renderer: Any) -> Any:
        return show.show_node(self, path, subtree_renderer)


# Attributes that every module keeps for itself.
_INTERNAL = frozenset(name for name in dir(Module) if name.startswith("_"))


def _is_flag(node: Node, name: str) -> bool:
    """Whether this attribute is a flag; a submodule or a value may have the name of a flag too."""
    there = getattr(type(node), name, MISSING)
    value = attributes(node).get(name, there)
    return isinstance(value, bool | None) and not isinstance(there, RefField)


_ASK = "A module reads a flag with self.get_flag(name, default), in the method that is called."


class _Applied:
    """Stands for a module and its submodules; their calls and methods run in a scope."""

    # For the error when one is given to a transformation as an argument.
    _as_argument = (
        "the result of model.apply(...), which is only there to be called. Transform it, as in "
        "nnx.jit(model.apply(decode=True))(x), or pass the model and put the call in "
        "`with nnx.scope(key, decode=True):`"
    )

    def __init__(
        self,
        target: Any,
        scope: Scope,
        mutable: Filter,
        flags: Mapping[str, Any],
        root: Module | None = None,
    ):
        self._target = target
        self._scope = scope
        self._mutable = mutable
        self._flags = flags
        self._root = target if root is None else root

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = f"{type(self._root).__name__}.apply"
        with expected(self._flags, call, _ASK), entered(self._scope):
            if self._mutable is ...:
                return self._target(*args, **kwargs)
            with refx.mutable(self._mutable, self._root):
                return self._target(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._target, name)
        if callable(found):
            return _Applied(found, self._scope, self._mutable, self._flags, self._root)
        return found

    def __repr__(self) -> str:
        return f"<apply(...) of {a_kind(type(self._root))}, to be called>"
