"""Modules that a function does not reach through its own variables: found and watched, or an error."""

import collections
import contextvars
import functools
import gc
import sys
import threading
import types
import weakref

import jax
import jax.numpy as jnp
import pytest

import nnx
from nnx import ClosureError
from nnx.transforms.looking import Graph


class Scale(nnx.Module):
    w: jax.Array = nnx.param()

    def __init__(self, w):
        self.w = jnp.array(float(w))

    def __call__(self, x):
        return self.w * x


class Net(nnx.Module):
    def __init__(self, w):
        self.head = Scale(w)

    def __call__(self, x):
        return self.head(x)


class Agent:
    def __init__(self, w):
        self.net = Net(w)


class Slotted:
    __slots__ = ("inner", "net")


@pytest.fixture
def lib(monkeypatch):
    """A user's Python module, with a model and a function that uses it."""
    module = types.ModuleType("users_lib")
    exec(
        "def apply(x):\n    return model(x)\ndef late(x):\n    return 2.0 * apply(x)\n",
        vars(module),
    )
    vars(module).update(model=Net(1), Net=Net)
    monkeypatch.setitem(sys.modules, "users_lib", module)
    return module


SHARED = Scale(1)
MAYBE = None


class Uses(nnx.Module):
    def __call__(self, x):
        return SHARED(x)


class Might(nnx.Module):
    def __call__(self, x):
        return x if MAYBE is None else MAYBE(x)


class Trainer:
    def step(self, x):
        return SHARED(x)

    __call__ = step

    @staticmethod
    def static(x):
        return SHARED(x)

    @property
    def shared(self):
        return SHARED


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    monkeypatch.setitem(globals(), "SHARED", Scale(1))
    monkeypatch.setitem(globals(), "MAYBE", None)


def rebind(name, value):
    globals()[name] = value


class Traced:
    """A compiled function that counts how often it is traced."""

    def __init__(self, fn):
        self.count = 0

        def counted(*args):
            self.count += 1
            return fn(*args)

        self.jitted = nnx.jit(counted)

    def __call__(self, *args):
        return float(self.jitted(*args))


# ---- modules


def test_an_attribute_of_an_imported_module(lib):
    f = Traced(lambda x: lib.model(x))
    assert f(1.0) == 1 and f(1.0) == 1
    assert f.count == 2  # one more than without a closure
    lib.model = Net(5)
    assert f(1.0) == 5
    assert f.count == 2  # another model of the same structure costs no trace
    lib.model.head = Scale(6)
    assert f(1.0) == 6
    lib.model.head.w = jnp.array(7.0)
    assert f(1.0) == 7


def test_a_function_of_an_imported_module(lib):
    f, g = nnx.jit(lambda x: lib.apply(x)), nnx.jit(lambda x: lib.late(x))
    assert (f(1.0), g(1.0)) == (1, 2)
    lib.model = Net(5)
    assert (f(1.0), g(1.0)) == (5, 10)


def test_an_import_in_the_body(lib):
    @nnx.jit
    def f(x):
        from users_lib import model

        return model(x)

    @nnx.jit
    def g(x):
        import users_lib as other

        return other.model(x)

    assert f(1.0) == g(1.0) == 1
    lib.model = Net(5)
    assert f(1.0) == g(1.0) == 5


def test_a_module_kept_in_an_attribute(lib):
    box = types.SimpleNamespace(home=lib)
    f = nnx.jit(lambda x: box.home.model(x))
    assert f(1.0) == 1
    lib.model = Net(5)
    assert f(1.0) == 5


def test_eval_on_an_ancestor_reaches_the_program(lib):
    lib.model = nnx.Sequential(Scale(1), nnx.Dropout(1.0)).train()
    f = nnx.jit(lambda x: lib.model(x))
    with nnx.scope(0):
        assert f(jnp.ones(4)).sum() == 0
        lib.model.eval()
        assert f(jnp.ones(4)).sum() == 4


def test_writes_go_to_the_module_that_is_there_now(lib):
    def bump():
        lib.model.head.w = lib.model.head.w + 1

    f = nnx.jit(bump)
    f()
    first, lib.model = lib.model, Net(10)
    f()
    assert (first.head.w, lib.model.head.w) == (2, 11)


