"""Turn a program with markers into one that has inputs and outputs in their place.

`rewrite` takes a jaxpr and removes the equations of markers. Their results become inputs in front,
and their arguments become outputs at the end. A jaxpr inside an equation (of a loop, a branch, a
jitted call) is rewritten first, and the equation passes the inputs on. Other equations stay
untouched, so the compiled program is what a person would have written by hand.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Var, jaxprs_in_params
from jax.extend.core.primitives import custom_jvp_call_p, custom_vjp_call_p

from nnx.purify.errors import DuplicateNameError, MarkerError
from nnx.purify.markers import Spec, sink_p, source_p

__all__: list[str] = []


class Key(NamedTuple):
    """The identity of a marker: its name with every prefix, or the number of its call if it has no name."""

    kind: str
    name: str | None
    prefix: str = ""
    token: int | None = None

    def __str__(self) -> str:
        return self.name or f"{self.prefix}(without a name)"

    @property
    def call(self) -> str:
        """The marker, as a person would write it."""
        return f"{self.kind}({self.name!r})" if self.name else f"{self.kind}() without a name"


@dataclass
class Site:
    """All occurrences of one key in a program."""

    spec: Spec
    # One token for each call of the marker. Calls in functions with custom rules do not count,
    # because JAX calls these functions and their rules any number of times.
    tokens: set[int]


class Call(NamedTuple):
    """A call of a jitted function with markers. JAX traces such a function once for all its calls."""

    jaxpr: int
    prefix: str
    name: str
    declares: str


@dataclass
class Program:
    """A jaxpr whose markers are inputs in front and outputs at the end."""

    jaxpr: Jaxpr
    # Parameters and fixed values, in the order of the program.
    sources: dict[Key, Site] = field(default_factory=dict)
    # Intermediates, and those that are called where they have no single value.
    sinks: dict[Key, Site] = field(default_factory=dict)
    hidden: dict[Key, str] = field(default_factory=dict)
    calls: Counter[Call] = field(default_factory=Counter)

    def closed(self, consts: Sequence[Any] = ()) -> ClosedJaxpr:
        return ClosedJaxpr(self.jaxpr, consts)


def renewed(jaxpr: Jaxpr, invars: Sequence[Any], **parts: Any) -> Jaxpr:
    """The jaxpr with other inputs. JAX before 0.10.2 requires names for all of them."""
    count = len(parts.get("outvars", jaxpr.outvars))
    names = jaxpr.debug_info._replace(arg_names=("",) * len(invars), result_paths=("",) * count)
    return jaxpr.replace(invars=list(invars), debug_info=names, **parts)


_marked: weakref.WeakKeyDictionary[Jaxpr, bool] = weakref.WeakKeyDictionary()
_kept: weakref.WeakKeyDictionary[Jaxpr, dict[tuple[str, bool, bool], Program]] = (
    weakref.WeakKeyDictionary()
)


def has_rule(eqn: JaxprEqn) -> bool:
    """Whether this equation calls a function with a user's derivative rule."""
    if eqn.primitive not in (custom_jvp_call_p, custom_vjp_call_p):
        return False
    # JAX's own rules, such as that of relu, hold no markers.
    source = eqn.params["call_jaxpr"].jaxpr.debug_info.func_src_info or ""
    return not source.partition(" at ")[2].startswith(_JAX)


_JAX = str(Path(jax.__file__).parent)


def is_marked(jaxpr: Jaxpr) -> bool:
    """Whether a jaxpr, or one inside it, holds markers, or a derivative rule in it may hold some."""
    answer = _marked.get(jaxpr)
    if answer is None:
        answer = _marked[jaxpr] = any(
            eqn.primitive is source_p
            or eqn.primitive is sink_p
            or has_rule(eqn)
            or any(map(is_marked, jaxprs_in_params(eqn.params)))
            for eqn in jaxpr.eqns
        )
    return answer


