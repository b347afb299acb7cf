"""`purify`: a function with markers as a pure function of a dictionary of parameters."""

from __future__ import annotations

import difflib
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.extend.core import jaxpr_as_fun

from nnx.purify import custom, equations  # noqa: F401 — they tell `rewrite` about equations
from nnx.purify.distributions import normal_like, zeros_like
from nnx.purify.errors import (
    DuplicateNameError,
    MarkerError,
    MissingNameError,
    PurifyError,
    UnexpectedNameError,
)
from nnx.purify.markers import Spec, isolated
from nnx.purify.rewrite import Key, Program, rewrite
from nnx.purify.traces import Traces
from refx import DtypeError, ShapeError
from refx.text import a_kind

__all__ = ["Purified"]

T = TypeVar("T")


class _Traced:
    """A function traced for arguments of certain shapes, with the declarations of its markers."""

    def __init__(self, name: str, f: Callable[..., Any], args: Any):
        self.name = name
        traced = jax.make_jaxpr(isolated(f"purify({name})")(f), return_shape=True)
        self._closed, shape = traced(*args)
        self.treedef = jax.tree.structure(shape)
        # The program without the intermediates, and with them.
        self._programs: dict[bool, tuple[Program, Callable[..., Any]]] = {}
        self._compiled: dict[bool, Callable[..., Any]] = {}
        program, _ = self.program(False)
        self.names = _names(program)
        self._inputs = [(key.kind, self.names[key], s.spec) for key, s in program.sources.items()]
        self.params = self._of_kind("param")
        self.fixed = self._of_kind("fixed")

    def _of_kind(self, kind: str) -> dict[str, Spec]:
        # By name, because JAX orders dictionaries that way.
        return dict(sorted((name, spec) for k, name, spec in self._inputs if k == kind))

    def program(self, collect: bool) -> tuple[Program, Callable[..., Any]]:
        """The function without markers, as a function of leaves."""
        if collect not in self._programs:
            program = rewrite(self._closed.jaxpr, collect=collect)
            self._programs[collect] = program, jaxpr_as_fun(program.closed(self._closed.consts))
        return self._programs[collect]

    def closes_over_tracers(self) -> bool:
        """Whether this is valid only inside the current outer trace."""
        return any(isinstance(x, Tracer) for x in self._closed.consts)

    def run(self, collect: bool, params: Any, fixed: Mapping[str, Any], args: Any) -> list[Any]:
        """The outputs, followed by the intermediates if they are collected."""
        self._check_names("parameter", self.params, params, self.fixed)
        self._check_names("fixed value", self.fixed, fixed, self.params)
        given = {"param": params, "fixed": fixed}
        leaves = []
        for kind, name, spec in self._inputs:
            leaves += self._leaves(kind, name, spec, given[kind][name])
        outs = self.program(collect)[1](*leaves, *jax.tree.leaves(args))
        # A constant of the program is returned as a number.
        return [x if isinstance(x, jax.Array) else jnp.asarray(x) for x in outs]

    def compiled(self, collect: bool, f: Callable[..., Any]) -> Callable[..., Any]:
        """`f`, which runs this program, under `jax.jit`. It is made once and dropped together with
        this object.
        """
        if collect not in self._compiled:
            self._compiled[collect] = jax.jit(f)
        return self._compiled[collect]

    def _check_names(self, what: str, known: Any, given: Any, others: Any) -> None:
        if known.keys() == given.keys():
            return
        for name in known:
            if name not in given:
                how = "in the dictionary" if what == "parameter" else "by keyword"
                raise MissingNameError(
                    f"purify({self.name}) needs the {what} {name!r} ({known[name]}), but it was "
                    f"not given {how}. Given: {_listed(given)}."
                )
        for name in given:
            if name not in known:
                if name in others:
                    hint = f"It is a {'fixed value' if what == 'parameter' else 'parameter'}. "
                else:
                    close = difflib.get_close_matches(str(name), known, 1)
                    hint = f"Did you mean {close[0]!r}? " if close else ""
                raise UnexpectedNameError(
                    f"purify({self.name}) was given the {what} {name!r}, which it does not have. "
                    f"{hint}It has: {_listed(known)}."
                )

    def _leaves(self, kind: str, name: str, spec: Spec, value: Any) -> list[Any]:
        what = (
            f"{'Parameter' if kind == 'param' else 'Fixed value'} {name!r} of purify({self.name})"
        )
        if spec.treedef == _LEAF:
            # A list of numbers counts as an array here.
            paths, leaves = [""], [value]
        else:
            found, treedef = jax.tree_util.tree_flatten_with_path(value)
            if treedef != spec.treedef:
                raise ShapeError(
                    f"{what} was given as a pytree of another structure. Declared: {spec.treedef}; "
                    f"given: {treedef}."
                )
            paths = [jax.tree_util.keystr(path) for path, _ in found]
            leaves = [leaf for _, leaf in found]
        types = zip(paths, leaves, spec.shapes, spec.dtypes, strict=True)
        return [_fitted(what + path, *rest) for path, *rest in types]


