"""How loops, batches and branches carry the probes that are active where they are called."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from nnx.probe.lifts import Carrying, body_of, named
from nnx.probe.probing import Key, suspended
from nnx.probe.records import Group, ProbeError, Record, blank, output_of
from nnx.transforms.carry import CARRY
from nnx.transforms.loops import scan, while_loop
from nnx.transforms.sharded import shard_map
from nnx.transforms.simple import eval_shape
from nnx.transforms.vmap import vmap
from refx import opened, refs, to_predicate
from refx.node import is_identity

__all__: list[str] = []


class Active(Carrying):
    """A context that calls any transformation."""

    def vmap(
        self, fn: Any, args: Any, kwargs: Any, in_axes: Any, out_axes: Any, **options: Any
    ) -> Any:
        """`nnx.vmap`: what is recorded is stacked along the leading axis, shared weights or not."""
        kind = type(self)
        axes = tuple(in_axes) if isinstance(in_axes, list | tuple) else (in_axes,) * len(args)
        if len(axes) != len(args):
            return suspended(vmap(fn, in_axes, out_axes, **options), *args, **kwargs)
        key = self.key
        name = options.pop("axis_name")
        name = f"lane {len(self.indices)} of a probe" if name is None else name

        def body(constants: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            lane = jax.lax.axis_index(name)
            with kind.begin(key, constants, inputs, lane, (args, kwargs)) as context:
                out = fn(*args, **kwargs)
            return out, context.groups()

        mapped = vmap(
            named(body, fn, 2), (None, 0, *axes), (out_axes, 0), axis_name=name, **options
        )
        out, groups = suspended(mapped, *self._payload(), *args, **kwargs)
        self.deliver(groups, "loop")
        return out

    def shard_map(
        self, fn: Any, args: Any, kwargs: Any, specs: Any, out_specs: Any, options: Any
    ) -> Any:
        """`nnx.shard_map`: what is recorded is stacked along the leading axis, shard by shard."""
        kind = type(self)
        each = tuple(specs) if isinstance(specs, list) or type(specs) is tuple else None
        each = (specs,) * len(args) if each is None else each
        mesh = options.get("mesh") or jax.sharding.get_abstract_mesh()
        names = tuple(options.get("axis_names") or mesh.axis_names)
        key, over = self.key, PartitionSpec(names)

        def body(constants: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            inputs = jax.tree.map(lambda x: x[0], inputs)
            shard = jax.lax.axis_index(names)
            with kind.begin(key, constants, inputs, shard, (args, kwargs)) as context:
                out = fn(*args, **kwargs)
            return out, jax.tree.map(lambda x: jnp.asarray(x)[None], context.groups())

        sharded = shard_map(
            named(body, fn, 2),
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
            _step(type(self), f, self.key),
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
            step = named(lambda val, i: (body(i, val), None), body, 0)
            steps = jnp.arange(lower, max(lower, upper))
            return self.scan(step, init, steps, None, False, unroll or 1, None)[0]
        upper = jnp.asarray(upper)
        _, val = self.while_loop(
            lambda c: c[0] < upper,
            named(lambda c: (c[0] + 1, body(*c)), body, 0),
            (jnp.asarray(lower), init),
        )
        return val

    def while_loop(self, cond_fun: Any, body_fun: Any, init: Any) -> Any:
        """`nnx.while_loop`: the last step is recorded, or the first one that is not finite."""
        kind = type(self)
        key, constants = self.key, self.constants()
        inputs = self._nothing()
        shapes = suspended(
            eval_shape,
            lambda c, v: body_of(kind, body_fun, key)((c, inputs), v)[1],
            constants,
            init,
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
            with kind.begin(key, constants, [None] * len(keep)):
                return cond_fun(val)

        def body(carry: Any) -> Any:
            val, constants, (step, at), old = carry
            val, new = body_of(kind, body_fun, key)((constants, [None] * len(keep)), val)
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
        loop = (named(condition, cond_fun, 0), named(body, body_fun, 0), first)
        val, _, (_, at), groups = suspended(while_loop, *loop)
        self.deliver([group.of("while", at) for group in groups], "while")
        return val

    # ---- branches

    def switch(self, call: Any, branches: tuple[Any, ...], operands: Any) -> Any:
        """`nnx.cond` and `nnx.switch`; `call` takes branches and operands.

        What a branch has that another lacks is nan, 0 or False where that one is taken. One place is
        for what several branches record alike.
        """
        kind = type(self)
        key, constants = self.key, self.constants()
        nothing = self._nothing()
        shapes = [
            suspended(
                eval_shape,
                lambda c, *args, fn=fn: body_of(kind, fn, key)((c, nothing), *args)[1],
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
                out, groups = body_of(kind, fn, key)((constants, given), *args)
                filled = []
                for group, at, kinds in zip(groups, place, slots, strict=True):
                    values = dict(zip(at, (r.value for r in group.records()), strict=True))
                    blanks = enumerate(kinds)
                    parts = [values[n] if n in values else _blanks(r) for n, r in blanks]
                    filled.append(Group([r.of(v) for r, v in zip(kinds, parts, strict=True)]))
                return out, filled

            return named(body, fn)

        bodies = [branch(*parts) for parts in zip(branches, shapes, places, strict=True)]
        out, groups = suspended(call, bodies, (constants, inputs), *operands)
        self.deliver(groups)
        return out


def _step(kind: Any, f: Any, key: Key) -> Any:
    def body(carry: Any, x: Any) -> Any:
        (carry, constants), (x, inputs, index) = carry, x
        with kind.begin(key, constants, inputs, index, x) as context:
            out = f(carry, x)
        if not isinstance(out, tuple) or len(out) != 2:
            return out  # which is an error of the loop
        return (out[0], constants), (out[1], context.groups())

    return named(body, f, 0)


def _length(xs: Any, length: int | None, axes: dict[Any, Any]) -> int | None:
    """The length of a scan; None where `nnx.scan` itself raises."""
    if length is not None:
        return length
    rules = [(to_predicate(f), axis) for f, axis in axes.items()]
    for x in opened.leaves(xs):
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
