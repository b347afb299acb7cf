"""purify: a kept trace is used again if, and only if, nothing that it read has changed."""

import builtins
import collections
import contextvars
import dataclasses
import enum
import functools
import gc
import operator
import os
import random
import sys
import threading
import types
import weakref
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import nnx
from nnx.purify import param, prefix, purify
from tests.nnx.test_purify import close

PLACES = {}


def place(make):
    """A place that a function may read: `make` returns a function that reads it, and one that sets it."""
    PLACES[make.__name__] = make
    return make


@pytest.fixture(autouse=True)
def restored():
    """Restore what the places below change in Python and JAX."""
    sinc = jnp.sinc
    yield
    jnp.sinc = sinc
    vars(builtins).pop("purify_number", None)
    os.environ.pop("PURIFY_NUMBER", None)
    for name in ("tests_imported", "tests_imported_from"):
        sys.modules.pop(name, None)


def setting(x, name):
    return functools.partial(setattr, x, name)


GLOBAL = 1.0


@place
def a_global():
    return lambda: GLOBAL, functools.partial(globals().__setitem__, "GLOBAL")


@place
def a_global_of_another_module():
    module = types.ModuleType("tests_other")
    exec("number = 1.0\ndef read(): return number", module.__dict__)
    return module.read, setting(module, "number")


@place
def an_attribute_of_a_module():
    outer, inner = types.ModuleType("tests_outer"), types.ModuleType("tests_inner")
    outer.inner, inner.number = inner, 1.0
    return lambda: outer.inner.number, setting(inner, "number")


@place
def a_name_that_hides_a_builtin():
    scope = {"__name__": "tests_hidden"}
    exec("def read(): return abs(-1.0)", scope)

    def change(v):
        scope["abs"] = lambda x: v

    return scope["read"], change


@place
def a_builtin():
    builtins.purify_number = 1.0
    return lambda: purify_number, setting(builtins, "purify_number")  # noqa: F821


@place
def a_cell():
    x = 1.0

    def change(v):
        nonlocal x
        x = v

    return lambda: x, change


@place
def a_default():
    def read(x=1.0):
        return x

    return read, lambda v: setattr(read, "__defaults__", (v,))


@place
def a_keyword_default():
    def read(*, x=1.0):
        return x

    return read, lambda v: read.__kwdefaults__.update(x=v)


@place
def an_attribute_of_a_function():
    def helper():
        pass

    helper.number = 1.0
    return lambda: helper.number, setting(helper, "number")


@place
def the_code_of_a_function():
    def helper():
        return 1.0

    def change(v):
        helper.__code__ = eval(f"lambda: {v!r}").__code__

    return lambda: helper(), change


@place
def a_helper_bound_again():
    held = {"helper": lambda: 1.0}
    return lambda: held["helper"](), lambda v: held.update(helper=lambda: v)


@place
def a_wrapped_function():
    x = [1.0]
    helper = functools.wraps(abs)(lambda: x[0])
    return lambda: helper(), lambda v: x.__setitem__(0, v)


class Base:
    number = 1.0

    def method(self):
        return self.number


@place
def an_attribute_of_an_instance():
    x = Base()
    return lambda: x.number, setting(x, "number")


@place
def an_attribute_of_a_class():
    class Own(Base):
        pass

    x = Own()
    return lambda: x.method(), setting(Own, "number")


@place
def an_attribute_of_a_base_class():
    class Root:
        number = 1.0

    class Own(Root):
        pass

    x = Own()
    return lambda: x.number, setting(Root, "number")


@place
def the_class_of_an_instance():
    x = Base()

    def change(v):
        x.__class__ = type("Other", (Base,), {"number": v})

    return lambda: x.number, change


@place
def the_bases_of_a_class():
    class Own(Base):
        pass

    def change(v):
        Own.__bases__ = (type("Other", (Base,), {"number": v}),)

    return lambda: Own.number, change


@place
def a_metaclass():
    class Meta(type):
        number = 1.0

    class Own(metaclass=Meta):
        pass

    return lambda: Own.number, setting(Meta, "number")


@place
def a_method():
    class Own(Base):
        pass

    x = Own()
    return lambda: x.method(), lambda v: setattr(Own, "method", lambda self: v)


@place
def a_bound_method():
    x = Base()
    method = x.method
    return lambda: method(), setting(x, "number")


@place
def a_property():
    class Own:
        @property
        def value(self):
            return self._value

    x = Own()
    x._value = 1.0
    return lambda: x.value, setting(x, "_value")


