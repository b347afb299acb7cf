"""`nnx.jit_filter`: value semantics, with a choice leaf by leaf.

Modules go in and fresh modules come out; the caller's modules do not change. `filter_fn` and
`filter_tree` say for each leaf, and not just for each argument, whether it is traced.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any, ParamSpec, TypeVar, overload

import jax

from nnx._ambient import ambient
from nnx.transforms.arguments import ArgumentError
from nnx.transforms.axes import assign
from nnx.transforms.boundary import reachable, run, write_back
from nnx.transforms.call import Call, Values, open_call
from nnx.transforms.callables import function_name, unbound
from nnx.transforms.closure import Closure
from nnx.transforms.compiled import Compiled
from nnx.transforms.donation import check_alive
from nnx.transforms.exported import check_draws_nothing, exportable
from nnx.transforms.filtered.leaves import example, is_array, says, spread
from nnx.transforms.layout import Plans
from nnx.transforms.naming import inputs_of, named
from nnx.transforms.result import NewValues, Packed, Spec, fresh_output
from nnx.transforms.statics import Statics, select_arguments
from nnx.transforms.targets import locate
from refx import TraceLevelError, UnhashableStaticError
from refx.dagdef import ref_numbers
from refx.static import Static

__all__ = ["jit_filter"]

P = ParamSpec("P")
R = TypeVar("R")


@overload
def jit_filter(
    fn: Callable[P, R],
    *,
    filter_fn: Callable[[Any], bool] | None = None,
    filter_tree: Any = None,
    static_argnums: int | Iterable[int] | None = None,
    static_argnames: str | Iterable[str] | None = None,
    donate_argnums: int | Iterable[int] | None = None,
    donate_argnames: str | Iterable[str] | None = None,
    **options: Any,
) -> _JitFilter[P, R]: ...
@overload
def jit_filter(
    fn: None = None,
    *,
    filter_fn: Callable[[Any], bool] | None = None,
    filter_tree: Any = None,
    static_argnums: int | Iterable[int] | None = None,
    static_argnames: str | Iterable[str] | None = None,
    donate_argnums: int | Iterable[int] | None = None,
    donate_argnames: str | Iterable[str] | None = None,
    **options: Any,
) -> Callable[[Callable[P, R]], _JitFilter[P, R]]: ...
def jit_filter(
    fn: Callable[..., Any] | None = None,
    *,
    filter_fn: Callable[[Any], bool] | None = None,
    filter_tree: Any = None,
    static_argnums: int | Iterable[int] | None = None,
    static_argnames: str | Iterable[str] | None = None,
    donate_argnums: int | Iterable[int] | None = None,
    donate_argnames: str | Iterable[str] | None = None,
    **options: Any,
) -> Any:
    """Compile a function with value semantics. Each leaf is either traced or static.

    The function gets copies of the modules in its arguments, which it may write and return. Every
    module in its output is fresh, even one that came in. Closed-over Refs are inputs and must not be
    written. The streams of the ambient scope advance.

    Args:
      fn: the function, a module, or a bound method of a module.
      filter_fn: a function from leaf to bool that says whether to trace the leaf. By default, arrays
        and the values of Refs are traced; numbers, strings and callables in the arguments are static.
      filter_tree: a pytree prefix of the positional arguments with bools that decide instead. In
        place of a bool, it may have a function from leaf to bool, or, for a module, a dict from filter
        to bool. If `filter_fn` is given too, a leaf is traced if both say so.
      static_argnums, static_argnames: arguments that are static as a whole, as for `jax.jit`.
      donate_argnums, donate_argnames: arguments whose arrays the program may reuse for its results,
        as for `jax.jit`. The arrays are gone afterwards, even from a module that holds them.
      **options: `inline`, `keep_unused`, `compiler_options` and so on, as for `jax.jit`.

    Returns:
      A function like `fn`, with `.trace` and `.lower` as on `jax.jit`. `jax.export.export` takes it.

    Raises:
      UnhashableStaticError: a static leaf cannot be hashed; for example, it is an array.
      TraceLevelError: the function writes a Ref that it closes over.
      ArgumentError: the function does not have an argument of that number or name.
      DonationError: the function uses an array that was donated before.

    >>> import jax.numpy as jnp, nnx
    >>> @nnx.jit_filter
    ... def bump(counter, by, mode):
    ...     counter.value += by if mode == "up" else -by
    ...     return counter
    >>> counter = nnx.Ref(jnp.array(1))
    >>> int(bump(counter, jnp.array(2), "up").value), int(counter.value)
    (3, 1)
    """
    given = {
        "filter_fn": filter_fn,
        "filter_tree": filter_tree,
        "static_argnums": static_argnums,
        "static_argnames": static_argnames,
        "donate_argnums": donate_argnums,
        "donate_argnames": donate_argnames,
    }
    if fn is None:
        return functools.partial(jit_filter, **given, **options)  # pyright: ignore
    for name in ("in_shardings", "out_shardings"):
        if name in options:
            raise TypeError(
                f"nnx.jit_filter has no {name}, since it divides each argument into its leaves. Use "
                f"nnx.jit, or jax.lax.with_sharding_constraint inside the function."
            )
    return _JitFilter(fn, options, **given)


# Marks a donated leaf in the static argument of the program.
_DONATED = Static("donated")


def _labels(call: Call) -> tuple[Any, ...]:
    """The inputs of a program, from which they get their names: leaves of the values of the call."""
    (_, fixed), *_ = call.filtered
    items = zip(inputs_of(call), call.values, strict=True)
    inputs = [
        x
        for at, value in chain.from_iterable(zip(*pair, strict=True) for pair in items)
        for x in [at] * len(jax.tree.leaves(value))
    ]
    donated = [at for at, x in zip(inputs, fixed, strict=True) if x is _DONATED]
    dynamic = [at for at, x in zip(inputs, fixed, strict=True) if x is None]
    return "layout", "static", donated, dynamic


class _JitFilter(Compiled[P, R]):
    _kind = "jit_filter"

    def __init__(
        self,
        fn: Any,
        options: dict[str, Any],
        *,
        filter_fn: Any,
        filter_tree: Any,
        static_argnums: Any,
        static_argnames: Any,
        donate_argnums: Any,
        donate_argnames: Any,
    ):
        self._fn, self._bound = unbound(fn)
        self._name = f"nnx.jit_filter({function_name(fn)})"
        self._filter_fn = filter_fn
        self._filter_tree = filter_tree
        bound = len(self._bound)
        self._static = Statics(self._name, self._fn, static_argnums, static_argnames, bound=bound)
        self._donate = select_arguments(
            self._name, self._fn, donate_argnums, donate_argnames, bound=bound, option="donate"
        )
        both = self._static.nums & self._donate[0] or self._static.names & self._donate[1]
        if both:
            raise ArgumentError(
                f"{self._name} cannot donate an argument that is static: {sorted(both)[0]!r}."
            )
        # Versions of this function by the probes that were active in a call, and what makes one.
        self._probed: dict[Any, _JitFilter] = {}
        self.options = options
        numbers = (static_argnums,) if isinstance(static_argnums, int) else static_argnums or ()
        self.given: dict[str, Any] = {
            "filter_fn": filter_fn,
            "filter_tree": filter_tree,
            "static_argnums": tuple(n + bound if n >= 0 else n for n in numbers),
            "static_argnames": static_argnames,
        }
        self._closure = Closure(self._fn)
        self._plans = Plans()

        def pure(layout: Any, static: Any, donated: Any, dynamic: Any) -> Packed:
            return self._run(layout, static, donated, dynamic)

        pure = named(pure, self._fn, labels=_labels)
        self._compiled = jax.jit(pure, static_argnums=(0, 1), donate_argnums=2, **options)
        functools.update_wrapper(self, self._fn, updated=())

    def _run(self, layout: Any, static: Any, donated: Any, dynamic: Any) -> Packed:
        call: Call = ambient.call
        treedef, fixed = static
        gone, todo = iter(donated), iter(dynamic)
        flat = [
            next(todo) if x is None else next(gone) if x is _DONATED else x.value for x in fixed
        ]
        values = jax.tree.unflatten(treedef, flat)
        marks = jax.tree.unflatten(treedef, fixed) if donated else None
        return run(
            self._static.restore(self._fn, layout.statics),
            self._name,
            call,
            values,
            layout=layout,
            finish=functools.partial(self._finish, layout, values, marks),
        )

    def _finish(
        self, layout: Any, values: Values, marks: Any, packed: Packed, outline: NewValues
    ) -> Packed:
        self._check_closed(layout, packed)
        if marks is None:
            return packed
        # A donated buffer is gone, so a value that the output holds must be an output of the program.
        gone = [
            {i for i, mark in enumerate(marks[kind]) if _DONATED in jax.tree.leaves(mark)}
            for kind in (0, 1)
        ]
        written = packed.values()
        written |= {i: values.refs[i] for i in gone[0] if i not in written}
        order, graph, out = tuple(sorted(written)), packed.spec.graph, packed.out
        if graph is not None:
            fresh, arrays = out
            todo = iter(arrays)
            arrays = [
                next(todo) if i is None else values.plain_arrays[i]
                for i in graph.leaves
                if i is None or i in gone[1]
            ]
            kept = tuple(None if i in gone[1] else i for i in graph.leaves)
            graph, out = graph._replace(leaves=kept), (fresh, arrays)
        return Packed(Spec(order, graph), out, [written[i] for i in order])

    def _check_closed(self, layout: Any, packed: Packed) -> None:
        closed = self._numbers(layout, len(layout.form.where), layout.closed)
        for i in packed.spec.written:
            if i in closed:
                raise TraceLevelError(
                    f"{layout.name_of(i)} was written inside {self._name}, which closes over it. A "
                    f"filtered transformation has value semantics: pass the module as an argument "
                    f"and return it, or use nnx.jit, whose updates propagate."
                )

    @staticmethod
    def _numbers(layout: Any, start: int, count: int) -> set[int]:
        """The positions of the Refs that some of the roots reach."""
        reach = reachable(layout.dagdef, range(start, start + count))
        refs = ref_numbers(layout.dagdef)
        return {i for i, n in enumerate(refs) if n in reach}

    def _masked(self, call: Call, args: Any, kwargs: Any, tree: Any) -> list[bool]:
        """Whether each leaf of the flat lists is traced."""
        said: Any = ([True] * len(items) for items in call.values)
        if tree is not None:
            said = assign(
                call,
                args,
                kwargs,
                (*[True] * len(self._bound), *tree),
                name=self._name,
                keyword=True,
                ambient=lambda path, ref: True,
            ).values
        given = self._numbers(call.layout, 0, len(call.layout.form.where))
        mask = []
        for kind, (specs, items) in enumerate(zip(said, call.values, strict=True)):
            for i, (spec, x) in enumerate(zip(specs, items, strict=True)):
                by_fn = self._filter_fn
                if kind == 0 and i not in given:
                    by_fn = None
                elif by_fn is None and tree is None and kind != 0:
                    by_fn = is_array
                for part, leaf in spread(spec, x):
                    chosen = says(part, leaf, self._name)
                    mask.append(chosen and (by_fn is None or bool(by_fn(example(leaf)))))
        return mask

    def _donates(self, call: Call, args: Any, kwargs: Any, statics: Any) -> list[bool]:
        """Whether each leaf of the flat lists belongs to a donated argument."""
        marks = [[False] * len(items) for items in call.values]
        fixed = {i for i, _ in statics[1]} if statics is not None else set()
        count = len(args) + len(fixed)
        free = [i for i in range(count) if i not in fixed]
        nums = {n % count if n < 0 and count else n for n in self._donate[0]}
        everything = (*args, *(kwargs[k] for k in sorted(kwargs)))
        chosen = [i for i, number in enumerate(free) if number in nums]
        chosen += [len(args) + i for i, k in enumerate(sorted(kwargs)) if k in self._donate[1]]
        for number in chosen:
            for place in locate(call, everything, number).places:
                marks[place.kind][place.number] = True
        return [
            mark
            for at, items in zip(marks, call.values, strict=True)
            for mark, x in zip(at, items, strict=True)
            for _ in jax.tree.leaves(x)
        ]

    def _open(self, args: Any, kwargs: Any, abstract: bool | None = None) -> Call:
        args, bound = self._bound + args, len(self._bound)
        tree, statics = self._filter_tree, None
        if tree is not None and not isinstance(tree, tuple | list):
            tree = (tree,) * (len(args) - bound)
        if self._static.active:
            if tree is not None and len(tree) == len(args) - bound:
                fixed = self._static.numbers(args)
                tree = [x for i, x in enumerate(tree, bound) if i not in fixed]
            args, kwargs, statics = self._static.take(args, kwargs)
        options: Any = {"any_leaf": True, "abstract": abstract}
        call = open_call(args, kwargs, self._closure, self._plans, statics, **options)
        call.filtered = self._inputs(call, args, kwargs, tree, statics)
        return call

    def _trace(self, call: Call) -> None:
        self._compiled.trace(call.layout, *call.filtered)
        call.layout.traced = not call.found
        self._closure.traced()

    def _program(self, call: Call) -> tuple[Any, tuple[Any, ...], tuple[Any, ...]]:
        static, *inputs = call.filtered
        return self._compiled, (call.layout, static), tuple(inputs)

    def _exportable(
        self, call: Call, spec: Spec, bound: tuple[Any, ...], args: Any, kwargs: Any
    ) -> Any:
        fn, args = self._fn, self._bound + args
        if self._static.active:
            args, kwargs, statics = self._static.take(args, kwargs)
            fn = self._static.restore(fn, statics)
        self._check_exportable(call)
        check_draws_nothing(self._name, call, spec)
        bound = self._bound
        return exportable(fn, self._name, call, len(bound), args[len(bound) :], kwargs)

    def _check_exportable(self, call: Call) -> None:
        fixed = [x for x in call.filtered[0][1] if x is not None and x is not _DONATED]
        if fixed:
            raise ArgumentError(
                f"{self._name} was called with the static value {fixed[0]!r:.60}, but an exported program "
                f"takes only arrays. Name the argument in static_argnames, which leaves it out, close "
                f"over it, or pass an array."
            )

    def _close(self, call: Call, packed: Packed) -> Any:
        if packed.spec.graph is not None:
            # Refs that were not written come out as they came in, not from the program.
            passed = set(range(len(call.refs))) - set(packed.spec.written)
            check_alive(self._name, call, passed, packed.spec.graph.leaves)
        self._advance_streams(call, packed)
        return fresh_output(call, packed, call.values)

    def _inputs(
        self, call: Call, args: Any, kwargs: Any, tree: Any, statics: Any
    ) -> tuple[Any, list[Any], list[Any]]:
        flat, treedef = jax.tree.flatten(call.values)
        mask = self._masked(call, args, kwargs, tree)
        donated = [False] * len(flat)
        if any(self._donate):
            given = self._donates(call, args, kwargs, statics)
            arrays = [is_array(x) or isinstance(x, jax.ShapeDtypeStruct) for x in flat]
            donated = [all(said) for said in zip(given, mask, arrays, strict=True)]
        fixed = tuple(
            _DONATED if d else None if m else self._fixed(leaf)
            for d, m, leaf in zip(donated, mask, flat, strict=True)
        )
        gone = [leaf for d, leaf in zip(donated, flat, strict=True) if d]
        kept = [leaf for x, leaf in zip(fixed, flat, strict=True) if x is None]
        return (treedef, fixed), gone, kept

    def _advance_streams(self, call: Call, packed: Packed) -> None:
        if call.layout.has_scope:
            scope = self._numbers(call.layout, len(call.roots) - 1, 1)
            pairs = zip(packed.spec.written, packed.written, strict=True)
            new = {i: value for i, value in pairs if i in scope}
            write_back([call.refs[i] for i in new], new.values())

    def _fixed(self, leaf: Any) -> Static:
        try:
            hash(leaf)
        except TypeError:
            kind = f"{leaf.dtype}{list(leaf.shape)}" if is_array(leaf) else type(leaf).__name__
            raise UnhashableStaticError(
                f"filter_fn or filter_tree makes a leaf of {self._name} static, but its type is "
                f"{kind}, which cannot be hashed. Trace it, or pass a hashable value, such as a "
                f"tuple for an array."
            ) from None
        return Static(leaf)

    def __repr__(self) -> str:
        return f"<{self._name}>"
