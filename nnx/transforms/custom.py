"""Custom derivative rules: `nnx.custom_vjp` and `nnx.custom_jvp`.

The rules see what the function sees: modules and Refs. Where JAX wants a cotangent or a tangent for
each array, an argument that holds Refs has a Partition of them, by path.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nnx.transforms.axes import places
from nnx.transforms.boundary import Packed, Spec, check_lifted, close_call, run, until_lifted
from nnx.transforms.call import Call, Roots, open_call
from nnx.transforms.jit import function_name
from refx import Partition, RefError
from refx.node import is_identity
from refx.partition import dotted, listed

__all__ = ["CustomRuleError", "custom_jvp", "custom_vjp"]


class CustomRuleError(RefError, TypeError):
    """A custom derivative rule that is missing, or that returns what does not fit its function."""


class _Custom:
    """What the two kinds of rule share."""

    kind = ""

    def __init__(self, fn: Callable[..., Any], nondiff_argnums: Sequence[int] = ()):
        self._fn = fn
        self._fixed = tuple(nondiff_argnums)
        self._name = f"{self.kind}({function_name(fn)})"
        functools.update_wrapper(self, fn, updated=())

    def _divide(self, args: tuple[Any, ...]) -> tuple[list[Any], tuple[Any, ...]]:
        fixed = [args[i] for i in self._fixed]
        return fixed, tuple(a for i, a in enumerate(args) if i not in self._fixed)

    def _whole(self, args: tuple[Any, ...], fixed: list[Any]) -> list[Any]:
        todo, kept = iter(args), dict(zip(self._fixed, fixed, strict=True))
        count = len(args) + len(fixed)
        return [kept[i] if i in kept else next(todo) for i in range(count)]

    def __call__(self, *args: Any) -> Any:
        fixed, args = self._divide(args)

        def attempt(roots: Roots) -> Any:
            call = open_call(args, {}, roots)
            return self._call(call, args, fixed)

        return until_lifted(attempt)

    def _call(self, call: Call, args: tuple[Any, ...], fixed: list[Any]) -> Any:
        raise CustomRuleError(f"{self._name} has no rule.")

    def _plain(self, call: Call, fixed: list[Any]) -> Callable[..., Packed]:
        fn, bare = self._fn, call.without_values()
        return lambda *flat: run(
            lambda *args: fn(*self._whole(args, fixed)), self._name, bare, *flat, mode="read"
        )

    def _missing(self, method: str) -> CustomRuleError:
        return CustomRuleError(
            f"{self._name} was called, but its rule is not defined. Define it with "
            f"{function_name(self._fn)}.{method}."
        )


def _learn(call: Call, *bodies: Callable[..., Packed]) -> Spec:
    """What the bodies write, in all; they must leave the same structure."""
    found = [jax.eval_shape(body, call.values, call.leaves, call.others) for body in bodies]
    check_lifted(call)
    return Spec(tuple(sorted({i for p in found for i in p.spec.written})), found[0].spec.graph)


def _united(packed: Packed, spec: Spec, values: list[Any]) -> tuple[Any, list[Any]]:
    written = dict(zip(packed.spec.written, packed.written, strict=True))
    return packed.out, [written.get(i, values[i]) for i in spec.written]


class custom_vjp(_Custom):
    """A function with a rule of its own for reverse-mode differentiation.

    Args:
      fn: the function; its positional arguments may be modules, Refs and arrays, and it may write
        Refs. Closed-over Refs are constants of the differentiation.
      nondiff_argnums: numbers of arguments that are no arrays; the backward rule gets them first.

    The rules are given with `defvjp(fwd, bwd)`: `fwd(*args)` returns `(out, residuals)`, where the
    residuals are any pytree, and `bwd(*nondiff, residuals, cotangent)` returns a tuple with one
    cotangent for each differentiable argument: for one that holds Refs a Partition or another
    mapping by path, where what is missing is zero, and None for all zero.

    Raises:
      CustomRuleError: the rule is not defined, or returns the wrong number of cotangents, an
        unknown path or another shape.

    >>> import jax.numpy as jnp, nnx
    >>> @nnx.custom_vjp
    ... def scaled(w, x):
    ...     return w.value * x
    >>> def fwd(w, x):
    ...     return w.value * x, (w.value, x)
    >>> def bwd(residuals, g):
    ...     w, x = residuals
    ...     return {"": 10 * g * x}, g * w
    >>> scaled.defvjp(fwd, bwd)
    >>> w = nnx.Ref(jnp.array(2.0), "params")
    >>> float(nnx.grad(scaled)(w, 3.0)[""])
    30.0
    """

    kind = "nnx.custom_vjp"
    _rules: tuple[Callable[..., Any], Callable[..., Any]] | None = None

    def defvjp(self, fwd: Callable[..., Any], bwd: Callable[..., Any]) -> None:
        """Define the forward and the backward rule."""
        self._rules = (fwd, bwd)

    def _call(self, call: Call, args: tuple[Any, ...], fixed: list[Any]) -> Any:
        if self._rules is None:
            raise self._missing("defvjp(fwd, bwd)")
        fwd, bwd = self._rules
        plain, bare = self._plain(call, fixed), call.without_values()

        def forward(*flat: Any) -> tuple[Any, Packed]:
            return run(
                lambda *args: fwd(*self._whole(args, fixed)),
                self._name,
                bare,
                *flat,
                mode="read",
                split_out=self._split,
            )

        spec = _learn(call, plain, lambda *flat: forward(*flat)[1])
        forms = _forms(call, args)
        counts = len(call.values), len(call.leaves)

        def pure_fwd(*flat: Any) -> Any:
            residuals, packed = forward(*flat)
            return _united(packed, spec, flat[0]), residuals

        def pure_bwd(residuals: Any, cotangents: Any) -> Any:
            given = bwd(*fixed, residuals, cotangents[0])
            return self._cotangents(forms, counts, given)

        pure = jax.custom_vjp(lambda *flat: _united(plain(*flat), spec, flat[0]))
        pure.defvjp(pure_fwd, pure_bwd)
        out, written = pure(call.values, call.leaves, call.others)
        return close_call(call, Packed(spec, out, written))

    def _split(self, out: Any) -> tuple[Any, Any]:
        if not isinstance(out, tuple) or len(out) != 2:
            raise CustomRuleError(
                f"The forward rule of {self._name} must return (out, residuals), but it returned "
                f"{type(out).__name__}."
            )
        return out[1], out[0]

    def _cotangents(
        self, forms: list[_Form], counts: tuple[int, int], given: Any
    ) -> tuple[list[Any], ...]:
        """A cotangent for each value, in the order of the flat lists; None is zero."""
        if not isinstance(given, tuple | list) or len(given) != len(forms):
            count = len(given) if isinstance(given, tuple | list) else type(given).__name__
            raise CustomRuleError(
                f"The backward rule of {self._name} must return a tuple of {len(forms)} "
                f"cotangents, one for each differentiable argument, but it returned {count}."
            )
        flat: tuple[list[Any], ...] = ([None] * counts[0], [None] * counts[1], [])
        for number, (form, cotangent) in enumerate(zip(forms, given, strict=True)):
            if form.treedef is not None:
                none = [None] * form.others
                flat[2].extend(none if cotangent is None else jax.tree.leaves(cotangent))
                continue
            flat[2].extend([None] * form.others)
            by_path = dict(Partition(cotangent or {}))
            for path, kind, i, shapes in form.items:
                if path in by_path:
                    self._check(path, by_path[path], shapes)
                    flat[kind][i] = by_path[path]
            known = [item[0] for item in form.items]
            unknown = [path for path in by_path if path not in known]
            if unknown:
                raise CustomRuleError(
                    f"The backward rule of {self._name} returned a cotangent for {listed(unknown)} "
                    f"of argument {number}, which has {listed(known)}."
                )
        return flat

    def _check(self, path: Any, cotangent: Any, shapes: Any) -> None:
        if _shapes(cotangent) != shapes:
            raise CustomRuleError(
                f"The backward rule of {self._name} returned a cotangent of {_shapes(cotangent)} "
                f"for {dotted(path)!r}, whose shape and dtype are {shapes}."
            )


class _Form(NamedTuple):
    """What a rule needs to know of an argument; it must not hold values of the call.

    `treedef` is that of an argument without Refs. `items` are, for another one, the path, the list
    (0 for Refs, 1 for plain arrays), the position there, and the shapes of each value.
    """

    treedef: Any
    others: int
    items: list[tuple[Any, int, int, Any]]


def _forms(call: Call, args: tuple[Any, ...]) -> list[_Form]:
    todo = iter(places(call))
    forms = []
    for arg in args:
        flat, treedef = jax.tree.flatten(arg, is_leaf=is_identity)
        mine = [next(todo) for x in flat if is_identity(x)]
        items = []
        for root in mine:
            items += [(path, 0, i, _shapes(call.values[i])) for path, _, i in root.refs]
            items += [(path, 1, i, _shapes(call.leaves[i])) for path, _, i in root.leaves]
        forms.append(_Form(None if mine else treedef, len(flat) - len(mine), items))
    return forms


def _shapes(value: Any) -> Any:
    return [(jnp.shape(x), str(jnp.result_type(x))) for x in jax.tree.leaves(value)]


class custom_jvp(_Custom):
    """A function with a rule of its own for differentiation, forward and reverse.

    Args:
      fn: the function; its positional arguments may be modules, Refs and arrays, and it may write
        Refs. Closed-over Refs are constants of the differentiation.
      nondiff_argnums: numbers of arguments that are no arrays; the rule gets them first.

    The rule is given with `defjvp(rule)`: `rule(*nondiff, primals, tangents)` returns
    `(out, tangent_out)`. The tangent of an argument that holds Refs is a Partition of all its
    floating-point values.

    Raises:
      CustomRuleError: the rule is not defined, or does not return a pair.

    >>> import jax.numpy as jnp, nnx
    >>> @nnx.custom_jvp
    ... def scaled(w, x):
    ...     return w.value * x
    >>> @scaled.defjvp
    ... def rule(primals, tangents):
    ...     (w, x), (dw, dx) = primals, tangents
    ...     return w.value * x, 10 * dw[""] * x + w.value * dx
    >>> w = nnx.Ref(jnp.array(2.0), "params")
    >>> float(nnx.grad(scaled)(w, 3.0)[""])
    30.0
    """

    kind = "nnx.custom_jvp"
    _rule: Callable[..., Any] | None = None

    def defjvp(self, rule: Callable[..., Any]) -> Callable[..., Any]:
        """Define the rule; it is returned, so this can be a decorator."""
        self._rule = rule
        return rule

    def _call(self, call: Call, args: tuple[Any, ...], fixed: list[Any]) -> Any:
        rule = self._rule
        if rule is None:
            raise self._missing("defjvp(rule)")
        plain, bare = self._plain(call, fixed), call.without_values()
        forms = _forms(call, args)

        def both(flat: Any, tangents: Any) -> tuple[Any, Packed]:
            given = self._tangents(forms, tangents)
            return run(
                lambda *primals: rule(*fixed, primals, given),
                self._name,
                bare,
                *flat,
                mode="read",
                split_out=self._split,
            )

        def zeros(flat: Any) -> Any:
            return jax.tree.map(lambda x: jnp.zeros(jnp.shape(x), _tangent_dtype(x)), flat)

        spec = _learn(call, plain, lambda *flat: both(flat, zeros(flat))[1])
        pure = jax.custom_jvp(lambda *flat: _united(plain(*flat), spec, flat[0]))

        @pure.defjvp
        def _(flat: Any, tangents: Any) -> Any:
            tangent, packed = both(flat, tangents)
            out, written = _united(packed, spec, flat[0])
            return (out, written), (tangent, zeros(written))

        out, written = pure(call.values, call.leaves, call.others)
        return close_call(call, Packed(spec, out, written))

    def _split(self, out: Any) -> tuple[Any, Any]:
        if not isinstance(out, tuple) or len(out) != 2:
            raise CustomRuleError(
                f"The rule of {self._name} must return (out, tangent_out), but it returned "
                f"{type(out).__name__}."
            )
        return out[1], out[0]

    def _tangents(self, forms: list[_Form], tangents: Any) -> tuple[Any, ...]:
        todo = iter(tangents[2])
        result = []
        for form in forms:
            others = [next(todo) for _ in range(form.others)]
            if form.treedef is not None:
                result.append(jax.tree.unflatten(form.treedef, others))
                continue
            moving = ((path, tangents[kind][i]) for path, kind, i, _ in form.items)
            result.append(Partition((path, t) for path, t in moving if _moves(t)))
        return tuple(result)


def _tangent_dtype(x: Any) -> Any:
    dtype = jnp.result_type(x)
    return dtype if jnp.issubdtype(dtype, jnp.inexact) else jax.dtypes.float0


def _moves(tangent: Any) -> bool:
    return all(x.dtype != jax.dtypes.float0 for x in jax.tree.leaves(tangent))