@place
def an_attribute_by_getattr():
    class Own:
        def __init__(self):
            self.held = {"number": 1.0}

        def __getattr__(self, name):
            return self.held[name]

    x = Own()
    return lambda: x.number, lambda v: x.held.update(number=v)


@place
def an_attribute_by_its_name():
    x = Base()
    return lambda: getattr(x, "num" + "ber"), setting(x, "number")


@place
def a_slot():
    class Own:
        __slots__ = ("number",)

    x = Own()
    x.number = 1.0
    return lambda: x.number, setting(x, "number")


@place
def a_callable_object():
    class Own(Base):
        def __call__(self):
            return self.number

    x = Own()
    return x, setting(x, "number")


@place
def an_item_of_a_list():
    x = [1.0, 2.0]
    return lambda: x[0], lambda v: x.__setitem__(0, v)


@place
def the_length_of_a_list():
    x = []

    def change(v):
        x[:] = [0] * int(v)

    return lambda: float(len(x)), change


@place
def a_list_in_a_tuple_in_a_dict():
    x = {"a": ([1.0], 2)}
    return lambda: x["a"][0][0], lambda v: x["a"][0].__setitem__(0, v)


@place
def the_order_of_a_dict():
    x = {"a": 1.0}

    def change(v):
        x.pop(v, None)
        rest = dict(x)
        x.clear()
        x.update({v: None} | rest)

    return lambda: next(k for k in x if k != "a"), change


@place
def the_order_of_an_ordered_dict():
    x = collections.OrderedDict.fromkeys(map(float, range(10)))
    return lambda: next(k for k in x), lambda v: x.move_to_end(v, last=False)


@place
def a_default_factory():
    x = collections.defaultdict(lambda: 1.0)

    def change(v):
        x.default_factory = lambda: v

    return lambda: dict(x) or x.default_factory(), change


@place
def a_list_of_a_class_of_its_own():
    class Own(list):
        pass

    x = Own([1.0])
    return lambda: x[0], lambda v: x.__setitem__(0, v)


@place
def a_set():
    x = {1.0}

    def change(v):
        x.clear()
        x.add(v)

    return lambda: sum(x), change


@place
def a_deque():
    x = collections.deque([1.0])
    return lambda: x[0], x.appendleft


@place
def a_numpy_array():
    x = np.ones(3)
    return lambda: float(x[1]), lambda v: x.__setitem__(1, v)


@place
def a_view_of_a_numpy_array():
    x = np.ones(3)
    view = x[1:]
    return lambda: float(view[0]), lambda v: x.__setitem__(1, v)


@place
def a_jax_array():
    x = [jnp.ones(())]
    return lambda: x[0], lambda v: x.__setitem__(0, jnp.asarray(v))


@place
def keywords_of_a_partial():
    x = functools.partial(lambda *, a: a, a=1.0)
    return lambda: x(), lambda v: x.keywords.update(a=v)


@place
def a_namespace():
    x = types.SimpleNamespace(a=1.0)
    return lambda: x.a, setting(x, "a")


@place
def a_class_method():
    class Own:
        number = 1.0

        @classmethod
        def read(cls):
            return cls.number

    return lambda: Own.read(), setting(Own, "number")


@place
def a_cached_property():
    class Own(Base):
        @functools.cached_property
        def twice(self):
            return self.number

    x = Own()

    def change(v):
        x.number = v
        vars(x).pop("twice", None)

    return lambda: x.twice, change


@place
def a_vmapped_function():
    x = [1.0]
    f = jax.vmap(lambda y: y * x[0])
    return lambda: f(jnp.ones(2))[0], lambda v: x.__setitem__(0, v)


@place
def a_type():
    x = [1]

    class Kind(enum.IntEnum):
        ONE = 1

    # Equal, and of other types: 7 gives the first, 3 the fourth.
    kinds = [1, 1.0, Kind.ONE, True, np.float32(1), "1", None]
    return (
        lambda: [float(type(k) is type(x[0]) and k == x[0]) for k in kinds].index(1.0),
        lambda v: x.__setitem__(0, kinds[int(v) % len(kinds)]),
    )


@place
def the_sign_of_zero():
    x = [0.0]
    return (
        lambda: float(np.copysign(1.0, x[0])),
        lambda v: x.__setitem__(0, -0.0 if v > 4 else 0.0),
    )


