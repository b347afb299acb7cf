"""Settings that a function closes over, in whatever holds them: a change is seen by the next call."""

import argparse
import array
import collections
import collections.abc
import configparser
import contextvars
import dataclasses
import functools
import operator
import types

import jax.numpy as jnp
import pytest

import nnx


class Own:
    def __init__(self, **settings):
        self.__dict__.update(settings)


class Config(collections.UserDict):
    pass


class Named(dict):
    pass


class ByMethod(collections.abc.MutableMapping):
    def __init__(self, **settings):
        self._held = settings

    def __getitem__(self, key):
        return self._held[key]

    def __setitem__(self, key, value):
        self._held[key] = value

    def __delitem__(self, key):
        del self._held[key]

    def __iter__(self):
        return iter(self._held)

    def __len__(self):
        return len(self._held)


class ByAttribute:
    def __init__(self, **settings):
        object.__setattr__(self, "_held", settings)

    def __getattr__(self, name):
        return self._held[name]

    def __setattr__(self, name, value):
        self._held[name] = value


def _parsed():
    parser = configparser.ConfigParser()
    parser.read_dict({"model": {"rate": "1"}})
    return parser


def _named():
    found = Named()
    found.rate = 1
    return found


def _proxy(held=None):
    held = {"rate": 1} if held is None else held
    return types.MappingProxyType(held), held


def _in_context():
    found = contextvars.ContextVar("rate")
    found.set(1)
    return found


def _at(*keys):
    """What reads an item through others, and what makes it 5."""

    def read(x):
        return functools.reduce(lambda x, key: x[key], keys, x)

    def change(x):
        functools.reduce(lambda x, key: x[key], keys[:-1], x)[keys[-1]] = 5

    return read, change


def _attribute(name):
    return (lambda x: getattr(x, name)), (lambda x: setattr(x, name, 5))


def _same(rate):
    return rate