def rewrite(
    jaxpr: Jaxpr, prefix: str = "", *, collect: bool = False, shared: bool = False
) -> Program:
    """Remove the markers from a jaxpr.

    Args:
      jaxpr: the program.
      prefix: the prefix of the names in it.
      collect: whether intermediates become outputs. If not, they are dropped.
      shared: whether several calls may declare the same name, because JAX decides how often to call.

    Raises:
      DuplicateNameError: a name was declared twice.
      MarkerError: a marker is inside something that cannot pass its value on.
    """
    if not is_marked(jaxpr):
        return Program(jaxpr)
    # The same jaxpr must give the same program, so that JAX finds the compiled code again. The
    # program must not hold the jaxpr: that would keep both alive forever.
    known = _kept.setdefault(jaxpr, {})
    options = (prefix, collect, shared)
    if options not in known:
        known[options] = Rewriter(jaxpr, *options).run()
    return known[options]


class Rewriter:
    """The state of one pass over one jaxpr."""

    def __init__(self, jaxpr: Jaxpr, prefix: str, collect: bool, shared: bool):
        self.jaxpr = jaxpr
        self.prefix = prefix
        self.collect = collect
        self.shared = shared
        self.program = Program(jaxpr)
        self.eqns: list[JaxprEqn] = []
        # Replacements for variables whose equations were removed.
        self.renamed: dict[Any, Any] = {}
        self.inputs: dict[Key, list[Var]] = {}
        self.outputs: dict[Key, list[Any]] = {}

    def run(self) -> Program:
        for eqn in self.jaxpr.eqns:
            if eqn.primitive is source_p:
                self.take_source(eqn)
            elif eqn.primitive is sink_p:
                self.take_sink(eqn)
            else:
                self.take(eqn)
        inputs = [v for key in self.program.sources for v in self.inputs[key]]
        outputs = [v for vs in self.outputs.values() for v in vs]
        self.program.jaxpr = renewed(
            self.jaxpr,
            invars=[*inputs, *self.jaxpr.invars],
            outvars=[*map(self.now, self.jaxpr.outvars), *map(self.now, outputs)],
            eqns=self.eqns,
        )
        return self.program

    def now(self, atom: Any) -> Any:
        return self.renamed.get(atom, atom) if isinstance(atom, Var) else atom

    def take_source(self, eqn: JaxprEqn) -> None:
        p = eqn.params
        kind, name, token = p["kind"], p["name"], p["token"]
        if name is None:
            key = Key(kind, None, self.prefix, token)
        else:
            key = Key(kind, self.prefix + name)
        self.declare(self.program.sources, key, Site(p["spec"], {token}))
        self.renamed.update(zip(eqn.outvars, self.inputs_of(key), strict=True))

    def take_sink(self, eqn: JaxprEqn) -> None:
        p = eqn.params
        values = [self.now(v) for v in eqn.invars]
        self.renamed.update(zip(eqn.outvars, values, strict=True))
        key = Key("intermediate", self.prefix + p["name"])
        self.declare(self.program.sinks, key, Site(_spec(p["treedef"], values), {p["token"]}))
        if self.collect:
            self.outputs.setdefault(key, values)

    def inside(self, jaxpr: Jaxpr, prefix: str = "", **options: bool) -> Program:
        """Rewrite a program inside an equation, in the same way."""
        return rewrite(
            jaxpr, self.prefix + prefix, shared=options.pop("shared", self.shared), **options
        )

    def declare(self, known: dict[Key, Site], key: Key, site: Site) -> None:
        before = known.get(key)
        if before is None:
            known[key] = Site(site.spec, set() if self.shared else set(site.tokens))
            return
        if known is self.program.sources and before.spec != site.spec:
            raise DuplicateNameError(
                f"{key.call} was declared twice, with {before.spec} and with {site.spec}. {_ADVICE}"
            )
        if not self.shared:
            before.tokens |= site.tokens
        if len(before.tokens) > 1:
            raise DuplicateNameError(f"{key.call} was declared by two calls. {_ADVICE}")

    def inputs_of(self, key: Key) -> list[Var]:
        """The variables that hold the value of `key` in this jaxpr."""
        if key not in self.inputs:
            self.inputs[key] = [Var(a) for a in self.program.sources[key].spec.avals()]
        return self.inputs[key]

    def take(self, eqn: JaxprEqn) -> None:
        """Rewrite an equation that is not a marker, and the programs inside it."""
        eqn = eqn.replace(invars=[self.now(v) for v in eqn.invars])
        if has_rule(eqn) or any(map(is_marked, jaxprs_in_params(eqn.params))):
            eqn = self.pass_on(eqn)
        self.eqns.append(eqn)

    def pass_on(self, eqn: JaxprEqn) -> JaxprEqn:
        """The equation with its programs rewritten, and the inputs that they need."""
        handler = _rules.get(eqn.primitive.name)
        if handler is None:
            names = sorted(
                key.call
                for jaxpr in jaxprs_in_params(eqn.params)
                for program in [self.inside(jaxpr, shared=True)]
                for key in [*program.sources, *program.sinks]
            )
            raise MarkerError(
                f"{', '.join(names)} is inside {eqn.primitive.name}, which cannot take further "
                "inputs. Call the marker before it and pass the value in."
            )
        for jaxpr in jaxprs_in_params(eqn.params):
            # Effects may refer to inputs by number, and our inputs would shift these numbers.
            if any(hasattr(effect, "input_index") for effect in jaxpr.effects):
                raise MarkerError(
                    f"{eqn.primitive.name} holds a marker and a write to a jax.Ref. Call the "
                    "marker before it and pass the value in."
                )
        return handler(self, eqn)

    def inherit(
        self, *programs: Program, calls: bool = True, rules: bool = False, where: str | None = None
    ) -> None:
        """Add the declarations of programs inside an equation to those of this program.

        Args:
          programs: the programs inside the equation.
          calls: whether JAX keeps exactly one copy of each call inside.
          rules: whether JAX may call the traced function again.
          where: the construct that keeps intermediates inside from having a single value.
        """
        for program in programs:
            for key, site in program.sources.items():
                self.declare(self.program.sources, key, Site(site.spec, set()) if rules else site)
            for key, site in program.sinks.items():
                if where is not None:
                    self.program.hidden.setdefault(key, where)
                else:
                    self.declare(self.program.sinks, key, Site(site.spec, set()) if rules else site)
            self.program.hidden |= program.hidden
            if calls:
                self.count(program.calls)

    def count(self, calls: Mapping[Call, int]) -> None:
        """Record calls of jitted functions, because JAX answers the second call from its cache."""
        for call, times in () if self.shared else calls.items():
            self.program.calls[call] += times
            if self.program.calls[call] > 1:
                raise DuplicateNameError(
                    f"The jitted function {call.name!r}, which declares {call.declares}, is called "
                    f"twice. {_ADVICE}"
                )

    def inputs_for(self, *programs: Program) -> list[list[Var]]:
        """For each program, the variables of this jaxpr that become its first inputs."""
        return [[v for key in p.sources for v in self.inputs_of(key)] for p in programs]

    def outputs_for(self, program: Program, length: int | None = None) -> list[Var]:
        """Make variables for the intermediates, which are the last outputs of `program`.

        Args:
          program: the program inside an equation.
          length: the length of the loop that stacks them.
        """
        if not self.collect:
            return []
        sizes = [len(site.spec.shapes) for site in program.sinks.values()]
        inner: Any = iter(program.jaxpr.outvars[len(program.jaxpr.outvars) - sum(sizes) :])
        made: list[Var] = []
        for key, size in zip(program.sinks, sizes, strict=True):
            avals = [next(inner).aval for _ in range(size)]
            if length is not None:
                avals = [a.update(shape=(length, *a.shape)) for a in avals]
            outs = [Var(a) for a in avals]
            made += outs
            if key not in self.outputs:
                self.outputs[key] = outs
                site = self.program.sinks[key]
                site.spec = _spec(site.spec.treedef, outs)
        return made


Rule = Callable[[Rewriter, JaxprEqn], JaxprEqn]
_rules: dict[str, Rule] = {}


def rule(*primitives: str) -> Callable[[Rule], Rule]:
    """Register how equations of these primitives pass parameters in and intermediates out."""

    def register(handler: Rule) -> Rule:
        _rules.update(dict.fromkeys(primitives, handler))
        return handler

    return register


_ADVICE = (
    "Give each its own name (take a `name` argument, or use prefix('a', f) for a part that is "
    "used again). To use one value in two places, call the marker once and pass its result."
)


def _spec(treedef: Any, atoms: Sequence[Any]) -> Spec:
    return Spec(treedef, tuple(a.aval.shape for a in atoms), tuple(a.aval.dtype for a in atoms))
