"""Custom derivative rules: `nnx.custom_vjp` and `nnx.custom_jvp`.

The rules see modules and Refs, as the function does. JAX wants a cotangent or a tangent for each array;
for an argument that holds Refs, the rules use a Partition of them, by path.

JAX may run a rule long after the call, when it differentiates a program that it kept. So every Ref that
the function or a rule closes over is an input of the function that JAX sees (mode "lift"). A rule then
reads the value from that call, and not what the Ref happens to hold now.
"""

from __future__ import annotations

import functools
import inspect
import threading
import types
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from nnx._ambient import ambient
from nnx.transforms.boundary import check_lifted, close_call, run, until_lifted
from nnx.transforms.call import Call, Roots, Values, open_call
from nnx.transforms.callables import function_name
from nnx.transforms.custom_arguments import (
    CustomRuleError,
    Fixed,
    closed_positions,
    cotangents_of,
    forms_of,
    moving,
)
from nnx.transforms.result import Packed, Spec
from nnx.transforms.targets import Place, Target, shapes, text, zero_tangent
from refx import opened
from refx.node import is_identity
from refx.partition import dotted

__all__ = ["CustomRuleError", "custom_jvp", "custom_vjp"]


class _Learning(threading.local):
    """The functions whose rules this thread is trying."""

    def __init__(self) -> None:
        self.rules: list[_Custom] = []


_learning = _Learning()


class _Custom:
    """The part that both kinds of rule share."""

    kind = ""
    # The user's rule, if this one is a copy of it with probes inside.
    _stands_for: _Custom | None = None

    def __init__(self, fn: Callable[..., Any], nondiff_argnums: int | Sequence[int] = ()):
        self._fn = fn
        one = isinstance(nondiff_argnums, int)
        self._fixed: tuple[int, ...] = (nondiff_argnums,) if one else tuple(nondiff_argnums)  # pyright: ignore
        self._name = f"{self.kind}({function_name(fn)})"
        functools.update_wrapper(self, fn, updated=())

    def _divide(self, args: tuple[Any, ...]) -> tuple[list[Any], tuple[Any, ...]]:
        numbers = self._numbers(len(args))
        fixed = [args[i] for i in numbers]
        return fixed, tuple(a for i, a in enumerate(args) if i not in numbers)

    def _whole(self, args: tuple[Any, ...], fixed: list[Any]) -> list[Any]:
        count = len(args) + len(fixed)
        todo, kept = iter(args), dict(zip(self._numbers(count), fixed, strict=True))
        return [kept[i] if i in kept else next(todo) for i in range(count)]

    def _numbers(self, count: int) -> list[int]:
        wrong = [i for i in self._fixed if not -count <= i < count]
        if wrong:
            raise CustomRuleError(
                f"{self._name} has nondiff_argnums={self._fixed}, but was called with {count} "
                f"arguments."
            )
        return [i % count for i in self._fixed]

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self if instance is None else types.MethodType(self, instance)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs:
            # The rules take all arguments by position.
            given = inspect.signature(self._fn).bind(*args, **kwargs)
            given.apply_defaults()
            if given.kwargs:
                raise CustomRuleError(
                    f"{self._name} got the keyword-only arguments {sorted(given.kwargs)}, which the "
                    f"rule would not see. Make them positional."
                )
            args = given.args
        if any(self in (rule, rule._stands_for) for rule in _learning.rules):
            # The rule calls its own function. While we try the rule, only its outputs and writes matter.
            return self._fn(*args)
        if ambient.probe is not None:
            return ambient.probe.custom(self, args)
        given, args = self._divide(args)
        fixed = Fixed(given, self._name)

        def attempt(roots: Roots) -> Any:
            call = open_call(args, {}, roots)
            flat = call.values, fixed.traced
            return self._call(call, args, fixed.without_values(), flat)

        return until_lifted(attempt)

    def _call(self, call: Call, args: tuple[Any, ...], fixed: Fixed, flat: Any) -> Any:
        raise CustomRuleError(f"{self._name} has no rule.")

    def _plain(self, call: Call, fixed: Fixed) -> Callable[..., Packed]:
        fn, bare = self._fn, call.without_values()
        return lambda values, traced: run(
            lambda *args: fn(*self._whole(args, fixed.whole(traced))),
            self._name,
            bare,
            values,
            runs_once=False,
        )

    def _learn(self, call: Call, flat: Any, *bodies: Callable[..., Packed]) -> Spec:
        """The Refs that any of the bodies writes. All bodies must leave the same structure."""
        _learning.rules.append(self)
        try:
            found = [jax.eval_shape(body, *flat) for body in bodies]
        finally:
            _learning.rules.pop()
        check_lifted(call)
        return Spec(tuple(sorted({i for p in found for i in p.spec.written})), found[0].spec.graph)

    def _missing(self, method: str) -> CustomRuleError:
        return CustomRuleError(
            f"{self._name} was called, but its rule is not defined. Define it with "
            f"{function_name(self._fn)}.{method}."
        )