def test_a_module_attribute_that_was_none(lib):
    lib.model = None
    f = nnx.jit(lambda x: x if lib.model is None else lib.model(x))
    assert f(1.0) == 1
    lib.model = Net(5)
    assert f(1.0) == 5
    lib.model = None
    assert f(1.0) == 1
    lib.model = Net(6)
    assert f(1.0) == 6


# ---- containers of objects


def test_a_list_of_objects():
    agents = [Agent(1), Agent(2)]
    f = Traced(lambda x: agents[0].net(x))
    assert f(1.0) == 1
    agents[0].net = Net(5)
    assert f(1.0) == 5
    agents[0] = Agent(7)
    assert f(1.0) == 7
    assert f.count == 2
    agents[0].net.head = Scale(8)
    assert f(1.0) == 8
    agents.reverse()
    assert f(1.0) == 2


def test_a_list_of_objects_that_grows():
    agents = []
    f = nnx.jit(lambda x: sum([a.net(x) for a in agents], 0.0))
    assert f(1.0) == 0
    agents.append(Agent(1))
    assert f(1.0) == 1
    agents.append(Agent(2))
    assert f(1.0) == 3
    agents.pop(0)
    assert f(1.0) == 2
    agents.clear()
    assert f(1.0) == 0


def test_a_dict_of_objects():
    table = {"a": Agent(1), 2: [Agent(2)]}
    f = nnx.jit(lambda x: table["a"].net(x) + 10 * table[2][0].net(x))
    assert f(1.0) == 21
    table["a"].net.head = Scale(5)
    assert f(1.0) == 25
    table[2][0] = Agent(3)
    assert f(1.0) == 35
    table["a"], table[2] = table[2][0], [table["a"]]
    assert f(1.0) == 53


def test_two_names_of_one_object_that_part():
    first = Agent(1)
    agents, best = [first], {"it": first}
    f = nnx.jit(lambda x: agents[0].net(x) + 10 * best["it"].net(x))
    assert f(1.0) == 11
    best["it"] = Agent(2)
    assert f(1.0) == 21
    best["it"] = first
    assert f(1.0) == 11


def test_a_name_that_goes_from_one_known_object_to_another():
    a, b = Agent(1), Agent(2)
    current = a

    f = nnx.jit(lambda x: current.net(x) + 0 * (a.net(x) + b.net(x)))
    assert f(1.0) == 1
    current = b
    assert f(1.0) == 2


@pytest.mark.parametrize(
    "make",
    [
        lambda net: collections.deque([net]),
        lambda net: collections.OrderedDict({0: net}),
        lambda net: collections.UserList([net]),
        lambda net: collections.defaultdict(list, {0: net}),
    ],
)
def test_other_containers(make):
    box = make(Net(1))
    f = nnx.jit(lambda x: box[0](x))
    assert f(1.0) == 1
    box[0] = Net(5)
    assert f(1.0) == 5
    box[0].head = Scale(6)
    assert f(1.0) == 6


def test_a_set_of_modules():
    models = {Net(1)}
    f = nnx.jit(lambda x: sum([m(x) for m in models], 0.0))
    assert f(1.0) == 1
    models.add(Net(2))
    assert f(1.0) == 3


def test_a_list_of_functions_that_close_over_modules():
    nets = [Net(1), Net(2)]
    steps = [lambda x, n=net: n(x) for net in nets]
    f = nnx.jit(lambda x: steps[0](x))
    assert f(1.0) == 1
    steps.reverse()
    assert f(1.0) == 2


def test_plain_data_is_not_walked_and_a_container_of_it_may_come_to_hold_a_module():
    data = list(range(100_000))
    table = {"rows": [{"x": i, "y": str(i)} for i in range(5000)]}
    config = {"net": None}
    net = Net(3)

    def f(x):
        out = x if config["net"] is None else config["net"](x)
        return out + len(data) + len(table["rows"])

    g = Graph([("", f, False)])
    assert len(g.objects) < 20
    compiled = nnx.jit(f)
    assert compiled(1.0) == 105001
    config["net"] = net
    assert compiled(1.0) == 105003


# ---- objects