@place
def an_environment_variable():
    os.environ["PURIFY_NUMBER"] = "1"
    return (
        lambda: float(os.environ["PURIFY_NUMBER"]),
        lambda v: os.environ.__setitem__("PURIFY_NUMBER", str(v)),
    )


@place
def a_virtual_subclass():
    class Protocol(metaclass=__import__("abc").ABCMeta):
        pass

    def change(v):
        if v == 3.0:
            Protocol.register(Base)

    return lambda: float(issubclass(Base, Protocol)), change


@place
def a_mutable_default():
    def read(x=[1.0]):  # noqa: B006
        return x[0]

    return read, lambda v: read.__defaults__[0].__setitem__(0, v)


@place
def a_missing_key():
    class Own(dict):
        number = 1.0

        def __missing__(self, key):
            return self.number

    x = Own()
    return lambda: x["a"], setting(Own, "number")


@place
def a_descriptor():
    class Descriptor:
        number = 1.0

        def __get__(self, instance, owner):
            return self.number

    d = Descriptor()
    x = type("Own", (), {"field": d})()
    return lambda: x.field, setting(d, "number")


@place
def a_partial_method():
    class Own:
        def add(self, a, b):
            return a + b

        method = functools.partialmethod(add, 1.0, b=1.0)

    x = Own()
    return lambda: x.method(), lambda v: Own.__dict__["method"].keywords.update(b=v)


@place
def an_operator():
    class Own(Base):
        def __add__(self, other):
            return self.number + other

    x = Own()
    return lambda: x + 1.0, setting(x, "number")


@place
def a_dataclass():
    @dataclasses.dataclass(frozen=True)
    class Own:
        number: float = 1.0

    x = Own()
    return lambda: dataclasses.astuple(x)[0], lambda v: object.__setattr__(x, "number", v)


@place
def a_function_of_jax():
    module = sys.modules["jax.numpy"]
    old = jnp.sinc

    def change(v):
        module.sinc = lambda x: v if v != 2.0 else old(x)

    return lambda: jnp.sinc(0.0), change


@place
def a_module_that_is_imported():
    module = sys.modules["tests_imported"] = types.ModuleType("tests_imported")
    module.number = 1.0

    def read():
        import tests_imported

        return tests_imported.number

    return read, setting(module, "number")


@place
def a_name_of_a_module_that_is_imported():
    module = sys.modules["tests_imported_from"] = types.ModuleType("tests_imported_from")
    module.number = 1.0

    def read():
        from tests_imported_from import number

        return number

    return read, setting(module, "number")


@place
def a_jitted_function_bound_again():
    x = [jax.jit(lambda: 1.0)]
    return lambda: x[0](), lambda v: x.__setitem__(0, jax.jit(lambda: v))


# Functions whose reads cannot be seen are traced at every call.


@place
def an_attribute_of_a_module_by_an_attrgetter():
    x = types.ModuleType("tests_by_attrgetter")
    x.number = 1.0
    return lambda: operator.attrgetter("num" + "ber")(x), setting(x, "number")


@place
def an_attribute_of_a_module_by_its_dict():
    x = types.ModuleType("tests_by_dict")
    x.number = 1.0
    return lambda: x.__dict__["num" + "ber"], setting(x, "number")


@place
def an_attribute_of_a_module_by_code_of_c():
    x = types.ModuleType("tests_by_reduce")
    x.number = 1.0
    return lambda: functools.reduce(getattr, ["num" + "ber"], x), setting(x, "number")


@place
def an_attribute_of_a_module_by_vars_called_from_c():
    x = types.ModuleType("tests_by_vars")
    x.number = 1.0
    return lambda: next(map(vars, [x]))["num" + "ber"], setting(x, "number")


@place
def the_subclasses_of_a_class():
    class Root:
        pass

    made = []
    return (
        lambda: float(len(Root.__subclasses__())),
        lambda v: made.append(type("Own", (Root,), {})),
    )


@place
def what_an_evaluated_string_reads():
    return (
        lambda: sum(map(eval, ["GLOBAL"])),
        functools.partial(globals().__setitem__, "GLOBAL"),
    )


class Flattened:
    pass


SCALE = {"value": 1.0}
jax.tree_util.register_pytree_node(
    Flattened, lambda x: ((SCALE["value"],), None), lambda _, children: Flattened()
)


@place
def what_code_reads_to_which_no_step_leads():
    x = Flattened()
    return lambda: jax.tree.leaves(x)[0], lambda v: SCALE.update(value=v)


