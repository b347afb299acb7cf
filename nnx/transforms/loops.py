"""Loops: `nnx.scan`, `nnx.while_loop`, `nnx.fori_loop` and `nnx.map`.

JAX's loops carry a fixed set of values, so we must know beforehand which Refs the body writes. We
evaluate the body once abstractly to find out. The loop carries the Refs that are written; the others
are constants of the loop, which is free and keeps their gradients cheap.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from nnx._ambient import ambient
from nnx.sharding.putting import spec_in_type
from nnx.transforms import plain
from nnx.transforms.added_axis import of_steps
from nnx.transforms.axes import AxisError, ByFilter, Specs, assign, length
from nnx.transforms.boundary import abstractly, close_call, run
from nnx.transforms.call import Call, Roots, Values, open_call
from nnx.transforms.callables import function_name
from nnx.transforms.carry import CARRY, Loop, run_loop
from nnx.transforms.eager import compiled_once
from nnx.transforms.naming import named
from nnx.transforms.vmap import vmap
from refx import Filter, StructureError, opened
from refx.node import is_identity

__all__ = ["fori_loop", "map", "scan", "while_loop"]


C = TypeVar("C")
X = TypeVar("X")
Y = TypeVar("Y")


def scan(
    f: Callable[[C, X], tuple[C, Y]],
    init: C = None,
    xs: X = None,
    length: int | None = None,
    reverse: bool = False,
    unroll: int | bool = 1,
    *,
    axes: dict[Filter, Any] | None = None,
) -> tuple[C, Y]:
    """Run `f(carry, x) -> (carry, y)` over the leading axis of `xs`, as one compiled loop.

    The loop carries the Refs in `init`, the Refs that `f` closes over, and the streams of the ambient
    scope. It slices the Refs in `xs` along their leading axis, and stacks their writes again. So a
    stack of layers is `nnx.scan(lambda x, layer: (layer(x), None), x, layers)`, and a whole epoch is
    `nnx.scan(lambda _, batch: (None, train_step(model, batch)), None, batches)`. On CPU, XLA runs
    convolutions slowly inside a loop, as in `jax.lax.scan`: if the body has any, use `unroll=True` or
    a Python loop.

    Args:
      f: the body. It is called with the carry and one slice of `xs`.
      init: the first carry: any pytree, which may hold modules and Refs.
      xs: the pytree to scan over, which may hold modules and Refs, or None.
      length, reverse, unroll: as for `jax.lax.scan`.
      axes: for the Refs in `xs`, a dict from filter to `nnx.CARRY` (carry the whole Ref) or 0 (slice
        it). A Ref that no filter selects is sliced.

    Returns:
      `(carry, ys)`. A module in the carry is the caller's own. New modules in `y` are stacked.

    Raises:
      CarryError: the carry, or a carried Ref, changes its structure, shape or dtype.
      AxisError: the leading axes differ in size, or one Ref is both carried and sliced.
      StructureError: the body changes the structure of a module from outside.

    >>> import jax.numpy as jnp, nnx
    >>> total = nnx.Ref(jnp.array(0.0))
    >>> def body(carry, x):
    ...     total.value += x
    ...     return carry, total.value
    >>> _, sums = nnx.scan(body, None, jnp.arange(4.0))
    >>> sums.tolist(), float(total.value)
    ([0.0, 1.0, 3.0, 6.0], 6.0)
    """
    if ambient.probe is not None:
        return ambient.probe.scan(f, init, xs, length, reverse, unroll, axes)
    name = f"nnx.scan({function_name(f)})"
    for axis in (axes or {}).values():
        if axis is not CARRY and axis != 0:
            raise AxisError(
                f"{name} got the axis {axis!r}. It slices the Refs in xs along axis 0, or carries them "
                f"with nnx.CARRY."
            )
    if axes and not opened.holds_identity(xs):
        raise AxisError(
            f"{name} got axes, which say how to slice the Refs in xs, but xs holds no module or Ref. "
            f"Refs in init and in the closure are always carried: leave axes out."
        )
    rules = axes or {}
    settings = (length, reverse, unroll, tuple(rules.items()))
    return compiled_once(
        lambda fns, args: _scan(name, fns[0], args[0], args[1], length, reverse, unroll, rules),
        name,
        (f,),
        (init, xs),
        settings,
        lambda: _plain_scan(name, f, init, xs, length, reverse, rules),
    )


def _scan(
    name: str,
    f: Callable[[Any, Any], tuple[Any, Any]],
    init: Any,
    xs: Any,
    length: int | None,
    reverse: bool,
    unroll: int | bool,
    axes: dict[Filter, Any],
) -> tuple[Any, Any]:
    def attempt(roots: Roots, init: Any, renewed: frozenset[int]) -> Any:
        call = open_call((init, xs), {}, roots)
        specs = assign(
            call,
            (init, xs),
            {},
            (ByFilter({}, CARRY), ByFilter(axes, 0)),
            name=name,
            keyword=None,
            ambient=lambda path, ref: CARRY,
        )
        size = call.repeats = _length(call, specs, length, name)
        loop = Loop(name, f, call, specs, init, steps=size, renewed=renewed)
        sliced = loop.sliced()
        one = jax.tree.map(lambda x: _slice_of(name, x), jax.eval_shape(lambda: sliced))
        loop.abstract_step(one)

        def body(carry: Any, x: Any) -> Any:
            carry, packed = loop.step(carry, x)
            return carry, (packed.out, loop.sliced_of(packed))

        last, (out, sliced) = jax.lax.scan(
            named(body, f, call, loop.labels),
            loop.first(),
            sliced,
            size,
            reverse=reverse,
            unroll=unroll,
        )
        y = close_call(call, of_steps(name, loop.packed(out, last, sliced)))
        return loop.last(last), y

    return run_loop(init, attempt)


def _slice_of(name: str, x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """The shape of one slice along the leading axis."""
    sharding = x.sharding
    if isinstance(sharding, NamedSharding):
        first, *rest = spec_in_type(x)
        if first is not None:
            raise AxisError(
                f"{name} slices an array {jax.typeof(x)} along its leading axis, but that axis is "
                f"sharded along an Explicit axis of the mesh. Leave it unsharded, or make the mesh "
                f"with Auto axes."
            )
        sharding = NamedSharding(sharding.mesh, PartitionSpec(*rest))
    return jax.ShapeDtypeStruct(x.shape[1:], x.dtype, sharding=sharding)


def _plain_scan(
    name: str,
    f: Any,
    init: Any,
    xs: Any,
    length: int | None,
    reverse: bool,
    axes: dict[Filter, Any],
) -> tuple[Any, Any]:
    call = open_call((init, xs), {}, None)
    given = (ByFilter({}, CARRY), ByFilter(axes, 0))
    carried = lambda path, ref: CARRY  # noqa: E731
    specs = assign(call, (init, xs), {}, given, name=name, keyword=None, ambient=carried)
    size = _length(call, specs, length, name)
    if size == 0:
        return _scan(name, f, init, xs, length, reverse, 1, axes)
    return plain.scan(f, init, xs, size, reverse, plain.carried_by(axes, CARRY))


def _length(call: Call, specs: Specs, given: int | None, name: str) -> int:
    return length(call, specs, given, name, lambda spec: None if spec is CARRY else spec)


def while_loop(cond_fun: Callable[[C], Any], body_fun: Callable[[C], C], init_val: C) -> C:
    """Run `body_fun(val) -> val` while `cond_fun(val)` is true, as one compiled loop.

    The loop carries the Refs in `init_val` and the Refs that the functions close over. Both functions
    see their current values, but only the body may write them.

    Raises:
      CarryError: the carry, or a carried Ref, changes its structure, shape or dtype.
      StructureError: the condition writes a Ref, or the body changes the structure of a module.

    >>> import jax.numpy as jnp, nnx
    >>> n = nnx.Ref(jnp.array(1), "counters")
    >>> def double(_):
    ...     n.value *= 2
    >>> nnx.while_loop(lambda _: n.value < 100, double, None)
    >>> int(n.value)
    128
    """
    if ambient.probe is not None:
        return ambient.probe.while_loop(cond_fun, body_fun, init_val)
    name = f"nnx.while_loop({function_name(body_fun)})"
    return compiled_once(
        lambda fns, args: _while_loop(name, *fns, *args),
        name,
        (cond_fun, body_fun),
        (init_val,),
        None,
        lambda: plain.while_loop(cond_fun, body_fun, init_val),
    )


def _while_loop(
    name: str, cond_fun: Callable[[Any], Any], body_fun: Callable[[Any], Any], init_val: Any
) -> Any:
    def attempt(roots: Roots, init: Any, renewed: frozenset[int]) -> Any:
        call = open_call((init,), {}, roots)
        specs = _all_carried(call)
        body_of_val = lambda val: (body_fun(val), None)  # noqa: E731
        loop = Loop(name, body_of_val, call, specs, init, renewed=renewed)
        nothing = loop.sliced()
        loop.abstract_step(nothing)

        def condition(carry: Any) -> Any:
            packed = run(
                cond_fun,
                name,
                call,
                loop.place(carry, nothing),
                mode="constant",
                runs_once=False,
            )
            if packed.spec.written:
                what = call.layout.name_of(packed.spec.written[0])
                raise StructureError(
                    f"{what} was written in the condition of {name}. A condition may only read; "
                    f"move the write into the body."
                )
            return packed.out

        def body(carry: Any) -> Any:
            return loop.step(carry, nothing)[0]

        abstractly(condition, loop.first())
        last = jax.lax.while_loop(
            named(condition, cond_fun, call, loop.carry_labels),
            named(body, body_fun, call, loop.carry_labels),
            loop.first(),
        )
        close_call(call, loop.packed(None, last, []))
        return loop.last(last)

    return run_loop(init_val, attempt)


def fori_loop(
    lower: Any,
    upper: Any,
    body_fun: Callable[[Any, C], C],
    init_val: C,
    *,
    unroll: int | bool | None = None,
) -> C:
    """Run `body_fun(i, val) -> val` for `i` from `lower` to `upper - 1`, as one compiled loop.

    The loop carries the Refs in `init_val` and the Refs that the body closes over. The arguments are
    those of `jax.lax.fori_loop`; the errors are those of `nnx.while_loop`.

    >>> import jax.numpy as jnp, nnx
    >>> total = nnx.Ref(jnp.array(0))
    >>> def add(i, _):
    ...     total.value += i
    >>> nnx.fori_loop(0, 5, add, None)
    >>> int(total.value)
    10
    """
    if ambient.probe is not None:
        return ambient.probe.fori_loop(lower, upper, body_fun, init_val, unroll)
    name = f"nnx.fori_loop({function_name(body_fun)})"
    # Python ints as bounds are settings of the program, as they are for JAX.
    given = {i: b for i, b in enumerate((lower, upper)) if isinstance(b, int)}
    arrays = tuple([b for i, b in enumerate((lower, upper)) if i not in given])

    def impl(fns: Any, args: Any) -> Any:
        *bounds, init = args
        todo = iter(bounds)
        low, high = [given[i] if i in given else next(todo) for i in range(2)]
        return _fori_loop(name, fns[0], low, high, init, unroll)

    return compiled_once(
        impl,
        name,
        (body_fun,),
        (*arrays, init_val),
        (tuple(given.items()), unroll),
        lambda: plain.fori_loop(lower, upper, body_fun, init_val),
    )


def _fori_loop(
    name: str,
    body_fun: Callable[[Any, Any], Any],
    lower: Any,
    upper: Any,
    init_val: Any,
    unroll: int | bool | None,
) -> Any:
    index = jnp.asarray(lower)
    count = max(upper - lower, 0) if isinstance(lower, int) and isinstance(upper, int) else None

    def attempt(roots: Roots, init: Any, renewed: frozenset[int]) -> Any:
        call = open_call((index, init), {}, roots)
        specs = _all_carried(call)
        # The index is an input of each step; it is not carried.
        specs.values.arguments[0] = 0
        call.repeats = 1 if count is None else count
        loop = Loop(
            name,
            lambda i, val: (body_fun(i, val), None),
            call,
            specs,
            init,
            position=1,
            steps=count,
            renewed=renewed,
        )
        loop.abstract_step(Values([], [], [index]))

        def body(i: Any, carry: Any) -> Any:
            return loop.step(carry, Values([], [], [i]))[0]

        body = named(body, body_fun, call, loop.index_labels)
        last = jax.lax.fori_loop(lower, upper, body, loop.first(), unroll=unroll)
        close_call(call, loop.packed(None, last, []))
        return loop.last(last)

    return run_loop(init_val, attempt)


def map(f: Callable[[X], Y], xs: X, *, batch_size: int | None = None) -> Y:
    """Apply `f` to the slices of `xs` along the leading axis, one after another, and stack the results.

    It is `nnx.scan` without a carry: Refs in `xs` are sliced, and closed-over Refs are carried.

    Args:
      f: a function of one slice.
      xs: any pytree of arrays, which may hold modules and Refs.
      batch_size: how many slices to take at a time, with `nnx.vmap`, as in `jax.lax.map`. `xs` must
        not hold Refs then.

    Raises:
      AxisError: the leading axes differ in size, or an array has none; `batch_size` is not a positive
        int, or `xs` holds Refs and `batch_size` is given.
      CarryError, StructureError: as for `nnx.scan`.

    >>> import jax.numpy as jnp, nnx
    >>> nnx.map(lambda x: x * 2, jnp.arange(3)).tolist()
    [0, 2, 4]
    """
    name = f"nnx.map({function_name(f)})"
    sizes = _sizes(name, xs)
    if ambient.probe is not None:
        # A probe's records have one leading axis for the slices, however they are batched.
        return scan(lambda _, x: (None, f(x)), None, xs)[1]
    if batch_size is None:
        return _mapped(name, f, xs)
    if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
        raise AxisError(f"{name} got batch_size={batch_size!r}, but it must be a positive int.")
    if opened.holds_identity(xs):
        raise AxisError(
            f"{name} with batch_size= takes no modules or Refs in xs. Leave batch_size out, or "
            f"let f close over the module."
        )
    (size,) = sizes
    whole = size - size % batch_size
    parts = []
    if whole:
        batches = jax.tree.map(lambda x: x[:whole].reshape(-1, batch_size, *x.shape[1:]), xs)
        stacked = _mapped(name, vmap(f), batches)
        parts.append(jax.tree.map(lambda y: y.reshape(whole, *y.shape[2:]), stacked))
    if size % batch_size or not parts:
        parts.append(vmap(f)(jax.tree.map(lambda x: x[whole:], xs)))
    return jax.tree.map(lambda *ys: jnp.concatenate(ys), *parts)


def _mapped(name: str, f: Callable[[Any], Any], xs: Any) -> Any:
    body = lambda _, x: (None, f(x))  # noqa: E731
    return compiled_once(
        lambda fns, args: _scan(name, fns[0], None, args[0], None, False, 1, {}),
        name,
        (body,),
        (xs,),
        "map",
        lambda: _plain_scan(name, body, None, xs, None, False, {}),
    )[1]


def _sizes(name: str, xs: Any) -> set[int]:
    """Check that all arrays have one leading size, and return it. Modules are checked later."""
    sizes: dict[int, str] = {}
    for path, x in opened.flatten_with_path(xs)[0]:
        if is_identity(x):
            continue
        where = "xs" + jax.tree_util.keystr(path)
        shape = jnp.shape(x)
        if not shape:
            raise AxisError(
                f"{name} maps over the leading axis, but {where} is a scalar, which has no axis."
            )
        sizes.setdefault(shape[0], f"{shape[0]} of {where}")
    if len(sizes) > 1:
        raise AxisError(f"{name} got two sizes to map over: {' and '.join(sizes.values())}.")
    if not sizes and not opened.leaves(xs):
        raise AxisError(f"{name} has nothing to map over: xs has no arrays.")
    return set(sizes)


def _all_carried(call: Call) -> Specs:
    return Specs(Values(*[[CARRY] * len(values) for values in call.values]), [])
