"""How the nnx transformations carry the probes that are active around them.

While a probe is active, its context calls each transformation with another body. That body begins a new
context from its inputs (the arrays of patches, and the values to add to outputs). It returns the
records as one more output. So recorded values leave as outputs, the only way that JAX offers, and are
computed only once. A compiled function identifies the probe by its content.

Bodies of transformations that keep programs close over only the user's function and a `Key`.
Loops and branches are in `lift_loops`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from nnx.probe.probing import Context, Key, key_of, suspended
from nnx.probe.records import Group, ProbeError, Record, count, is_float, output_of
from nnx.transforms.callables import function_name
from nnx.transforms.custom import custom_jvp, custom_vjp
from nnx.transforms.differentiate import differentiate
from nnx.transforms.filtered.grad import _gradient as _filtered_gradient
from nnx.transforms.filtered.jit import _JitFilter
from nnx.transforms.grad import _gradient
from nnx.transforms.jitted import Jit
from nnx.transforms.simple import _transformed, eval_shape
from refx import Partition
from refx.node import is_identity

__all__: list[str] = []

# A jitted function keeps at most this many programs for different probes.
_MOST = 64


def named(body: Any, fn: Any, parameters: int = 1) -> Any:
    """Give a body the name and the signature of the function that it calls, after some extra parameters."""
    body.__qualname__ = body.__name__ = function_name(fn)
    body.__module__ = getattr(fn, "__module__", None)
    try:
        signature = inspect.signature(fn)
    except (TypeError, ValueError):
        return body
    more = [
        inspect.Parameter(f"_{i}", inspect.Parameter.POSITIONAL_ONLY) for i in range(parameters)
    ]
    body.__signature__ = signature.replace(parameters=[*more, *signature.parameters.values()])
    return body


def body_of(kind: Any, fn: Callable[..., Any], key: Key) -> Callable[..., Any]:
    """The body of a transformation of `fn`, which also returns the records."""

    def body(payload: Any, *args: Any, **kwargs: Any) -> Any:
        with kind.begin(key, *payload) as context:
            out = fn(*args, **kwargs)
        return out, context.groups()

    return named(body, fn)


def _silent(kind: Any, fn: Callable[..., Any], key: Key) -> Callable[..., Any]:
    """A body for abstract evaluation. Its records are dropped, because they have no values."""

    def body(constants: Any, *args: Any, **kwargs: Any) -> Any:
        with kind.begin(key, constants, [None] * len(key.probes)):
            return fn(*args, **kwargs)

    return named(body, fn)


def _with_aux(
    kind: Any, fn: Callable[..., Any], key: Key, payload: Any, has_aux: bool
) -> Callable[..., Any]:
    """A body that returns the records beside the function's aux."""

    def body(*args: Any, **kwargs: Any) -> Any:
        with kind.begin(key, *payload) as context:
            out = fn(*args, **kwargs)
        if not has_aux:
            return out, (None, context.groups())
        if not isinstance(out, tuple) or len(out) != 2:
            return out  # the transformation will raise an error
        return out[0], (out[1], context.groups())

    return named(body, fn, 0)