@place
def a_context_variable():
    x = contextvars.ContextVar("x", default=1.0)
    return lambda: x.get(), x.set


@place
def a_weak_reference():
    x = Base()
    ref = weakref.ref(x)
    return lambda: ref().number, lambda v: setattr(x, "number", v)


@place
def a_thread_local():
    x = threading.local()
    x.number = 1.0
    return lambda: x.number, setting(x, "number")


@place
def a_global_by_its_name():
    return lambda: globals()["GLOBAL"], functools.partial(globals().__setitem__, "GLOBAL")


@place
def an_attribute_of_a_module_by_its_name():
    x = types.ModuleType("tests_by_name")
    x.number = 1.0
    return lambda: getattr(x, "num" + "ber"), setting(x, "number")


@place
def an_array_of_objects():
    x = np.array([1.0, None], object)
    return lambda: x[0], lambda v: x.__setitem__(0, v)


@place
def a_module_of_nnx():
    x = nnx.Linear.init(0)(1, 1)
    x.bias = jnp.ones(1)
    return lambda: x.bias[0], lambda v: setattr(x, "bias", jnp.full(1, v))


HIDDEN = {
    "an_attribute_of_a_module_by_an_attrgetter",
    "an_attribute_of_a_module_by_its_dict",
    "an_attribute_of_a_module_by_code_of_c",
    "an_attribute_of_a_module_by_vars_called_from_c",
    "the_subclasses_of_a_class",
    "what_an_evaluated_string_reads",
    "what_code_reads_to_which_no_step_leads",
    "a_context_variable",
    "a_weak_reference",
    "a_thread_local",
    "a_global_by_its_name",
    "an_attribute_of_a_module_by_its_name",
    "an_array_of_objects",
    "a_module_of_nnx",
}


def counted(*reads):
    """A model that sums the values it reads, and a list with an item for each trace."""
    traces = []

    def f():
        traces.append(None)
        return param((), "w") * sum(read() for read in reads)

    return f, traces


@pytest.mark.parametrize("name", PLACES)
def test_every_change_is_seen(name):
    read, change = PLACES[name]()
    change(2.0)
    f, traces = counted(read)
    # When compiled, values that cannot be seen are constants, as under `jax.jit`.
    models = [purify(f)] if name in HIDDEN else [purify(f), purify(lambda: f(), jit=True)]
    for v in (7.0, 3.0):
        change(v)
        for model in models:
            for _ in range(2):
                close(model({"w": 2.0}), 2.0 * float(read()))
            before = len(traces)
            model.shapes(), model({"w": 1.0})
            assert (len(traces) == before) == (name not in HIDDEN)


WAYS = [
    lambda w, read: w * read(),
    lambda w, read: jax.jit(lambda w: w * read())(w),
    lambda w, read: jax.vmap(lambda w: w * read())(w[None])[0],
    lambda w, read: jax.checkpoint(lambda w: w * read())(w),
    lambda w, read: lax.scan(lambda c, _: (c + w * read(), None), 0.0 * w, length=1)[0],
    lambda w, read: lax.cond(w > -1e9, lambda: w * read(), lambda: w),
    lambda w, read: jax.grad(lambda w: 0.5 * w * w * read())(w),
    lambda w, read: prefix("p", lambda: w * read())(),
    lambda w, read: w * functools.partial(read)(),
]


def eager(model, w, x):
    return model({"w": w}, x)


def compiled(model, w, x):
    # Use a new function, because `jax.jit` keeps its own traces of an old one.
    return jax.jit(lambda w, x: model({"w": w}, x))(w, x)


def batched(model, w, x):
    return jax.vmap(lambda w: model({"w": w}, x))(jnp.array([w, w]))[1]