_LEAF = jax.tree.structure(0)


def _fitted(what: str, value: Any, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """The value as an array of this shape and dtype. Raises if it does not fit."""
    if isinstance(value, jax.Array) and value.shape == shape and value.dtype == dtype:
        if not getattr(value, "weak_type", False):
            return value
    try:
        array = jnp.asarray(value)
    except (TypeError, ValueError):
        raise ShapeError(
            f"{what} was declared as {_type(shape, dtype)}, but got {value!r}."
        ) from None
    if array.shape != shape:
        raise ShapeError(
            f"{what} was declared with shape {shape}, but got an array of shape {array.shape}."
        )
    weak = getattr(array, "weak_type", False)
    if array.dtype == dtype:
        return jax.lax.convert_element_type(array, dtype) if weak else array
    extended = any(jnp.issubdtype(d, jax.dtypes.extended) for d in (array.dtype, dtype))
    # A Python number may become any dtype of its kind; an array only a dtype that loses nothing.
    if extended or not (
        jnp.promote_types(array.dtype, dtype) == dtype
        or (weak and jax.dtypes.result_type(array, dtype) == dtype)
    ):
        raise DtypeError(
            f"{what} was declared with dtype {dtype}, but got {array.dtype}, which does not fit. "
            f"Cast it, or declare the marker with dtype={array.dtype}."
        )
    return jax.lax.convert_element_type(array, dtype)


def _type(shape: tuple[int, ...], dtype: Any) -> str:
    return f"{dtype}[{','.join(map(str, shape))}]"


def _listed(names: Any) -> str:
    return ", ".join(map(repr, names)) or "nothing"


def _names(program: Program) -> dict[Key, str]:
    """The keys in the dictionary. Parameters without a name get a number."""
    names: dict[Key, str] = {}
    count: dict[str, int] = {}
    for key in program.sources:
        if key.name is not None:
            names[key] = str(key)
            continue
        number = count[key.prefix] = count.get(key.prefix, -1) + 1
        names[key] = f"{key.prefix}param_{number}"
        if any(k.kind == "param" and k.name and str(k) == names[key] for k in program.sources):
            raise DuplicateNameError(
                f"The parameter without a name would be called {names[key]!r}, but another one has "
                "that name. Give it a name."
            )
    return names


class Purified(Generic[T]):
    """The result of `purify`; see there.

    >>> from nnx.purify import Purified, param, purify
    >>> isinstance(purify(lambda: param(3, "x")), Purified)
    True
    """

    def __init__(self, f: Callable[..., T], *, ravel: bool = False, jit: bool = False):
        self._f = f
        self._name = getattr(f, "__qualname__", None) or repr(f)
        self._flat = ravel
        self._jit = jit
        self._traces = Traces(f, self._new_trace)
        # For traces that cannot be kept, with the semantics of `jax.jit`.
        self._fallback: Callable[..., Any] | None = None
        functools.update_wrapper(self, f, updated=())

    def _trace(self, args: Any) -> _Traced:
        return self._traces.get(args)

    def _new_trace(self, args: Any) -> _Traced:
        return _Traced(self._name, self._f, args)

    def _evaluate(self, collect: bool, params: Any, args: Any, fixed: Any) -> Any:
        if not self._jit:
            return self._run(self._trace(args), collect, params, args, fixed)
        traced = self._traces.get_kept(args)
        if traced is None:
            if self._fallback is None:
                self._fallback = jax.jit(functools.partial(self._run_traced), static_argnums=0)
            return self._fallback(collect, params, args, fixed)
        self._fallback = None
        run = functools.partial(self._run, traced, collect)
        return traced.compiled(collect, run)(params, args, fixed)

    def _run_traced(self, collect: bool, params: Any, args: Any, fixed: Any) -> Any:
        return self._run(self._new_trace(args), collect, params, args, fixed)

    def _run(self, traced: _Traced, collect: bool, params: Any, args: Any, fixed: Any) -> Any:
        out = traced.run(collect, self._as_dict(traced, params), fixed, args)
        if not collect:
            return jax.tree.unflatten(traced.treedef, out)
        program, _ = traced.program(True)
        if program.hidden:
            key, where = next(iter(program.hidden.items()))
            raise MarkerError(
                f"{key.call} of purify({self._name}) is inside {where}, so there is no single "
                "value to report. Return the value from there and mark it outside."
            )
        rest = iter(out[traced.treedef.num_leaves :])
        found = {
            str(key): jax.tree.unflatten(
                site.spec.treedef, [next(rest) for _ in range(site.spec.treedef.num_leaves)]
            )
            for key, site in program.sinks.items()
        }
        return dict(sorted(found.items()))

    def __call__(self, params: Any, /, *args: Any, **fixed: Any) -> T:
        """The function's result for these parameters, arguments and fixed values."""
        return self._evaluate(False, params, args, fixed)

    def intermediates(self, params: Any, /, *args: Any, **fixed: Any) -> dict[str, Any]:
        """The intermediates by name, for the same arguments as a call."""
        return self._evaluate(True, params, args, fixed)

    def shapes(self, *args: Any) -> Any:
        """The parameters as `jax.ShapeDtypeStruct`, by name."""
        params = self._trace(args).params
        if self._flat:
            dtypes = [d for spec in params.values() for d in spec.dtypes]
            size = sum(spec.size for spec in params.values())
            dtype = jnp.result_type(*dtypes) if dtypes else jax.dtypes.canonicalize_dtype(float)
            return jax.ShapeDtypeStruct((size,), dtype)
        return {name: spec.tree() for name, spec in params.items()}

    def fixed_shapes(self, *args: Any) -> dict[str, Any]:
        """The fixed values as `jax.ShapeDtypeStruct`, by name."""
        return {name: spec.tree() for name, spec in self._trace(args).fixed.items()}

    def zeros(self, *args: Any) -> Any:
        """Parameters that are all zero."""
        return zeros_like(self.shapes(*args))

    def normal(self, key: jax.Array, *args: Any) -> Any:
        """Parameters from a standard normal distribution.

        Each depends only on `key` and its own name, not on other parameters.
        """
        params = self._trace(args).params
        drawn = normal_like(key, {name: spec.tree() for name, spec in params.items()})
        return self.ravel(drawn, *args) if self._flat else drawn

    def ravel(self, params: Mapping[str, Any], *args: Any) -> jax.Array:
        """A dictionary of parameters as one flat array, sorted by name."""
        traced = self._trace(args)
        traced._check_names("parameter", traced.params, params, traced.fixed)
        leaves = [
            leaf
            for name in traced.params
            for leaf in traced._leaves("param", name, traced.params[name], params[name])
        ]
        if not leaves:
            return jnp.zeros((0,))
        dtype = jnp.result_type(*leaves)
        return jnp.concatenate([jnp.ravel(x).astype(dtype) for x in leaves])

    def unravel(self, flat: jax.Array, *args: Any) -> dict[str, Any]:
        """The dictionary of parameters from which `ravel` made this flat array."""
        return self._unraveled(self._trace(args), flat)

    def _as_dict(self, traced: _Traced, params: Any) -> Mapping[str, Any]:
        if self._flat:
            return self._unraveled(traced, params)
        if not isinstance(params, Mapping):
            raise PurifyError(
                f"purify({self._name}) takes a dictionary of parameters by name, not "
                f"{a_kind(type(params))}. Make one with .zeros() or .normal(key), or use "
                f"purify(..., ravel=True) for one flat array."
            )
        return params

    def _unraveled(self, traced: _Traced, flat: Any) -> dict[str, Any]:
        size = sum(spec.size for spec in traced.params.values())
        if isinstance(flat, Mapping) or jnp.shape(flat) != (size,):
            got = "a dictionary" if isinstance(flat, Mapping) else f"shape {jnp.shape(flat)}"
            parts = ", ".join(f"{name}: {traced.params[name]}" for name in traced.params)
            raise ShapeError(
                f"The parameters of purify({self._name}) in one flat array have shape ({size},), "
                f"but got {got}. They are {parts or 'none'}; .ravel(params) makes this array from "
                "a dictionary."
            )
        flat, start, out = jnp.asarray(flat), 0, {}
        for name in traced.params:
            spec, leaves = traced.params[name], []
            for shape, dtype in zip(spec.shapes, spec.dtypes, strict=True):
                stop = start + math.prod(shape)
                part = flat[start:stop].reshape(shape)
                if jnp.iscomplexobj(part) and not jnp.issubdtype(dtype, jnp.complexfloating):
                    part = part.real
                leaves.append(part.astype(dtype))
                start = stop
            out[name] = jax.tree.unflatten(spec.treedef, leaves)
        return {name: out[name] for name in traced.params}

    def __repr__(self) -> str:
        return f"purify({self._name})"
