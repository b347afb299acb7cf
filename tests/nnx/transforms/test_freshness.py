"""The next call of a compiled function sees every change by ordinary Python."""

import collections
import enum
import functools
import inspect
import math
import types
import typing

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nnx


class L(nnx.Module):
    w: jax.Array = nnx.param()

    def __init__(self, v):
        self.w = jnp.array(float(v))


class Agent:
    net = L(1)


class Child(Agent):
    pass


class Empty:
    net = None


class Bare:
    pass


class Chooser:
    factor = 2.0

    def __init__(self):
        self.a, self.b = L(1), L(10)
        self.lr = 0.5

    def pick(self):
        return self.a

    def scaled(self):
        return self.a.w * self.factor * self.lr


class OtherChooser(Chooser):
    def pick(self):
        return self.b


def instance_over_class():
    Agent.net = L(1)
    o = Agent()
    return lambda: o.net.w, lambda: setattr(o, "net", L(100))


def instance_over_none():
    o = Empty()
    return lambda: o.net.w if o.net else -1.0, lambda: setattr(o, "net", L(100))


def instance_deleted():
    Agent.net = L(1)
    o = Agent()
    o.net = L(5)
    return lambda: o.net.w, lambda: delattr(o, "net")


def none_deleted():
    Agent.net = L(1)
    o = Agent()
    o.net = None
    return lambda: o.net.w if o.net else -1.0, lambda: delattr(o, "net")


def subclass_over_base():
    Agent.net = L(1)
    if "net" in vars(Child):
        del Child.net
    o = Child()
    return lambda: o.net.w, lambda: setattr(Child, "net", L(100))


def class_attribute():
    o = Child()
    Agent.net = L(1)
    if "net" in vars(Child):
        del Child.net
    return lambda: o.net.w, lambda: setattr(Agent, "net", L(100))


def missing_on_an_instance():
    o = Bare()
    return lambda: getattr(o, "net", L(3)).w, lambda: setattr(o, "net", L(100))


def missing_on_a_class():
    class Box:
        pass

    return lambda: getattr(Box, "net", L(3)).w, lambda: setattr(Box, "net", L(100))


def missing_by_try():
    o = Bare()

    def f():
        try:
            return o.net.w
        except AttributeError:
            return -1.0

    return f, lambda: setattr(o, "net", L(100))


def method_replaced():
    class Mine(Chooser):
        pass

    o = Mine()
    return lambda: o.pick().w, lambda: setattr(Mine, "pick", lambda self: self.b)


def method_of_an_instance():
    o = Chooser()
    return lambda: o.pick().w, lambda: setattr(o, "pick", lambda: o.b)


def class_assigned():
    o = Chooser()
    return lambda: o.pick().w, lambda: setattr(o, "__class__", OtherChooser)


def number_of_a_class():
    class Mine(Chooser):
        factor = 2.0

    o = Mine()
    return o.scaled, lambda: setattr(Mine, "factor", 3.0)


def number_of_an_instance():
    o = Chooser()
    return o.scaled, lambda: setattr(o, "lr", 0.25)


def defaults():
    def f(net=L(1), scale=1.0):
        return net.w * scale

    return f, lambda: setattr(f, "__defaults__", (L(100), 2.0))


def defaults_of_a_helper():
    def helper(scale=2.0):
        return scale

    net = L(1)
    return lambda: net.w * helper(), lambda: setattr(helper, "__defaults__", (3.0,))


def keyword_defaults():
    def f(*, net=L(1)):
        return net.w

    return f, lambda: setattr(f, "__kwdefaults__", {"net": L(100)})


def keyword_defaults_in_place():
    def f(*, net=L(1), scale=1.0):
        return net.w * scale

    return f, lambda: f.__kwdefaults__.update(scale=2.0)


def keywords_of_a_partial():
    f = functools.partial(lambda net, scale: net.w * scale, L(1), scale=2.0)
    return f, lambda: f.keywords.update(scale=3.0)


def module_in_a_partial():
    f = functools.partial(lambda net: net.w, net=L(1))
    return f, lambda: f.keywords.update(net=L(100))