@pytest.mark.parametrize("seed", range(3))
def test_random_programs_with_random_changes(seed):
    rng = random.Random(seed)
    places = {name: PLACES[name]() for name in rng.sample(sorted(PLACES.keys() - HIDDEN), 10)}
    for _, change in places.values():
        change(2.0)
    used = rng.sample(sorted(places), 6)
    parts = [(rng.choice(WAYS), places[name][0]) for name in used]
    traces = []

    def f(x):
        traces.append(None)
        w = param((), "w")
        return sum(way(w, read) for way, read in parts) + x.sum()

    model = purify(f)
    # For each length of the argument, the places that have changed since the last call with it.
    changed: dict[int, set[str]] = {}
    for _ in range(15):
        if rng.random() < 0.5:
            name = rng.choice(sorted(places))
            places[name][1](float(rng.randrange(9)))
            for names in changed.values():
                names.add(name)
        n, w = rng.randrange(1, 4), rng.choice([2.0, -1.0])
        call = rng.choice([eager, compiled, batched])
        before = len(traces)
        close(call(model, w, jnp.ones(n)), w * sum(float(read()) for _, read in parts) + n)
        eager(model, w, jnp.ones(n))
        # It is known that a class was registered as a subclass, but not of which class.
        if n in changed and not changed[n] & {*used, "a_virtual_subclass"}:
            assert len(traces) == before, changed
        changed[n] = set()


# The visible inputs of a trace.


def test_settings_of_jax_are_part_of_the_key():
    @purify
    def model():
        return param(2, "w") @ jnp.ones(2), jax.random.key_data(jax.random.key(0))

    p = {"w": np.ones(2)}
    assert model.shapes()["w"].dtype == jnp.float32
    with jax.enable_x64(True):
        assert model.shapes()["w"].dtype == jnp.float64 == model(p)[0].dtype
    assert model.shapes()["w"].dtype == jnp.float32 == model(p)[0].dtype
    with jax.default_matmul_precision("highest"):
        assert "HIGHEST" in str(jax.make_jaxpr(model)(p))
    assert "HIGHEST" not in str(jax.make_jaxpr(model)(p))
    with jax.default_prng_impl("rbg"):
        assert model(p)[1].shape == (4,)
    assert model(p)[1].shape == (2,)


def test_arguments_are_told_apart_by_type_and_structure():
    class Pair(NamedTuple):
        a: object
        b: object
        scale = 2.0

    traces = []

    @purify
    def model(x):
        traces.append(None)
        scale = getattr(x, "scale", 1.0)
        if isinstance(x, dict):
            scale = len(x) + 2 * (type(next(iter(x))) is bool)
        return param((), "w") * scale * sum(map(jnp.sum, jax.tree.leaves(x)))

    p = {"w": 1.0}
    cases = [1, 1.0, True, jnp.ones(2), np.ones(2), jnp.ones(2, jnp.int32), (1.0, 2.0), [1.0, 2.0]]
    cases += [{"a": 1.0}, {"b": 1.0, "a": None}, {1: 1.0}, {True: 1.0}, Pair(1.0, 2.0)]
    for x in cases + cases:
        fresh = purify(model.__wrapped__)
        close(model(p, x), fresh(p, x))
        assert model(p, x).dtype == fresh(p, x).dtype
    before = len(traces)
    for x in cases[:10]:
        model(p, x)
    # Traces for dictionaries whose keys are not strings are not kept.
    assert len(traces) == before
    Pair.scale = 5.0
    close(model(p, cases[-1]), 15.0)


def test_axis_names_around_the_model_are_part_of_the_key():
    model = purify(lambda x: lax.psum(x, "i") * param((), "w"))
    each = lambda axis: jax.vmap(lambda x: model({"w": 2.0}, x), axis_name=axis)(jnp.ones(3))
    close(each("i"), jnp.full(3, 6.0))
    close(each("i"), jnp.full(3, 6.0))
    with pytest.raises(NameError, match="unbound axis name"):
        each("j")


# The cost, and what is left behind.


def test_one_trace_serves_every_method():
    f, traces = counted(lambda: 1.0)
    model = purify(f, ravel=True)
    key = jax.random.key(0)
    for _ in range(3):
        v = model.normal(key)
        model.shapes(), model.fixed_shapes(), model.zeros(), model.intermediates(v)
        model.ravel(model.unravel(v)), jax.grad(model)(v), jax.jit(lambda v: model(v))(v)
        jax.vmap(model)(v[None]), jax.make_jaxpr(lambda v: model(v))(v)
    assert len(traces) == 1


def test_a_function_that_counts_its_traces_is_not_traced_for_that():
    count = {"traces": 0}

    @purify
    def model(x):
        count["traces"] += 1
        return param((), "w") * x.sum()

    for _ in range(3):
        for n in (1, 2):
            close(model({"w": 2.0}, jnp.ones(n)), 2.0 * n)
    assert count == {"traces": 2}
    # Changes by others do count.
    count["traces"] = 7
    model({"w": 2.0}, jnp.ones(1))
    assert count == {"traces": 8}