def test_objects_with_slots():
    box = Slotted()
    box.inner = Slotted()
    box.inner.net = Net(1)
    f = Traced(lambda x: box.inner.net(x))
    assert f(1.0) == 1
    box.inner.net = Net(5)
    assert f(1.0) == 5
    box.inner = Slotted()
    box.inner.net = Net(6)
    assert f(1.0) == 6
    assert f.count == 2


def test_globals_in_methods_of_helpers_and_of_callable_objects():
    trainer = Trainer()
    fns = [
        nnx.jit(lambda x: trainer.step(x)),
        nnx.jit(lambda x: Trainer.static(x)),
        nnx.jit(lambda x: trainer.shared(x)),
        nnx.jit(lambda x: Trainer().step(x)),
        nnx.jit(trainer.step),
        nnx.jit(trainer),
        nnx.jit(functools.partial(Trainer.step, trainer)),
    ]
    assert [float(f(1.0)) for f in fns] == [1] * 7
    rebind("SHARED", Scale(5))
    assert [float(f(1.0)) for f in fns] == [5] * 7
    SHARED.w = jnp.array(6.0)
    assert [float(f(1.0)) for f in fns] == [6] * 7


def test_an_attribute_of_the_class_of_an_object():
    class Base:
        net = Net(1)

    class Derived(Base):
        pass

    box = Derived()
    f = nnx.jit(lambda x: box.net(x))
    assert f(1.0) == 1
    Base.net = Net(5)
    assert f(1.0) == 5


def test_a_function_with_attributes():
    def step(x):
        return step.net(x)

    step.net = Net(1)
    f = nnx.jit(lambda x: step(x))
    assert f(1.0) == 1
    step.net = Net(5)
    assert f(1.0) == 5


def test_a_weak_reference():
    net = Net(1)
    ref = weakref.ref(net)
    f = nnx.jit(lambda x: ref()(x))
    assert f(1.0) == 1
    net.head = Scale(5)
    assert f(1.0) == 5
    other = Net(6)
    ref = weakref.ref(other)
    assert f(1.0) == 6


def test_a_context_variable():
    var = contextvars.ContextVar("net")
    token = var.set(Net(1))
    f = nnx.jit(lambda x: var.get()(x))
    assert f(1.0) == 1
    var.reset(token)
    var.set(Net(5))
    assert f(1.0) == 5


def test_a_cached_function():
    @functools.lru_cache
    def get(w):
        return Net(w)

    get(1), get(5)
    which = 1
    f = nnx.jit(lambda x: get(1)(x))
    assert f(1.0) == 1
    get(1).head = Scale(which + 5)
    assert f(1.0) == 6


def test_a_name_in_a_string(lib):
    f = nnx.jit(lambda x: globals()["SHARED"](x))
    g = nnx.jit(lambda x: getattr(lib, "model")(x))  # noqa: B009
    h = nnx.jit(lambda x: vars(sys.modules["users_lib"])["model"](x))
    assert f(1.0) == g(1.0) == 1
    rebind("SHARED", Scale(5))
    lib.model = Net(5)
    assert f(1.0) == g(1.0) == 5
    with pytest.raises(ClosureError, match=r"Ref Scale\.w .*was read by closure in nnx\.jit"):
        h(1.0)


def test_no_code_of_the_users_runs_while_looking():
    ran = []

    class Odd:
        def __init__(self):
            self.net = Net(1)

        def __getattribute__(self, name):
            ran.append(name)
            return object.__getattribute__(self, name)

        @property
        def __class__(self):
            ran.append("__class__")
            return int

        @property
        def heavy(self):
            ran.append("heavy")

        def __eq__(self, other):
            ran.append("__eq__")
            return True

        def __hash__(self):
            ran.append("__hash__")
            return 1

        def __iter__(self):
            ran.append("__iter__")
            return iter(())

        def __len__(self):
            ran.append("__len__")
            return 0

    odd, table = Odd(), {}
    table[Odd()] = [odd]

    def f(x):
        return odd.net(x) + len(table)

    ran.clear()
    graph = Graph([("", f, False)])
    assert ran == []
    assert any(type(e.candidate) is Net for e in graph.edges)
    compiled = nnx.jit(f)
    assert compiled(1.0) == 2
    assert set(ran) <= {"net", "__class__"} and "heavy" not in ran


