"""How each nnx transformation carries the probes that are active where it is called.

A transformation that is called while a probe is active is called by the `Active` context instead: with
a body that begins a context of its own from its inputs (the arrays of patches, what is added to
outputs), and that returns what was recorded in it as one more output. So a value leaves by the one way
that JAX has for it, it is computed once, and a compiled function knows the probe by its content.

Bodies of transformations that keep programs close over nothing but the user's function and a `Key`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from nnx._probing import Context, Key, Run, key_of, sliced_modules, suspended
from nnx._records import Group, ProbeError, Record, blank, count, is_float, output_of
from nnx.transforms.carry import CARRY
from nnx.transforms.custom import custom_jvp, custom_vjp
from nnx.transforms.derivatives import _differentiate
from nnx.transforms.filtered import _JitFilter, value_and_grad_filter
from nnx.transforms.grad import _gradient
from nnx.transforms.jit import Jit, function_name
from nnx.transforms.loops import scan, while_loop
from nnx.transforms.sharded import shard_map
from nnx.transforms.vmap import vmap
from nnx.transforms.whole import _transformed, eval_shape
from refx import Partition, refs, to_predicate
from refx.node import is_identity

__all__: list[str] = []

# A bound for the programs that one jitted function has for different probes.
_MOST = 64


def begin(key: Key, constants: Any, inputs: Any, loop: Any = None, args: Any = ()) -> Active:
    """The context of a body.

    Args:
      key: that of the context around it.
      constants: its arrays.
      inputs: what is added to outputs.
      loop: the number of the step or the lane, where the body is that of a loop that stacks.
      args: the arguments of such a body, to see which modules are slices.
    """
    arrays, indices = constants
    runs = [
        Run(probe, a, i, [f.bind(x) for f, x in zip(probe.patches, a, strict=True)], base)
        for (probe, base), a, i in zip(key.probes, arrays, inputs, strict=True)
    ]
    sliced = key.sliced
    if loop is not None:
        sliced = (*sliced, sliced_modules(args, sliced))
        indices = [*indices, loop]
    return Active(runs, list(indices), sliced)


def _named(body: Any, fn: Any, parameters: int = 1) -> Any:
    """A body with the name of the function that it calls, and its signature after some more."""
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


def _body(fn: Callable[..., Any], key: Key) -> Callable[..., Any]:
    def body(payload: Any, *args: Any, **kwargs: Any) -> Any:
        with begin(key, *payload) as context:
            out = fn(*args, **kwargs)
        return out, context.groups()

    return _named(body, fn)


def _silent(fn: Callable[..., Any], key: Key) -> Callable[..., Any]:
    """A body that is evaluated abstractly: what is recorded in it is no value."""

    def body(constants: Any, *args: Any, **kwargs: Any) -> Any:
        with begin(key, constants, [None] * len(key.probes)):
            return fn(*args, **kwargs)

    return _named(body, fn)


def _with_aux(fn: Callable[..., Any], key: Key, payload: Any, has_aux: bool) -> Callable[..., Any]:
    """A body that returns what was recorded beside the aux of the function."""

    def body(*args: Any, **kwargs: Any) -> Any:
        with begin(key, *payload) as context:
            out = fn(*args, **kwargs)
        if not has_aux:
            return out, (None, context.groups())
        if not isinstance(out, tuple) or len(out) != 2:
            return out  # which is an error of the transformation
        return out[0], (out[1], context.groups())

    return _named(body, fn, 0)


class Active(Context):
    """A context that calls transformations."""

    def __enter__(self) -> Active:
        super().__enter__()
        return self

    def constants(self) -> Any:
        """The arrays that a body needs: the same in every step and lane."""
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
        child = jitted.probed.get(key)
        if child is None:
            if len(jitted.probed) >= _MOST:
                jitted.probed.clear()
            _, statics, donate, (inputs, outputs), options, *bound = jitted._given
            if any(run.probe.quiet for run in self.runs):
                donate = None  # The caller goes on with what the copy of the call was made of.
            shardings = inputs, None if outputs is None else (outputs, None)
            child = Jit(_body(jitted._fn, key), statics, donate, shardings, options, sum(bound) + 1)
            child = jitted.probed.setdefault(key, child)
        out, groups = suspended(child, self._payload(), *args, **kwargs)
        self.deliver(groups)
        return out

    def whole(self, kind: str, fn: Any, args: Any, kwargs: Any, transform: Any) -> Any:
        """`nnx.remat`, `nnx.checkify`, `nnx.make_jaxpr`, `nnx.eval_shape`."""
        if kind in ("nnx.make_jaxpr", "nnx.eval_shape"):
            silent = _transformed(kind, _silent(fn, self.key), transform)
            return suspended(silent, self.constants(), *args, **kwargs)
        wrapped = _transformed(kind, _body(fn, self.key), transform)
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
        body, key = _body(jitted._fn, self.key), self.key
        child = jitted.probed.get(key) if not jax.tree.leaves(payload) else None
        if child is None:
            tree = jitted._filter_tree
            if isinstance(tree, tuple | list):
                tree = (*[True] * len(jitted._bound), *tree)
            closed = _named(lambda *a, **k: body(payload, *a, **k), jitted._fn, 0)
            child = _JitFilter(closed, jitted._filter_fn, tree, jitted._options)
            if not jax.tree.leaves(payload) and len(jitted.probed) < _MOST:
                child = jitted.probed.setdefault(key, child)
        out, groups = suspended(child, *jitted._bound, *args, **kwargs)
        self.deliver(groups)
        return out

    def custom(self, rule: Any, args: Any) -> Any:
        """`nnx.custom_vjp` and `nnx.custom_jvp`: patches act, but the rules fix the outputs."""
        key, name = self.key, rule._name

        def within(fn: Any) -> Any:
            def body(constants: Any, *args: Any) -> Any:
                with begin(key, constants, [None] * len(key.probes)) as context:
                    out = fn(*args)
                for (probe, _), group in zip(key.probes, context.groups(), strict=True):
                    for record in group.records() if not probe.quiet else ():
                        raise ProbeError(
                            f"{output_of(record.path, record.label)} cannot be seen in {name}: the "
                            f"outputs of the function are those of its rule. Do not select the module, "
                            f"or call it outside of the function."
                        )
                return out

            return _named(body, fn)

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
            body = _with_aux(fn, self.key, self._payload(), has_aux)
            value, grads = suspended(_gradient(kind, body, *options), *args, **kwargs)
            value, (aux, groups) = value
            value = (value, aux) if has_aux else value
        self.deliver(groups)
        return value, grads

    def _gradient_of_all(
        self, kind: str, fn: Any, args: Any, kwargs: Any, has_aux: bool, options: Any
    ) -> Any:
        """The gradient, with respect to the outputs of modules too, of which the nans are counted."""
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
            lambda *args, **kwargs: _body(fn, having(counts=False))(*args, **kwargs)[1],
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
            return _with_aux(fn, adding, (constants, given), has_aux)(*given_args, **kwargs)

        both = _gradient(
            kind, _named(body, fn, 0), wrt, (*(n % len(args) for n in numbers), len(args)), *rest
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
        """`nnx.vjp`, `nnx.jvp`, and the Jacobians."""
        body = _with_aux(fn, self.key, self._payload(), has_aux)
        result, own, (aux, groups) = suspended(
            _differentiate, kind, body, args, kwargs, numbers, wrt, True, allow_int, transform
        )
        self.deliver(groups)
        return result, own, aux

    def gradient_filter(
        self, fn: Any, args: Any, kwargs: Any, filter_fn: Any, filter_tree: Any, has_aux: bool
    ) -> Any:
        """`nnx.grad_filter` and `nnx.value_and_grad_filter`."""
        body = _with_aux(fn, self.key, self._payload(), has_aux)
        both = value_and_grad_filter(
            body, filter_fn=filter_fn, filter_tree=filter_tree, has_aux=True
        )
        (value, (aux, groups)), grads = suspended(both, *args, **kwargs)
        self.deliver(groups)
        return ((value, aux) if has_aux else value), grads

    # ---- loops and lanes

    def vmap(
        self, fn: Any, args: Any, kwargs: Any, in_axes: Any, out_axes: Any, **options: Any
    ) -> Any:
        """`nnx.vmap`: what is recorded is stacked along the leading axis, shared weights or not."""
        axes = tuple(in_axes) if isinstance(in_axes, list | tuple) else (in_axes,) * len(args)
        if len(axes) != len(args):
            return suspended(vmap(fn, in_axes, out_axes, **options), *args, **kwargs)
        key = self.key
        name = options.pop("axis_name")
        name = f"lane {len(self.indices)} of a probe" if name is None else name

        def body(constants: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            lane = jax.lax.axis_index(name)
            with begin(key, constants, inputs, lane, (args, kwargs)) as context:
                out = fn(*args, **kwargs)
            return out, context.groups()

        mapped = vmap(
            _named(body, fn, 2), (None, 0, *axes), (out_axes, 0), axis_name=name, **options
        )
        out, groups = suspended(mapped, *self._payload(), *args, **kwargs)
        self.deliver(groups, "loop")
        return out

    def shard_map(
        self, fn: Any, args: Any, kwargs: Any, specs: Any, out_specs: Any, options: Any
    ) -> Any:
        """`nnx.shard_map`: what is recorded is stacked along the leading axis, shard by shard."""
        each = tuple(specs) if isinstance(specs, list) or type(specs) is tuple else None
        each = (specs,) * len(args) if each is None else each
        mesh = options.get("mesh") or jax.sharding.get_abstract_mesh()
        names = tuple(options.get("axis_names") or mesh.axis_names)
        key, over = self.key, PartitionSpec(names)

        def body(constants: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            inputs = jax.tree.map(lambda x: x[0], inputs)
            shard = jax.lax.axis_index(names)
            with begin(key, constants, inputs, shard, (args, kwargs)) as context:
                out = fn(*args, **kwargs)
            return out, jax.tree.map(lambda x: jnp.asarray(x)[None], context.groups())

        sharded = shard_map(
            _named(body, fn, 2),
            in_specs=(PartitionSpec(), over, *each),
            out_specs=(out_specs, over),
            **options,
        )
        out, groups = suspended(sharded, *self._payload(), *args, **kwargs)
        self.deliver(groups, "loop")
        return out

    def scan(
        self, f: Any, init: Any, xs: Any, length: Any, reverse: bool, unroll: Any, axes: Any
    ) -> Any:
        """`nnx.scan`: what is recorded is stacked along the leading axis."""
        size = _length(xs, length, axes or {})
        if size is None:
            return suspended(scan, f, init, xs, length, reverse, unroll, axes=axes)
        constants, inputs = self._payload()
        (carry, _), (ys, groups) = suspended(
            scan,
            _step(f, self.key),
            (init, constants),
            (xs, inputs, jnp.arange(size)),
            length,
            reverse,
            unroll,
            axes=axes,
        )
        self.deliver(groups, "loop")
        return carry, ys

    def fori_loop(self, lower: Any, upper: Any, body: Any, init: Any, unroll: Any) -> Any:
        """`nnx.fori_loop`: a scan where the bounds are known, else a while loop."""
        if isinstance(lower, int) and isinstance(upper, int):
            step = _named(lambda val, i: (body(i, val), None), body, 0)
            steps = jnp.arange(lower, max(lower, upper))
            return self.scan(step, init, steps, None, False, unroll or 1, None)[0]
        upper = jnp.asarray(upper)
        _, val = self.while_loop(
            lambda c: c[0] < upper,
            _named(lambda c: (c[0] + 1, body(*c)), body, 0),
            (jnp.asarray(lower), init),
        )
        return val

    def while_loop(self, cond_fun: Any, body_fun: Any, init: Any) -> Any:
        """`nnx.while_loop`: the last step is recorded, or the first one that is not finite."""
        key, constants = self.key, self.constants()
        inputs = self._nothing()
        shapes = suspended(
            eval_shape, lambda c, v: _body(body_fun, key)((c, inputs), v)[1], constants, init
        )
        for run, group in zip(self.runs, shapes, strict=True):
            for record in group.records() if run.probe.adds and not run.probe.quiet else ():
                raise ProbeError(
                    f"{output_of(record.path, record.label)} is computed in nnx.while_loop, which JAX "
                    f"cannot differentiate backward. Use nnx.scan, or nnx.fori_loop with bounds that "
                    f"are Python numbers, or do not select the module."
                )
        before = jax.tree.map(blank, shapes)
        keep = tuple(probe.counts for probe, _ in key.probes)

        def condition(carry: Any) -> Any:
            val, constants, _, _ = carry
            with begin(key, constants, [None] * len(keep)):
                return cond_fun(val)

        def body(carry: Any) -> Any:
            val, constants, (step, at), old = carry
            val, new = _body(body_fun, key)((constants, [None] * len(keep)), val)
            kept = []
            for is_first, a, b in zip(keep, old, new, strict=True):
                if is_first:
                    # From the first step on that has something to tell, its counts stay.
                    stop = _any(a)
                    at = jnp.where(stop, at, step)
                    b = _where(stop, a, b)
                kept.append(b)
            return val, constants, (step + 1, at), kept

        zero = jnp.zeros((), jnp.int32)
        first = (init, constants, (zero, zero), before)
        loop = (_named(condition, cond_fun, 0), _named(body, body_fun, 0), first)
        val, _, (_, at), groups = suspended(while_loop, *loop)
        self.deliver([group.of("while", at) for group in groups], "while")
        return val

    # ---- branches

    def switch(self, call: Any, branches: tuple[Any, ...], operands: Any) -> Any:
        """`nnx.cond` and `nnx.switch`; `call` takes branches and operands.

        What a branch has that another lacks is nan, 0 or False where that one is taken. One place is
        for what several branches record alike.
        """
        key, constants = self.key, self.constants()
        nothing = self._nothing()
        shapes = [
            suspended(
                eval_shape,
                lambda c, *args, fn=fn: _body(fn, key)((c, nothing), *args)[1],
                constants,
                *operands,
            )
            for fn in branches
        ]
        slots, places = _slots(shapes, len(self.runs))
        inputs = self.inputs()

        def branch(fn: Any, like: Any, place: Any) -> Any:
            def body(payload: Any, *args: Any) -> Any:
                constants, inputs = payload
                given = [
                    None if i is None else _placed(group, [i.items[n].value for n in at])
                    for group, i, at in zip(like, inputs, place, strict=True)
                ]
                out, groups = _body(fn, key)((constants, given), *args)
                filled = []
                for group, at, kinds in zip(groups, place, slots, strict=True):
                    values = dict(zip(at, (r.value for r in group.records()), strict=True))
                    blanks = enumerate(kinds)
                    parts = [values[n] if n in values else _blanks(r) for n, r in blanks]
                    filled.append(Group([r.of(v) for r, v in zip(kinds, parts, strict=True)]))
                return out, filled

            return _named(body, fn)

        bodies = [branch(*parts) for parts in zip(branches, shapes, places, strict=True)]
        out, groups = suspended(call, bodies, (constants, inputs), *operands)
        self.deliver(groups)
        return out


def _step(f: Any, key: Key) -> Any:
    def body(carry: Any, x: Any) -> Any:
        (carry, constants), (x, inputs, index) = carry, x
        with begin(key, constants, inputs, index, x) as context:
            out = f(carry, x)
        if not isinstance(out, tuple) or len(out) != 2:
            return out  # which is an error of the loop
        return (out[0], constants), (out[1], context.groups())

    return _named(body, f, 0)


def _length(xs: Any, length: int | None, axes: dict[Any, Any]) -> int | None:
    """The length of a scan; None where that is an error of its own."""
    if length is not None:
        return length
    rules = [(to_predicate(f), axis) for f, axis in axes.items()]
    for x in jax.tree.leaves(xs, is_leaf=is_identity):
        # The rules are for Refs; arrays are sliced always.
        values = [x]
        if is_identity(x):
            values = [
                cell._value
                for path, cell in refs(x).items()
                if next((a for selects, a in rules if selects(path, cell)), 0) is not CARRY
            ]
        for leaf in jax.tree.leaves(values):
            if jnp.ndim(leaf):
                return jnp.shape(leaf)[0]
    return None


def _any(group: Group) -> jax.Array:
    found = [(x != 0).any() for x in jax.tree.leaves(group)]
    return jnp.stack(found).any() if found else jnp.array(False)


def _where(condition: jax.Array, a: Any, b: Any) -> Any:
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), a, b)


def _blanks(record: Record) -> Any:
    return jax.tree.map(blank, record.value)


def _slots(
    shapes: list[list[Group]], count: int
) -> tuple[list[list[Record]], list[list[list[int]]]]:
    """Places for all that branches record, by probe; and those of each branch's Records in order."""
    slots: list[list[Record]] = [[] for _ in range(count)]
    places: list[list[list[int]]] = [[] for _ in shapes]
    for level in range(count):
        known: dict[Any, int] = {}
        for groups, place in zip(shapes, places, strict=True):
            seen: dict[Any, int] = {}
            at = []
            for record in groups[level].records():
                leaves, treedef = jax.tree.flatten(record.value)
                kind = (record.key, treedef, tuple((x.shape, x.dtype) for x in leaves))
                seen[kind] = seen.get(kind, -1) + 1
                n = known.setdefault((kind, seen[kind]), len(slots[level]))
                if n == len(slots[level]):
                    slots[level].append(record)
                at.append(n)
            place.append(at)
    return slots, places


def _placed(group: Group, values: list[Any]) -> Group:
    """A Group like this with other values in its Records."""
    todo = iter(values)

    def placed(item: Any) -> Any:
        if isinstance(item, Group):
            return Group([placed(x) for x in item.items], item.kind)
        return item.of(next(todo))

    return placed(group)


def zeros_like(group: Group) -> Group:
    """Zeros to be added to what is recorded: in the place of each Record a list for its leaves."""
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
    """The cotangents of outputs as counts, for each step of the loops around them."""
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
