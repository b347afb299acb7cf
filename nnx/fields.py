"""Fields of a class, `param()`, `ref(...)` and `static()`, and the `__init__` generated from them."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Hashable
from typing import Any, NoReturn, TypeVar, dataclass_transform

from refx import MISSING, RefField, StaticField
from refx.field import Field
from refx.node import set_on_class

__all__ = ["dataclass", "param", "ref", "static"]

T = TypeVar("T")


def ref(
    collection: Hashable = None,
    *given: NoReturn,
    default: Any = MISSING,
    default_factory: Callable[[], Any] | None = None,
    init: bool = True,
    kw_only: bool = False,
    converter: Callable[[Any], Any] | None = None,
    **metadata: Any,
) -> Any:
    """A field whose value lives in a Ref of the given collection.

    Reading the attribute returns the value, and assigning to it writes the Ref. Assigning a Ref ties
    the field to that Ref; assigning None leaves the field without one.

    Args:
      collection: the label that filters select by.
      default: the initial value of a new instance.
      default_factory: a function that makes the initial value instead; it may call `nnx.make_rng`.
      init: whether `@nnx.dataclass` makes the field an argument of `__init__`.
      kw_only: whether that argument is keyword-only.
      converter: called with each value assigned to the field; the Ref holds its result.
      **metadata: hashable metadata of the Ref.

    >>> import jax, jax.numpy as jnp, nnx
    >>> class Average(nnx.Module):
    ...     mean: jax.Array = nnx.ref("batch_stats")
    ...     def __init__(self):
    ...         self.mean = jnp.zeros(())
    >>> average = Average()
    >>> average.mean += 1.0
    >>> float(average["batch_stats"]["mean"])
    1.0
    """
    try:
        hash(collection)
    except TypeError:
        given = (collection, *given)  # pyright: ignore[reportAssignmentType]
    if given:
        raise _given_value('ref("batch_stats")', given)
    return RefField(
        collection,
        metadata=metadata,
        default=default,
        default_factory=default_factory,
        init=init,
        kw_only=kw_only,
        converter=converter,
    )


def param(*given: NoReturn, **options: Any) -> Any:
    """A field in the collection `"params"`, which training changes. Options as for `ref`.

    >>> import jax, jax.numpy as jnp, nnx
    >>> class Scale(nnx.Module):
    ...     scale: jax.Array = nnx.param()
    ...     def __init__(self, n):
    ...         self.scale = jnp.ones((n,))
    >>> Scale(3)["params"]
    Partition({
      'scale': float32[3],
    })
    """
    if given:
        raise _given_value("param()", given)
    return ref("params", **options)


def static(
    *given: NoReturn,
    default: Any = MISSING,
    default_factory: Callable[[], Any] | None = None,
    init: bool = True,
    kw_only: bool = False,
) -> Any:
    """A field that is always part of the structure; its value must be hashable.

    Numbers, strings and callables are static anyway. Use it for defaults, for `@nnx.dataclass`,
    and for settings that would otherwise be values or structure, such as a tuple.

    >>> import nnx
    >>> @nnx.dataclass
    ... class Pool(nnx.Module):
    ...     window: tuple[int, int] = nnx.static(default=(2, 2))
    >>> Pool().window
    (2, 2)
    """
    if given:
        raise _given_value("static()", given)
    return StaticField(default=default, default_factory=default_factory, init=init, kw_only=kw_only)


def _given_value(field: str, given: tuple[Any, ...]) -> TypeError:
    name = field.split("(")[0]
    kind = "int" if name == "static" else "jax.Array"
    return TypeError(
        f"nnx.{name} declares a field of the class and takes no value, but got one of type "
        f"{type(given[-1]).__name__}. Declare it in the class body, `w: {kind} = nnx.{field}`, and "
        f"assign the value in __init__, self.w = ...; or pass default=, or default_factory=, which "
        f"makes one for each instance. A Ref without a field is nnx.Ref(value, collection)."
    )


@dataclass_transform(eq_default=False, field_specifiers=(param, ref, static, dataclasses.field))
def dataclass(cls: type[T]) -> type[T]:
    """Give a module class an `__init__` made from its annotated fields, in order.

    Fields are those with a specifier (`param()`, `ref(...)`, `static()`) and plain annotations, with
    or without a default. Equality is still identity.

    >>> import jax, jax.numpy as jnp, nnx
    >>> @nnx.dataclass
    ... class Affine(nnx.Module):
    ...     w: jax.Array = nnx.param()
    ...     power: int = 1
    ...     def __call__(self, x):
    ...         return (x * self.w) ** self.power
    >>> float(Affine(jnp.array(3.0), power=2)(2.0))
    36.0
    """
    own = {name: f for name, f in vars(cls).items() if isinstance(f, Field)}
    # A mere annotation keeps the specifier of the base class, just as it keeps a default.
    inherited = {name: getattr(cls, name, None) for name in inspect.get_annotations(cls)}
    own |= {name: f for name, f in inherited.items() if isinstance(f, Field)}
    for name, f in own.items():
        options: dict[str, Any] = {"init": f.init, "kw_only": f.kw_only}
        if f.default_factory is not None:
            options["default_factory"] = f.default_factory
        elif f.default is not MISSING:
            options["default"] = f.default
        setattr(cls, name, dataclasses.field(**options))
    own_init(cls)
    generated = "__init__" not in vars(cls)
    made = dataclasses.dataclass(cls, eq=False, repr=False)
    for name, f in own.items():
        setattr(made, name, f)
    # The generated __init__ sets most defaults, in the order of the fields.
    done = {
        f.name
        for f in dataclasses.fields(made)  # pyright: ignore[reportArgumentType]
        if generated and (f.init or f.default_factory is not dataclasses.MISSING)
    }
    left = (f for f in getattr(made, "_fields", {}).values() if f.name not in done)
    set_on_class(made, "_defaults", tuple(f for f in left if f.has_default))
    check_after_init(made)
    return made


def check_after_init(cls: type) -> None:
    """Call the `__check_init__` of each class after `__init__`, base classes first.

    This is Equinox's hook: a subclass cannot forget to call it, because it is called automatically.
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
    """Undo `check_after_init`, so that a class has its user's `__init__` again, or none."""
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