_Slots = dataclasses.make_dataclass("_Slots", ["rate"], slots=True)
_LOOSE = lambda: 0  # noqa: E731
SETTINGS = {
    "arguments of a program": (lambda: argparse.Namespace(rate=1), *_attribute("rate")),
    "slots of a class that is made": (lambda: _Slots(1), *_attribute("rate")),
    "a parsed file": (
        _parsed,
        lambda x: int(x["model"]["rate"]),
        lambda x: x["model"].update(rate="5"),
    ),
    "a UserDict": (lambda: collections.UserDict(rate=1), *_at("rate")),
    "a UserList": (lambda: collections.UserList([1]), *_at(0)),
    "a ChainMap": (lambda: collections.ChainMap({"rate": 1}), *_at("rate")),
    "a subclass of UserDict": (lambda: Config(rate=1), *_at("rate")),
    "attributes of a dict": (_named, *_attribute("rate")),
    "a mapping": (lambda: ByMethod(rate=1), *_at("rate")),
    "attributes by method": (lambda: ByAttribute(rate=1), *_attribute("rate")),
    "all attributes": (
        lambda: Own(rate=1),
        lambda x: sum(vars(x).values()),
        lambda x: x.__dict__.update(rate=2, more=3),
    ),
    "keywords": (
        lambda: Own(rate=1),
        lambda x: _same(**x.__dict__),
        lambda x: x.__dict__.update(rate=5),
    ),
    "a proxy": (_proxy, lambda x: x[0]["rate"], lambda x: x[1].update(rate=5)),
    "an array": (lambda: array.array("i", [1]), *_at(0)),
    "a deque": (lambda: collections.deque([{"rate": 1}]), *_at(0, "rate")),
    "a bytearray": (lambda: bytearray([1]), *_at(0)),
    "an argument of a partial": (
        lambda: functools.partial(lambda held: held[0], [1]),
        lambda x: x(),
        lambda x: x.args[0].__setitem__(0, 5),
    ),
    "a context variable": (_in_context, lambda x: x.get(), lambda x: x.set(5)),
    "beside a function": (lambda: [_LOOSE, 1], *_at(1)),
    "in a dict beside a function": (lambda: [_LOOSE, {"rate": 1}], *_at(1, "rate")),
    "in a list beside a function": (lambda: {"f": _LOOSE, "rates": [1]}, *_at("rates", 0)),
    "beside an object": (lambda: (Own(), [1]), *_at(1, 0)),
    "deep in dicts": (lambda: {"a": {"b": {"c": {"d": {"e": {"f": 1}}}}}}, *_at(*"abcdef")),
    "deep in lists": (lambda: [[[[[[1]]]]]], *_at(*[0] * 6)),
}
_NAME = "rate"
SETTINGS |= {
    "a name in a variable": (
        lambda: Own(rate=1),
        lambda x: getattr(x, _NAME),
        _attribute("rate")[1],
    ),
    "a name that is put together": (
        lambda: Own(rate=1),
        lambda x: getattr(x, "".join(["ra", "te"]), 0),
        _attribute("rate")[1],
    ),
    "a path of names": (
        lambda: Own(inner=Own(rate=1)),
        lambda x: functools.reduce(getattr, ["inner", "rate"], x),
        lambda x: setattr(x.inner, "rate", 5),
    ),
    "an attrgetter": (lambda: Own(rate=1), operator.attrgetter("rate"), _attribute("rate")[1]),
    "lists by computed names": (
        lambda: Own(rates=[1]),
        lambda x: sum(getattr(x, name)[0] for name in ["rates"]),
        lambda x: x.rates.__setitem__(0, 5),
    ),
}
TRANSFORMS = {
    "jit": nnx.jit,
    "scan": lambda f: lambda x: nnx.scan(lambda c, _: (c, f(x)), None, None, length=1)[1][0],
    "cond": lambda f: lambda x: nnx.cond(True, f, f, x),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("kind", SETTINGS)
def test_a_change_is_seen_and_costs_one_trace(kind, transform):
    make, read, change = SETTINGS[kind]
    settings, traces = make(), []

    def step(x):
        traces.append(1)
        return x * read(settings)

    run = TRANSFORMS[transform](step)
    assert float(run(jnp.array(2.0))) == 2
    before = len(traces)
    assert float(run(jnp.array(2.0))) == 2 and len(traces) == before
    change(settings)
    assert float(run(jnp.array(2.0))) == 10
    before = len(traces)
    assert float(run(jnp.array(2.0))) == 10 and len(traces) == before


def test_two_models_with_equal_proxies_are_not_mixed_up():
    class Model(nnx.Module):
        def __init__(self, settings):
            self.settings = settings

        def __call__(self, x):
            return x * self.settings["rate"]

    (first, held), (second, _) = _proxy(), _proxy()
    run = nnx.jit(lambda model, x: model(x))
    assert float(run(Model(first), 2.0)) == float(run(Model(second), 2.0)) == 2
    held["rate"] = 5
    assert float(run(Model(first), 2.0)) == 10
    assert float(run(Model(second), 2.0)) == 2


def test_what_a_body_notes_beside_other_things_costs_no_trace():
    log = [_LOOSE]

    @nnx.jit
    def step(x):
        log.append(1)
        return x

    for _ in range(3):
        step(1.0)
    assert log == [_LOOSE, 1]


class Scale(nnx.Module):
    def __init__(self, factor):
        self.factor = nnx.Ref(jnp.array(float(factor)))
        self.calls = nnx.Ref(jnp.array(0))

    def __call__(self, x):
        self.calls.value = self.calls.value + 1
        return x * self.factor.value


def test_a_class_in_a_list_gets_an_attribute_that_hides_that_of_its_base():
    class Base:
        net = Scale(1)

    class Sub(Base):
        pass

    held, first = [Sub], Base.net
    run = nnx.jit(lambda x: held[0].net(x))
    assert float(run(2.0)) == float(run(2.0)) == 2
    Sub.net = Scale(5)
    assert float(run(2.0)) == float(run(2.0)) == 10
    assert int(first.calls.value) == int(Sub.net.calls.value) == 2
    del Sub.net
    assert float(run(2.0)) == 2


def test_partials_as_attributes_count_by_what_they_hold():
    class Model(nnx.Module):
        def __init__(self, act):
            self.act = act

        def __call__(self, x):
            return self.act(x)

    def scale(x, by, more=(1,)):
        return x * by * more[0]

    run = nnx.jit(lambda model, x: model(x).sum())
    first, second = [Model(functools.partial(scale, by=2, more=[1])) for _ in range(2)]
    assert nnx.split(first)[0] is nnx.split(second)[0]
    assert float(run(first, jnp.ones(1))) == float(run(second, jnp.ones(1))) == 2
    first.act.keywords["by"] = 5
    assert float(run(first, jnp.ones(1))) == 5 and float(run(second, jnp.ones(1))) == 2
    first.act.keywords["more"][0] = 2
    assert float(run(first, jnp.ones(2))) == 20 and float(run(second, jnp.ones(2))) == 4


def test_a_constant_name_is_read_alone():
    settings, traces = Own(rate=1, epoch=0), []

    @nnx.jit
    def step(x):
        traces.append(1)
        return x * getattr(settings, "rate", 0) + getattr(settings, "shift", 0)

    for settings.epoch in range(3):
        assert float(step(jnp.array(2.0))) == 2
    assert len(traces) == 1