# ---- code that the arguments bring


def test_a_global_in_a_method_of_an_argument():
    f, m = Traced(lambda m, x: m(x)), Uses()
    assert f(m, 1.0) == 1
    rebind("SHARED", Scale(5))
    assert f(m, 1.0) == 5
    assert f.count == 2
    g = nnx.jit(m)
    assert g(1.0) == 5
    rebind("SHARED", Scale(6))
    assert f(m, 1.0) == g(1.0) == 6


def test_a_global_in_a_method_of_an_argument_that_was_none():
    f, m = Traced(lambda m, x: m(x)), Might()
    assert f(m, 1.0) == 1 and f(m, 1.0) == 1
    assert f.count == 1
    rebind("MAYBE", Scale(5))
    assert f(m, 1.0) == 5
    rebind("MAYBE", None)
    assert f(m, 1.0) == 1


def test_a_function_in_a_module():
    other = Scale(1)
    model = nnx.Sequential(lambda x: other(x))
    f = nnx.jit(lambda m, x: m(x))
    g = nnx.jit(lambda x: model(x))
    assert f(model, 1.0) == g(1.0) == 1
    other = Scale(5)
    assert f(model, 1.0) == g(1.0) == 5
    another = Scale(2)
    model.layers.append(lambda x: another(x))
    assert f(model, 1.0) == g(1.0) == 10
    another = Scale(3)
    assert f(model, 1.0) == g(1.0) == 15


def test_a_function_that_is_an_argument():
    net = Net(1)
    f = nnx.jit(lambda fn, x: fn(x), static_argnums=0)
    apply = lambda x: net(x)
    assert f(apply, 1.0) == 1
    g = nnx.jit(lambda fn, x: fn(x))
    part = jax.tree_util.Partial(apply)
    assert g(part, 1.0) == 1
    net = Net(5)
    assert f(apply, 1.0) == g(part, 1.0) == 5


def test_jit_filter_looks_as_jit_does(lib):
    f, m = nnx.jit_filter(lambda m, x: m(x) + lib.model(x)), Uses()
    assert f(m, 1.0) == 2
    rebind("SHARED", Scale(5))
    lib.model = Net(6)
    assert f(m, 1.0) == 11


# ---- a plain value that becomes a module


@pytest.mark.parametrize("value", [False, None])
def test_a_plain_value_that_becomes_a_module(value):
    m = value
    f = Traced(lambda x: m(x) if m else x)
    assert f(1.0) == 1
    m = Scale(5)
    assert f(1.0) == 5
    m = value
    assert f(1.0) == 1
    assert f.count == 2
    m = Agent(2)
    g = nnx.jit(lambda x: m.net(x) if m else x)
    assert g(1.0) == 2
    m = value
    assert g(1.0) == 1


def test_a_global_that_is_not_bound_yet():
    scope = {"net": None}
    exec(
        "def fn(x):\n    try:\n        return LATER(x)\n    except NameError:\n        return x",
        scope,
    )
    f = nnx.jit(scope["fn"])
    assert f(1.0) == 1
    scope["LATER"] = Net(5)
    assert f(1.0) == 5


def test_a_number_in_a_variable_is_a_part_of_the_program():
    debug, step = False, 0
    f = Traced(lambda x: x + (1 if debug else 0) * step)
    results, traces = [], []
    for debug, step in [(False, 1), (True, 1), (True, 1), (True, 2), (False, 1)]:  # noqa: B007
        results.append(int(f(1.0)))
        traces.append(f.count)
    assert results == [1, 2, 2, 3, 1]
    # The old value already has a program.
    assert traces == [1, 2, 2, 3, 3]
    assert f.jitted._closure._state.roots == ()


def test_a_variable_that_the_code_sets_costs_no_trace():
    calls = 0

    def count(x):
        nonlocal calls
        calls += 1
        return x

    f = nnx.jit(count)
    for _ in range(3):
        f(1.0)
    assert calls == 1
    scope = {"calls": 0, "nnx": nnx}
    exec("def count(x):\n    global calls\n    calls += 1\n    return x\nf = nnx.jit(count)", scope)
    for _ in range(3):
        scope["f"](1.0)
    assert scope["calls"] == 1