def _united(packed: Packed, spec: Spec, values: Values) -> tuple[Any, list[Any]]:
    return packed.out, packed.united(spec.written, values)


class custom_vjp(_Custom):
    """A function with its own rule for reverse-mode differentiation.

    Args:
      fn: the function. Its positional arguments may be modules, Refs and arrays, and it may write
        Refs. Closed-over Refs are constants of the differentiation.
      nondiff_argnums: positions of arguments that are not differentiated: settings, functions, or
        arrays, which may be traced. The backward rule gets them first.

    Define the rules with `defvjp(fwd, bwd)`. `fwd(*args)` returns `(out, residuals)`, where the
    residuals are any pytree of values. `bwd(*nondiff, residuals, cotangent)` returns a tuple with one
    cotangent for each differentiable argument. For an argument that holds Refs, the cotangent is a
    Partition or another mapping by path; missing paths are zero. None stands for all zeros.

    Raises:
      CustomRuleError: the rule is not defined; it returns the wrong number of cotangents, an unknown
        path or a wrong shape; or an argument in `nondiff_argnums` is differentiated.

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

    def _call(self, call: Call, args: tuple[Any, ...], fixed: Fixed, flat: Any) -> Any:
        if self._rules is None:
            raise self._missing("defvjp(fwd, bwd)")
        fwd, bwd = self._rules
        plain, bare = self._plain(call, fixed), call.without_values()
        forms = forms_of(call, args)
        counts = tuple(map(len, call.values))
        closed = closed_positions(call)

        def forward(values: Values, traced: list[Any]) -> tuple[Any, Packed]:
            rest, packed = run(
                lambda *args: fwd(*self._whole(args, fixed.whole(traced))),
                self._name,
                bare,
                values,
                runs_once=False,
                split_out=self._split,
            )
            known = [values.refs[i] for i in closed]
            return (rest, known, values.plain_arrays, traced), packed

        def backward(residuals: Any, cotangent: Any) -> tuple[Values, list[Any]]:
            rest, known, arrays, traced = residuals
            refs: list[Any] = [None] * counts[0]
            for i, value in zip(closed, known, strict=True):
                refs[i] = value
            # The arguments are gone by now; only the Refs that the rule closes over are left.
            packed = run(
                lambda *_: bwd(*fixed.whole(traced), rest, cotangent),
                self._name,
                bare,
                Values(refs, arrays, [None] * counts[2]),
                runs_once=False,
            )
            if packed.spec.written or packed.spec.graph is not None:
                raise CustomRuleError(
                    f"The backward rule of {self._name} changed or returned a Ref or a module. JAX runs "
                    f"it as often as needed, or never: write in the forward rule, and return only "
                    f"cotangents."
                )
            return self._cotangents(forms, counts, packed.out), [None] * len(traced)

        def gradient(*flat: Any) -> Packed:
            residuals, packed = forward(*flat)
            # If the output holds modules, the user's cotangent looks different; JAX's has this form.
            zeros = jax.tree.map(zero_tangent, packed.out)
            if not call.found:
                backward(residuals, zeros)
            return packed

        spec = self._learn(call, flat, plain, gradient)

        def pure_fwd(*flat: Any) -> Any:
            residuals, packed = forward(*flat)
            return _united(packed, spec, flat[0]), residuals

        def pure_bwd(residuals: Any, cotangents: Any) -> Any:
            return backward(residuals, cotangents[0])

        pure = jax.custom_vjp(lambda *flat: _united(plain(*flat), spec, flat[0]))
        pure.defvjp(pure_fwd, pure_bwd)
        out, written = pure(*flat)
        return close_call(call, Packed(spec, out, written))

    def _split(self, out: Any) -> tuple[Any, Any]:
        if not isinstance(out, tuple) or len(out) != 2:
            raise CustomRuleError(
                f"The forward rule of {self._name} must return (out, residuals), but it returned "
                f"{type(out).__name__}."
            )
        held = opened.leaves(out[1])
        if any(map(is_identity, held)):
            raise CustomRuleError(
                f"The residuals of {self._name} hold a module or a Ref, but it will be gone when "
                f"the backward rule runs. Return values instead, such as model['params']."
            )
        return out[1], out[0]

    def _cotangents(self, forms: list[Target], counts: tuple[int, ...], given: Any) -> Values:
        """A cotangent for each value of the call; None means zero."""
        if not isinstance(given, tuple | list) or len(given) != len(forms):
            count = len(given) if isinstance(given, tuple | list) else type(given).__name__
            raise CustomRuleError(
                f"The backward rule of {self._name} must return a tuple of {len(forms)} "
                f"cotangents, one for each differentiable argument, but it returned {count}."
            )
        flat = Values(*[[None] * n for n in counts])
        for number, (form, cotangent) in enumerate(zip(forms, given, strict=True)):
            what = f"The backward rule of {self._name} returned a cotangent for argument {number}"
            for place, value in zip(form.places, cotangents_of(form, cotangent, what), strict=True):
                if value is None:
                    continue
                self._check(what, place, value, form.treedef is None)
                before = flat[place.kind][place.number]
                # The cotangent of a Ref that two arguments share is the sum of both.
                flat[place.kind][place.number] = (
                    value if before is None else jax.tree.map(jnp.add, before, value)
                )
        return flat

    def _check(self, what: str, place: Place, cotangent: Any, named: bool) -> None:
        zero = jax.tree.map(zero_tangent, place.value)
        if shapes(cotangent) != shapes(zero):
            where = f" at {dotted(place.path)!r}" if named else ""
            raise CustomRuleError(
                f"{what}{where} of {text(cotangent)}, but it must be {text(zero)}, like the value."
            )


class custom_jvp(_Custom):
    """A function with its own rule for differentiation, forward and reverse.

    Args:
      fn: the function. Its positional arguments may be modules, Refs and arrays, and it may write
        Refs. Closed-over Refs are constants of the differentiation.
      nondiff_argnums: positions of arguments that are not differentiated: settings, functions, or
        arrays, which may be traced. The rule gets them first.

    Define the rule with `defjvp(rule)`. `rule(*nondiff, primals, tangents)` returns
    `(out, tangent_out)`. The tangent of an argument that holds Refs is a Partition of all its
    floating-point values.

    Raises:
      CustomRuleError: the rule is not defined, or does not return a pair; or an argument in
        `nondiff_argnums` is differentiated.

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
        """Define the rule and return it, so that this also works as a decorator."""
        self._rule = rule
        return rule

    def _call(self, call: Call, args: tuple[Any, ...], fixed: Fixed, flat: Any) -> Any:
        rule = self._rule
        if rule is None:
            raise self._missing("defjvp(rule)")
        plain, bare = self._plain(call, fixed), call.without_values()
        forms = list(map(moving, forms_of(call, args)))

        def both(flat: Any, tangents: Any) -> tuple[Any, Packed]:
            values, traced = flat
            given = tuple(form.named(form.take(tangents[0])) for form in forms)
            return run(
                lambda *primals: rule(*fixed.whole(traced), primals, given),
                self._name,
                bare,
                values,
                runs_once=False,
                split_out=self._split,
            )

        def zeros(flat: Any) -> Any:
            return jax.tree.map(zero_tangent, flat)

        spec = self._learn(call, flat, plain, lambda *flat: both(flat, zeros(flat))[1])
        pure = jax.custom_jvp(lambda *flat: _united(plain(*flat), spec, flat[0]))

        @pure.defjvp
        def _(flat: Any, tangents: Any) -> Any:
            tangent, packed = both(flat, tangents)
            out, written = _united(packed, spec, flat[0])
            return (out, written), (tangent, zeros(written))

        out, written = pure(*flat)
        return close_call(call, Packed(spec, out, written))

    def _split(self, out: Any) -> tuple[Any, Any]:
        if not isinstance(out, tuple) or len(out) != 2:
            raise CustomRuleError(
                f"The rule of {self._name} must return (out, tangent_out), but it returned "
                f"{type(out).__name__}."
            )
        return out[1], out[0]
