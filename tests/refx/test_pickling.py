"""Pickles of structures: functions among the attributes, and what to do about a lambda."""

import copy
import functools
import pickle
import subprocess
import sys
import typing

import cloudpickle
import jax
import jax.numpy as jnp
import pytest

import refx


def doubled(x):
    return 2 * x


class Thing(refx.Node):
    def __init__(self, fn):
        self.w = refx.Ref(jnp.arange(2.0), "params", kind=jnp.tanh)
        self.parts = [(1, fn), {"fn": fn}]


def trip(x):
    return pickle.loads(pickle.dumps(x))


FUNCTIONS = [
    doubled, jax.nn.relu, jax.nn.silu, jnp.tanh, jnp.add, jnp.float32, jax.nn.initializers.zeros,
    functools.partial(doubled), int, jax.lax.Precision.HIGH, jax.sharding.PartitionSpec("a"),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(FUNCTIONS)))
def test_a_structure_with_functions(number):
    fn = FUNCTIONS[number]
    dagdef, partition = refx.split(Thing(fn))
    again, values = trip((dagdef, partition))
    # A partial equals only itself.
    assert again is dagdef or isinstance(fn, functools.partial)
    back = refx.merge(again, values)
    assert type(back.parts[0][1]) is type(fn) and (back.w.value == jnp.arange(2.0)).all()
    if not isinstance(fn, functools.partial):
        assert back.parts[1]["fn"] == fn


@pytest.mark.parametrize(
    "fn, what",
    [
        (lambda x: x, "test_pickling.*<lambda>|<lambda>"),
        (jax.nn.initializers.normal(), "normal.<locals>.init"),
        (functools.partial(lambda x: x), "partial"),
        (sys, "module"),
    ],
)
def test_what_pickle_cannot_write_is_named(fn, what):
    dagdef, partition = refx.split(Thing(fn))
    message = rf"Attribute 'parts\.(0\.1|1\.fn)' is ({what}), which pickle cannot write.*`def` at"
    with pytest.raises(refx.UnpicklableStaticError, match=message) as error:
        pickle.dumps((dagdef, partition))
    assert isinstance(error.value, pickle.PicklingError)
    with pytest.raises(refx.UnpicklableStaticError, match="The tree is .*<lambda>"):
        pickle.dumps(refx.split(lambda x: x))
    # Copies hold the functions themselves.
    assert copy.deepcopy(dagdef) is copy.copy(dagdef) is dagdef


def test_a_lambda_in_metadata_is_named():
    tree = {"a": refx.Ref(1.0, "params", init=lambda: 0)}
    with pytest.raises(refx.UnpicklableStaticError, match="Attribute 'a.init' is .*<lambda>"):
        pickle.dumps(refx.split(tree)[0])


def test_picklers_that_know_lambdas_still_write_them():
    again = pickle.loads(cloudpickle.dumps(refx.split(Thing(lambda x: 3 * x))))
    assert refx.merge(*again).parts[0][1](2) == 6


def test_another_program_reads_it(tmp_path):
    path = tmp_path / "m.pickle"
    path.write_bytes(pickle.dumps(refx.split(Thing(jax.nn.relu))))
    read = f"import pickle, refx; t = refx.merge(*pickle.load(open({str(path)!r}, 'rb'))); "
    check = "print(float(t.parts[0][1](-1.0)), t.w.value.tolist())"
    done = subprocess.run(
        [sys.executable, "-c", read + check], check=True, capture_output=True, text=True
    )
    assert done.stdout.split() == ["0.0", "[0.0,", "1.0]"]


def test_a_deep_structure():
    tree = [lambda: 0]
    for _ in range(2000):
        tree = [tree]
    with pytest.raises(refx.UnpicklableStaticError, match=r"Attribute '(0\.)+0' is .*<lambda>"):
        pickle.dumps(refx.split(tree)[0])


T = typing.TypeVar("T")


class Box(refx.Node, typing.Generic[T]):
    def __init__(self, n=1):
        self.n = n
        self.w = refx.Ref(1.0)


class Small(Box[int], typing.Generic[T]):
    pass


def test_a_generic_class_with_parameters_has_the_same_structure():
    for plain, made in [(Box(), Box[int]()), (Small(), Small[str]()), (Box(2), Box[T][int](2))]:
        assert refx.split(plain)[0] is refx.split(made)[0]
        assert list(vars(made)) == ["n", "w"] and jax.tree.structure(plain) == jax.tree.structure(
            made
        )
    assert trip(refx.split(Box[int]()))[0] is refx.split(Box())[0]