# ---- an error for the rest


class Sealed:
    """Stands for a class of a library, which the search does not enter."""

    __module__ = "jax.sealed"

    def __init__(self, net):
        self.net = net


@pytest.mark.parametrize("transform", [nnx.jit, nnx.jit_filter])
def test_what_looking_cannot_find_is_an_error(transform):
    box = Sealed(Net(1))

    def call(x):
        return box.net(x)

    f = transform(call)
    for _ in range(2):
        with pytest.raises(ClosureError) as info:
            f(1.0)
        message = str(info.value)
        assert "Ref Scale.w (collection 'params', float32[])" in message
        assert "was read by closure in nnx.jit" in message
        assert "Pass the module to the function as an argument" in message
    # As an argument it works.
    assert transform(lambda net, x: net(x))(box.net, 1.0) == 1


def test_after_the_error_the_function_works_with_what_it_finds():
    box, net = Sealed(Net(1)), None
    f = nnx.jit(lambda x: box.net(x) if net is None else net(x))
    with pytest.raises(ClosureError):
        f(1.0)
    net = box.net
    assert f(1.0) == 1


def test_an_array_that_is_a_new_constant_each_time_is_warned_of():
    class Table(nnx.Module):
        def __init__(self):
            self.inner = nnx.Sequential(Scale(1))
            self.rows = jnp.zeros(2)

    table = Table()
    f = nnx.jit(lambda: table.rows.sum())
    with pytest.warns(UserWarning, match=r"'rows', a plain array of a module that a compiled"):
        for i in range(20):
            assert f() == 2 * i
            table.rows = table.rows + 1


# ---- nothing else changes


def test_what_is_not_used_is_not_an_input(lib):
    lib.other = Net(2)
    agents = [Agent(1), Agent(2)]
    f = nnx.jit(lambda x: lib.model(x) + agents[1].net(x))
    assert f(1.0) == 3
    nets = [x for x in f._closure.roots() if isinstance(x, Net)]
    assert nets == [agents[1].net, lib.model] or nets == [lib.model, agents[1].net]


def test_a_module_that_no_step_leads_to_any_more_is_freed(lib):
    f = nnx.jit(lambda x: lib.model(x))
    f(1.0)
    old = weakref.ref(lib.model)
    lib.model = Net(5)
    f(1.0)
    gc.collect()
    assert old() is None


def test_a_program_without_what_was_read_is_never_used_again(lib):
    f = nnx.jit(lambda x: lib.model(x) if "model" in vars(lib) else x)
    assert f(1.0) == 1
    del lib.model
    assert f(1.0) == 1
    lib.model = Net(3)
    assert f(1.0) == 3


def test_in_nested_compiled_functions(lib):
    agents = [Agent(2)]

    @nnx.jit
    def outer(x):
        @nnx.jit
        def inner(y):
            agents[0].net.head.w = agents[0].net.head.w + 1
            return lib.model(y) * agents[0].net(y)

        return inner(x) + lib.model(x)

    assert outer(1.0) == 4 and outer(1.0) == 5
    lib.model, agents[0] = Net(10), Agent(0)
    assert outer(1.0) == 20
    assert agents[0].net.head.w == 1


def test_threads_that_rebind_and_call():
    boxes = [Slotted() for _ in range(4)]
    errors = []

    def work(i):
        box = boxes[i]
        box.net = Net(0)
        f = nnx.jit(lambda x: box.net(x))
        try:
            for w in range(10):
                box.net = Net(w)
                assert f(1.0) == w == float(shared(1.0)) - 1 + w
        except Exception as error:  # pragma: no cover
            errors.append(error)

    shared = nnx.jit(lambda x: SHARED(x))
    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert errors == []


def test_a_plain_array_of_a_module_in_another_file(lib):
    lib.model.table = jnp.ones(2)
    f = Traced(lambda x: x + lib.model.table.sum())
    assert f(1.0) == f(1.0) == 3 and f.count == 1
    lib.model.table = jnp.zeros(2)
    assert f(1.0) == f(1.0) == 1 and f.count == 2
    lib.model.head.w = jnp.array(7.0)
    assert f(1.0) == 1 and f.count == 2