class Carrying(Context):
    """A context that calls transformations whose body runs once."""

    def constants(self) -> Any:
        """The arrays that a body needs. They are the same in every step and lane."""
        return jax.tree.map(
            lambda x: x if is_identity(x) else jnp.asarray(x),
            ([run.arrays for run in self.runs], self.indices),
            is_leaf=is_identity,
        )

    def _payload(self) -> Any:
        return self.constants(), self.inputs()

    def _nothing(self) -> list[None]:
        return [None] * len(self.runs)

    # ---- a body that runs once

    def jit(self, jitted: Any, args: Any, kwargs: Any) -> Any:
        """`nnx.jit`: a program for each probe."""
        key = self.key
        child = jitted._probed.get(key)
        if child is None:
            if len(jitted._probed) >= _MOST:
                jitted._probed.clear()
            _, statics, donate, (inputs, outputs), options, *bound = jitted._given
            if any(run.probe.quiet for run in self.runs):
                donate = None  # The caller continues with the originals of the copied call.
            shardings = inputs, None if outputs is None else (outputs, None)
            child = Jit(
                body_of(type(self), jitted._fn, key),
                statics,
                donate,
                shardings,
                options,
                sum(bound) + 1,
            )
            child.reason = "a probe (nnx.capture and its kin) is active around the call"
            child = jitted._probed.setdefault(key, child)
        out, groups = suspended(child, self._payload(), *args, **kwargs)
        self.deliver(groups)
        return out

    def whole(self, kind: str, fn: Any, args: Any, kwargs: Any, transform: Any) -> Any:
        """`nnx.remat`, `nnx.checkify`, `nnx.make_jaxpr`, `nnx.eval_shape`."""
        if kind in ("nnx.make_jaxpr", "nnx.eval_shape"):
            silent = _transformed(kind, _silent(type(self), fn, self.key), transform)
            return suspended(silent, self.constants(), *args, **kwargs)
        wrapped = _transformed(kind, body_of(type(self), fn, self.key), transform)
        result = suspended(wrapped, self._payload(), *args, **kwargs)
        if kind == "nnx.checkify":
            error, (out, groups) = result
            out = error, out
        else:
            out, groups = result
        self.deliver(groups)
        return out

    def jit_filter(self, jitted: Any, args: Any, kwargs: Any) -> Any:
        """`nnx.jit_filter`; its filters are for the user's arguments, so the payload is closed over."""
        payload = self._payload()
        body, key = body_of(type(self), jitted._fn, self.key), self.key
        child = jitted._probed.get(key) if not jax.tree.leaves(payload) else None
        if child is None:
            options = dict(jitted.given)
            if isinstance(options["filter_tree"], tuple | list):
                bound = [True] * len(jitted._bound)
                options["filter_tree"] = (*bound, *options["filter_tree"])
            closed = named(lambda *a, **k: body(payload, *a, **k), jitted._fn, 0)
            # Donate nothing, because a record may be one of the inputs.
            child = _JitFilter(
                closed, jitted.options, **options, donate_argnums=None, donate_argnames=None
            )
            if not jax.tree.leaves(payload) and len(jitted._probed) < _MOST:
                child = jitted._probed.setdefault(key, child)
        out, groups = suspended(child, *jitted._bound, *args, **kwargs)
        self.deliver(groups)
        return out

    def custom(self, rule: Any, args: Any) -> Any:
        """`nnx.custom_vjp` and `nnx.custom_jvp`: patches work, but outputs cannot be recorded
        because of the rules.
        """
        kind = type(self)
        key, name = self.key, rule._name

        def within(fn: Any) -> Any:
            def body(constants: Any, *args: Any) -> Any:
                with kind.begin(key, constants, [None] * len(key.probes)) as context:
                    out = fn(*args)
                for (probe, _), group in zip(key.probes, context.groups(), strict=True):
                    for record in group.records() if not probe.quiet else ():
                        raise ProbeError(
                            f"{output_of(record.path, record.label)} cannot be seen in {name}: "
                            "only the outputs that its rule knows leave the function. Do not "
                            "select the module, or call it outside the function."
                        )
                return out

            return named(body, fn)

        numbers = [i % len(args) + 1 for i in rule._fixed]
        new = type(rule)(within(rule._fn), numbers)
        new._stands_for = rule
        fixed = len(numbers)
        if isinstance(rule, custom_vjp) and isinstance(new, custom_vjp) and rule._rules is not None:
            fwd, bwd = rule._rules
            new.defvjp(within(fwd), lambda *given: (None, *bwd(*given)))
        if isinstance(rule, custom_jvp) and isinstance(new, custom_jvp) and rule._rule is not None:
            jvp = rule._rule

            def of_rule(*given: Any) -> Any:
                (constants, *primals), (_, *tangents) = given[fixed:]
                return within(jvp)(constants, *given[:fixed], tuple(primals), tuple(tangents))

            new.defjvp(of_rule)
        return suspended(new, self.constants(), *args)

    # ---- derivatives

    def gradient(
        self,
        kind: str,
        fn: Any,
        args: tuple[Any, ...],
        kwargs: Any,
        wrt: Any,
        argnums: Any,
        has_aux: bool,
        holomorphic: bool,
        allow_int: bool,
    ) -> Any:
        """`nnx.grad` and `nnx.value_and_grad`."""
        options = wrt, argnums, True, holomorphic, allow_int
        if args and any(run.probe.counts for run in self.runs):
            value, groups, grads = self._gradient_of_all(kind, fn, args, kwargs, has_aux, options)
        else:
            body = _with_aux(type(self), fn, self.key, self._payload(), has_aux)
            value, grads = suspended(_gradient(kind, body, *options), *args, **kwargs)
            value, (aux, groups) = value
            value = (value, aux) if has_aux else value
        self.deliver(groups)
        return value, grads

    def _gradient_of_all(
        self, label: str, fn: Any, args: Any, kwargs: Any, has_aux: bool, options: Any
    ) -> Any:
        """The gradient, also by the outputs of modules. For the latter, only nans and infinities
        are counted.
        """
        kind = type(self)
        key, (constants, inputs) = self.key, self._payload()
        finite = [probe.counts for probe, _ in key.probes]

        def having(**changes: Any) -> Key:
            probes = (
                (probe._replace(**changes) if is_finite else probe, base)
                for (probe, base), is_finite in zip(key.probes, finite, strict=True)
            )
            return key_of(tuple(probes), key.sliced)

        shapes = suspended(
            eval_shape,
            lambda *args, **kwargs: body_of(kind, fn, having(counts=False))(*args, **kwargs)[1],
            (constants, inputs),
            *args,
            **kwargs,
        )
        zeros = [zeros_like(group) if f else None for group, f in zip(shapes, finite, strict=True)]
        wrt, argnums, *rest = options
        numbers = (argnums,) if isinstance(argnums, int) else tuple(argnums)
        adding = having(adds=True)

        def body(*args: Any, **kwargs: Any) -> Any:
            *given_args, zeros = args
            given = [z if f else i for z, i, f in zip(zeros, inputs, finite, strict=True)]
            return _with_aux(kind, fn, adding, (constants, given), has_aux)(*given_args, **kwargs)

        both = _gradient(
            label, named(body, fn, 0), wrt, (*(n % len(args) for n in numbers), len(args)), *rest
        )
        (value, (aux, groups)), grads = suspended(both, *args, zeros, **kwargs)
        *grads, cotangents = grads
        for i, is_finite in enumerate(finite):
            if is_finite:
                backward = Group([_counted(cotangents[i])], "backward")
                parts = [r for n, g in zip(numbers, grads, strict=True) for r in _gradients(g, n)]
                groups[i] = Group([*groups[i].items, backward, *parts])
        value = (value, aux) if has_aux else value
        return value, groups, grads[0] if isinstance(argnums, int) else tuple(grads)

    def differentiate(
        self,
        kind: str,
        fn: Any,
        args: Any,
        kwargs: Any,
        numbers: Any,
        wrt: Any,
        has_aux: bool,
        allow_int: bool,
        transform: Any,
    ) -> Any:
        """`nnx.vjp`, `nnx.jvp`, `nnx.linearize`, and the Jacobians."""
        body = _with_aux(type(self), fn, self.key, self._payload(), has_aux)
        result, own, (aux, groups) = suspended(
            differentiate, kind, body, args, kwargs, numbers, wrt, True, allow_int, transform
        )
        self.deliver(groups)
        return result, own, aux

    def gradient_filter(
        self,
        kind: str,
        fn: Any,
        args: Any,
        kwargs: Any,
        filter_fn: Any,
        filter_tree: Any,
        argnums: Any,
        has_aux: bool,
    ) -> Any:
        """`nnx.grad_filter` and `nnx.value_and_grad_filter`."""
        body = _with_aux(type(self), fn, self.key, self._payload(), has_aux)
        both = _filtered_gradient(kind, body, filter_fn, filter_tree, argnums, True)
        (value, (aux, groups)), grads = suspended(both, *args, **kwargs)
        self.deliver(groups)
        return ((value, aux) if has_aux else value), grads


def zeros_like(group: Group) -> Group:
    """Zeros to add to recorded outputs: for each Record, a list with zeros for its leaves."""
    items = []
    for item in group.items:
        if isinstance(item, Group):
            items.append(zeros_like(item))
        else:
            zeros = [
                jnp.zeros(x.shape, x.dtype) for x in jax.tree.leaves(item.value) if is_float(x)
            ]
            items.append(item.of(zeros))
    return Group(items, group.kind)


def _counted(group: Group, loops: int = 0) -> Group:
    """Turn the cotangents of outputs into counts, for each step of the surrounding loops."""
    items: list[Any] = []
    counting: Any = count
    for _ in range(loops):
        counting = jax.vmap(counting)
    for item in group.items:
        if isinstance(item, Group):
            items.append(_counted(item, loops + (item.kind == "loop")))
        else:
            items.append(item.of(counting(item.value) if item.value else None))
    return Group(items, group.kind)


def _gradients(grads: Any, number: int) -> list[Record]:
    pairs = grads.items() if isinstance(grads, Partition) else [((f"argument {number}",), grads)]
    return [Record(path, "gradient", (), count(value)) for path, value in pairs]