def helper_replaced():
    net = L(1)

    def helper():
        return net.w

    def replace():
        nonlocal helper
        helper = lambda: net.w * 3

    return lambda: helper(), replace


def helper_by_one_of_the_same_code():
    net = L(1)
    make = lambda k: lambda: net.w * k
    helper = make(2)

    def replace():
        nonlocal helper
        helper = make(5)

    return lambda: helper(), replace


def function_of_a_library():
    net, act = L(1), jax.nn.relu

    def replace():
        nonlocal act
        act = jax.nn.sigmoid

    return lambda: act(net.w), replace


def long_list():
    nets = [0] * 100
    return lambda: nets[70].w if nets[70] else -1.0, lambda: nets.__setitem__(70, L(100))


def long_list_of_modules():
    nets = [L(i) for i in range(100)]
    return lambda: nets[70].w, lambda: nets.__setitem__(70, L(1000))


def dict_of_a_namespace():
    space = types.SimpleNamespace(net=L(1))
    return lambda: space.net.w, lambda: setattr(space, "net", L(100))


class Color(enum.Enum):
    RED = 1
    BLUE = 2


CHANGES = [
    instance_over_class, instance_over_none, instance_deleted, none_deleted, subclass_over_base,
    class_attribute, missing_on_an_instance, missing_on_a_class, missing_by_try, method_replaced,
    method_of_an_instance, class_assigned, number_of_a_class, number_of_an_instance, defaults,
    defaults_of_a_helper, keyword_defaults, keyword_defaults_in_place, keywords_of_a_partial,
    module_in_a_partial, helper_replaced, helper_by_one_of_the_same_code, function_of_a_library,
    long_list, long_list_of_modules, dict_of_a_namespace,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_what_a_function_closes_over(change):
    fn, apply = change()
    compiled = nnx.jit(fn)
    traces = []
    counted = nnx.jit(lambda: (traces.append(1), fn())[1])
    assert float(compiled()) == float(fn()) == float(counted()) == float(counted())
    before, count = float(fn()), len(traces)
    counted()
    assert len(traces) == count
    apply()
    assert float(fn()) != before
    assert float(compiled()) == float(fn()) == float(counted())
    count = len(traces)
    counted()
    assert len(traces) == count


class Net(nnx.Module):
    scale = 2.0

    def __init__(self):
        self.inner = L(3)

    def part(self):
        return self.inner.w

    def __call__(self):
        return self.part() * self.scale


OF_A_CLASS = {
    "a number": ("scale", 5.0),
    "a method": ("part", lambda self: self.inner.w * 10),
    "the call": ("__call__", lambda self: self.inner.w + 1),
    "a property": ("scale", property(lambda self: 7.0)),
}


@pytest.mark.parametrize("what", OF_A_CLASS)
@pytest.mark.parametrize("how", ["argument", "closure", "plain jax", "in a base class"])
def test_a_class_of_modules(what, how):
    class Mine(Net):
        pass

    class Below(Mine):
        pass

    name, value = OF_A_CLASS[what]
    model = (Below if how == "in a base class" else Mine)()
    if how == "closure":
        f = nnx.jit(lambda: model())
    else:
        f = functools.partial((jax.jit if how == "plain jax" else nnx.jit)(lambda m: m()), model)
    other = nnx.jit(lambda m: m.w)
    lone = L(4)
    assert f() == model() == 6 and other(lone) == 4
    setattr(Mine, name, value)
    assert f() == model() != 6 and other(lone) == 4
    delattr(Mine, name)
    assert f() == model() == 6


def test_a_plain_base_of_a_module_class():
    class Mixin:
        factor = 2.0

        def scaled(self):
            return self.inner.w * self.factor

    class Mine(Mixin, Net):
        def __call__(self):
            return self.scaled()

    model, traces = Mine(), []
    f = nnx.jit(lambda m: (traces.append(1), m())[1])
    assert f(model) == f(model) == 6 and len(traces) == 1
    Mixin.factor = 3.0
    assert f(model) == 9
    Mixin.scaled = lambda self: self.inner.w
    assert f(model) == f(model) == 3 and len(traces) == 3


class Mode(enum.StrEnum):
    FAST = "fast"


class Yes:
    """Equal to everything."""

    def __init__(self, n):
        self.n = n

    def __eq__(self, other):
        return True

    def __hash__(self):
        return 0

    def __index__(self):
        return self.n


class Settings:
    def __init__(self, n):
        self.n = n

    def __index__(self):
        return self.n


class Own(nnx.Module):
    def __setattr__(self, name, value):
        vars(self)[name] = value


PAIRS = [
    ("fast", Mode.FAST), (np.dtype("float32"), "float32"), (1, True), (1, 1.0), (0.0, -0.0),
    (Yes(1), Yes(2)), ((1, "fast"), (1, Mode.FAST)), (Settings(1), Settings(2)),
]  # fmt: skip


@pytest.mark.parametrize("cls", [L, Own])
@pytest.mark.parametrize(
    "pair", PAIRS, ids=lambda p: f"{type(p[0]).__name__}-{type(p[1]).__name__}"
)
def test_a_static_value_counts_by_type_and_content(cls, pair):
    def code(m):
        x = m.mode
        number = x.__index__() if isinstance(x, Yes | Settings | int) else 0
        return jnp.array(len(repr(x)) + 100.0 * number if not hasattr(x, "n") else float(x.n))

    m = cls(0) if cls is L else cls()
    f, g = nnx.jit(code), jax.jit(code)
    for value in (*pair, *pair):
        m.mode = value
        assert f(m) == g(m) == code(m)


def test_settings_that_change_in_place():
    class Config:
        def __init__(self):
            self.lr, self.sizes, self.inner = 0.5, [1, 2], types.SimpleNamespace(k=3)

    m = L(1)
    m.config = Config()
    f = nnx.jit(lambda m: m.w * m.config.lr * len(m.config.sizes) * m.config.inner.k)
    assert f(m) == 3
    m.config.lr = 0.25
    assert f(m) == 1.5
    m.config.sizes.append(3)
    assert f(m) == 2.25
    m.config.inner.k = 6
    assert f(m) == 4.5
    count = len(f._plans.layouts)
    f(m)
    assert len(f._plans.layouts) == count


@pytest.mark.parametrize(
    "wrap",
    [nnx.jit, lambda f: nnx.jit(nnx.jit(f)), lambda f: nnx.jit(lambda: nnx.jit(f)())],
    ids=["jit", "jit of jit", "jit around jit"],
)
def test_a_write_through_a_replaced_method(wrap):
    class Box:
        def pick(self):
            return self.net

    box, other = Box(), L(50)
    box.net = L(1)

    def add():
        net = box.pick()
        net.w = net.w + 1
        return net.w

    f = wrap(add)
    assert f() == box.net.w == 2
    Box.pick = lambda self: other
    assert f() == other.w == 51 and f() == other.w == 52 and box.net.w == 2


SETTINGS = {"k": 1}
NESTED = {"a": {"k": [1]}}


class First:
    k = 1


class Other:
    k = 5


def _containers():
    class Box:
        table = {"k": 1}

    box = Box()
    box.items, here, seen = [1], {"k": 1}, {1}
    return [
        (lambda: SETTINGS["k"], lambda k: SETTINGS.update(k=k)),
        (lambda: NESTED["a"]["k"][0], lambda k: NESTED["a"].update(k=[k])),
        (lambda: here["k"], lambda k: here.update(k=k)),
        (lambda: box.items[0], lambda k: box.items.__setitem__(0, k)),
        (lambda: box.table["k"], lambda k: Box.table.update(k=k)),
        (lambda: sum(seen), lambda k: (seen.clear(), seen.add(k))),
    ]


TRANSFORMS = [
    nnx.jit,
    nnx.jit_filter,
    lambda f: lambda: nnx.cond(True, f, f),
    lambda f: lambda: nnx.scan(lambda c, _: (c, f()), None, None, length=1)[1][0],
]


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("which", range(6))
def test_what_a_container_of_settings_holds(which, transform):
    read, write = _containers()[which]
    w = nnx.Ref(jnp.array(1.0))
    write(1)
    f = transform(lambda: w.value * read())
    assert f() == f() == 1
    write(5)
    assert f() == f() == 5
    write(1)
    assert f() == 1


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_orders_bases_metaclasses_and_special_methods(transform):
    w = nnx.Ref(jnp.array(1.0))
    ordered = collections.OrderedDict(a=1, b=5)
    f = transform(lambda: w.value * next(iter(ordered.values())))
    assert f() == 1
    ordered.move_to_end("a")
    assert f() == 5

    class Under(First):
        pass

    f = transform(lambda: w.value * Under().k)
    assert f() == 1
    Under.__bases__ = (Other,)
    assert f() == 5

    class Meta(type):
        yes = False

        def __instancecheck__(cls, x):
            return cls.yes

    class Asked(metaclass=Meta):
        pass

    f = transform(lambda: w.value * (5 if isinstance(w, Asked) else 1))
    assert f() == 1
    Meta.yes = True
    assert f() == 5

    class Called:
        def __call__(self):
            return 1

    called = Called()
    f = transform(lambda: w.value * called())
    assert f() == 1
    Called.__call__ = lambda self: 5
    assert f() == 5

    @functools.singledispatch
    def dispatched(x):
        return 1

    f = transform(lambda: w.value * dispatched(1))
    assert f() == 1
    dispatched.register(int, lambda x: 5)
    assert f() == 5


def test_what_is_noted_in_a_list_costs_no_trace():
    traces = []

    class Trainer:
        def __init__(self):
            self.w = nnx.Ref(jnp.array(1.0))
            self.losses, self.best = [], {}
            self.step = nnx.jit(self._step)

        def _step(self, x):
            traces.append(1)
            self.w.value = self.w.value + x
            return self.w.value

        def fit(self):
            for i in range(4):
                self.losses.append(float(self.step(1.0)))
                self.best["step"] = i

        def plot(self):
            return sum(self.losses)

    trainer = Trainer()
    trainer.fit()
    trainer.losses.append(0.0)
    trainer.step(1.0)
    assert len(traces) == 1 and trainer.plot() == 14

    log = []
    count = {"n": 0}

    @nnx.jit
    def noting(x):
        notes, n = log, count["n"]
        notes.append(1)
        count["n"] = n + 1
        return trainer.w.value * x + 0 * len(notes)

    for _ in range(6):
        noting(1.0)
    # The first trace shows that the body itself changes them.
    assert len(log) <= 2


def test_a_method_by_a_name_that_is_put_together():
    class Net(nnx.Module):
        def __init__(self):
            self.w = nnx.Ref(jnp.array(1.0))

    net = Net()

    class Agent:
        def act_fast(self):
            return net.w.value * SPEED["k"]

    agent = Agent()
    f = nnx.jit(lambda kind: getattr(agent, f"act_{kind}")(), static_argnums=0)
    SPEED["k"] = 1
    assert f("fast") == 1
    net.w.value = jnp.array(2.0)
    assert f("fast") == 2
    SPEED["k"] = 5
    assert f("fast") == 10


SPEED = {"k": 1}


# ---- a variable, whatever it holds


class Text(str):
    """A user's subclass of str."""

    __slots__ = ()


VALUES = {
    "number": (2.0, 3.0, "w * V"),
    "text": ("a", "bb", "w * len(V)"),
    "text of a class": (Text("a"), Text("bb"), "w * len(V)"),
    "nothing": (None, 3, "w * (2 if V is None else V)"),
    "array": (jnp.ones(2), jnp.zeros(2), "(w * V).sum()"),
    "NumPy array": (np.ones(2), np.zeros(2), "(w * V).sum()"),
    "key": (jax.random.key(0), jax.random.key(1), "w * jax.random.uniform(V)"),
    "dtype": (jnp.float32, jnp.int32, "(w * 1.5).astype(V)"),
    "NumPy dtype": (np.dtype("float32"), np.dtype("int32"), "(w * 1.5).astype(V)"),
    "function": (jnp.sin, jnp.cos, "V(w)"),
    "jitted function": (jax.nn.relu, jax.nn.gelu, "V(-w)"),
    "function in C": (math.sin, math.cos, "w * V(1.0)"),
    "partial": (functools.partial(jnp.add, 1), functools.partial(jnp.add, 2), "V(w)"),
    "dict": ({"a": 1}, {"a": 2}, "w * V['a']"),
    "dict of arrays": ({"a": jnp.ones(())}, {"a": jnp.zeros(())}, "w * V['a']"),
    "long list": (list(range(2000)), list(range(1, 2001)), "w * V[0]"),
    "set": ({1}, {2}, "w * (1 in V)"),
    "deque": (collections.deque([1]), collections.deque([2]), "w * V[0]"),
    "bytearray": (bytearray([1]), bytearray([2]), "w * V[0]"),
    "writable memory": (memoryview(bytearray([1])), memoryview(bytearray([2])), "w * V[0]"),
    "slice of a list": (slice([1]), slice([2]), "w * V.stop[0]"),
    "signature with a list": (inspect.signature(lambda x=[1]: x), inspect.signature(lambda x=[2]: x),
                              "w * V.parameters['x'].default[0]"),
    "named tuple with a list": (inspect.FullArgSpec([], None, None, ([1],), [], None, {}),
                                inspect.FullArgSpec([], None, None, ([2],), [], None, {}), "w * V.defaults[0][0]"),
    "annotation with a list": (typing.Annotated[int, [1]], typing.Annotated[int, [2]], "w * V.__metadata__[0][0]"),
    "Partition": (nnx.Partition({"a": jnp.ones(())}), nnx.Partition({"a": jnp.zeros(())}), "w * V['a']"),
    "optimizer": (optax.sgd(0.5), optax.sgd(0.25), "V.update(w, V.init(w))[0]"),
}  # fmt: skip

WAYS = {
    "global": "def f(w): return {}\ndef put(x):\n    global V\n    V = x",
    "helper": "def h(w): return {}\ndef f(w): return h(w)\ndef put(x):\n    global V\n    V = x",
    "cell": "def make(V):\n    f = lambda w: {}\n    def put(x):\n        nonlocal V\n        V = x\n"
    "    return f, put\nf, put = make(V)",
    "module": "def f(w): return {module}\ndef put(x): settings.V = x",
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("what", VALUES)
def test_a_variable(what, way):
    first, second, code = VALUES[what]
    settings = types.ModuleType("settings_of_a_test")
    settings.V = first
    scope = {"jax": jax, "V": first, "settings": settings, "__name__": "user"}
    text = WAYS[way].replace("{module}", code.replace("V", "settings.V")).replace("{}", code)
    exec(text, scope)
    f, put, w = scope["f"], scope["put"], jnp.array(2.0)
    jitted = nnx.jit(f)
    for _ in range(2):
        assert_same(jitted(w), f(w))
        assert_same(nnx.cond(w > 0, f, f, w), f(w))
        before = jitted(w)
        put(second)
        assert_same(jitted(w), f(w))
        assert_same(nnx.cond(w > 0, f, f, w), f(w))
        assert before.dtype != jitted(w).dtype or before != jitted(w)
        put(first)


@pytest.mark.parametrize("make", [list, collections.deque, bytearray])
def test_a_sequence_in_a_variable_that_changes_in_place(make):
    numbers = make([1, 2])
    f = nnx.jit(lambda w: w * numbers[0])
    assert f(1.0) == 1
    numbers[0] = 7
    assert f(1.0) == 7


def assert_same(a, b):
    a, b = jnp.asarray(a), jnp.asarray(b)
    assert a.dtype == b.dtype
    np.testing.assert_allclose(a, b, rtol=1e-6)


def test_a_number_in_a_variable_that_is_new_in_each_call_is_warned_of():
    rate, step = 0.1, 0
    by_rate = nnx.jit(lambda w: w * rate)
    by_step = nnx.jit(lambda w: w + step)
    message = r"5 times in a row only because the value of {} changed, the last time {}\. A value that the "
    message += r"function reads from a variable is part of the program\. Keep it in a Ref"
    with pytest.warns(UserWarning, match=message.format("rate", r"0\.5 → 0\.6")):
        for i in range(6):
            rate = (i + 1) / 10
            by_rate(1.0)
    with pytest.warns(UserWarning, match=message.format("step", "4 → 5")):
        for step in range(6):
            by_step(1.0)