def test_side_effects_are_those_of_a_trace(capsys):
    lines = []

    @purify
    def model():
        print("tracing")
        lines.append("tracing")
        return param((), "w")

    # The first run in a process may import something, which is also a change.
    for _ in range(3):
        model({"w": 1.0})
    assert capsys.readouterr().out.split() == lines
    lines.clear()
    for _ in range(3):
        model({"w": jnp.ones(())})
    assert capsys.readouterr().out.split() == lines and len(lines) <= 1


def test_a_random_stream_is_drawn_from_at_every_call():
    stream, iterator = np.random.default_rng(0), iter(range(9))
    numbers = np.random.default_rng(0)
    model = purify(lambda: param((), "w") * stream.normal())
    counts = purify(lambda: param((), "w") * next(iterator))
    for i in range(3):
        close(model({"w": 1.0}), numbers.normal())
        close(counts({"w": 1.0}), float(i))


def test_a_traced_value_from_outside_is_never_kept():
    @jax.jit
    def outer(x):
        y = x * 2
        model = purify(lambda: y * param((), "w"))
        return model({"w": 1.0}) + model({"w": 2.0})

    with jax.check_tracer_leaks():
        for x in (1.0, 2.0):
            close(outer(x), 6.0 * x)
    box = [None]
    model = purify(lambda: box[0] * param((), "w"))

    def read(x):
        box[0] = x
        return model({"w": 2.0})

    with jax.check_tracer_leaks():
        close(jax.grad(read)(3.0), 2.0)
        box[0] = None
    close(jax.vmap(read)(jnp.arange(3.0)), 2 * jnp.arange(3.0))
    close(read(5.0), 10.0)


def test_a_purified_function_inside_another():
    x = [1.0]
    inner = purify(lambda: x[0] * param((), "w"))
    outer = purify(lambda: inner({"w": 3.0}) + param((), "w"))
    for v in (1.0, 2.0, 2.0, 5.0):
        x[0] = v
        close(inner({"w": 3.0}), 3 * v)
        for _ in range(2):
            close(outer({"w": 1.0}), 3 * v + 1)


def test_an_error_leaves_nothing_behind_and_the_profiler_off():
    class Big:
        pass

    x, gone = [None], []

    @purify
    def model():
        big = Big()
        gone.append(weakref.ref(big))
        return param((), "w") * x[0]

    for _ in range(3):
        with pytest.raises(TypeError):
            model({"w": 1.0})
        assert sys.getprofile() is None
    gc.collect()
    assert [ref() for ref in gone] == [None] * 3
    x[0] = 2.0
    close(model({"w": 1.0}), 2.0)


def test_where_a_profiler_runs_nothing_new_is_kept():
    events = []
    profile = lambda *event: events.append(event)
    f, traces = counted(lambda: 1.0)
    model = purify(f)
    sys.setprofile(profile)
    try:
        for _ in range(2):
            model({"w": 1.0})
            assert sys.getprofile() is profile
    finally:
        sys.setprofile(None)
    assert len(traces) == 2 and events


def test_old_traces_and_what_they_held_are_dropped():
    x = [jnp.ones(1000)]
    model = purify(lambda y: param((), "w") * (x[0].sum() + y.sum()))
    old = weakref.ref(x[0])
    model({"w": 1.0}, jnp.ones(2))
    x[0] = jnp.ones(3)
    model({"w": 1.0}, jnp.ones(2))
    gc.collect()
    assert old() is None
    for n in range(200):
        model.shapes(np.ones(n))
    assert len(model._traces._entries) <= 128
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_two_threads_share_a_model():
    model = purify(lambda x: param((), "w") * x.sum() * 2)
    errors = []

    def work():
        for i in range(50):
            n = i % 5 + 1
            if float(model({"w": 1.0}, np.ones(n))) != 2.0 * n:
                errors.append(n)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def test_what_runs_when_garbage_is_collected_is_not_part_of_a_model():
    traces, collected = [], []

    def of_a_library(phase, info):
        collected.append(phase)

    @purify
    def model(x):
        traces.append(None)
        return param((), "w") * x * len([[] for _ in range(100)])

    gc.callbacks.append(of_a_library)
    threshold = gc.get_threshold()
    gc.set_threshold(1)
    try:
        for _ in range(3):
            close(model({"w": 2.0}, 3.0), 600.0)
    finally:
        gc.set_threshold(*threshold)
        gc.callbacks.remove(of_a_library)
    assert collected and len(traces) == 1
