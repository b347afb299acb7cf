"""Every error class, provoked as by a user, with a message that says where and what to do."""

import pickle
import threading

import jax
import jax.numpy as jnp
import pytest

import nnx
import refx
from nnx import Ref
from refx import errors
from tests.models import Dense, Net


def _kept_ref():
    kept = []
    nnx.jit(lambda m: kept.append(m))(Dense())
    return kept[0].w


def _kept_tracer():
    kept = []
    jax.jit(lambda x: kept.append(x) or x)(1.0)
    Dense().w = kept[0]


def _other_thread():
    caught = []

    def body(m):
        def use():
            try:
                caught.append(m.w)
            except nnx.RefError as error:
                caught.append(error)

        thread = threading.Thread(target=use)
        thread.start()
        thread.join()

    nnx.jit(body)(Dense())
    raise caught[0]


def _hidden_in_frozenset():
    net = Net()
    net.parts = frozenset(net.blocks)
    nnx.jit(lambda m: None)(net)


def _unhashable():
    net = Net()
    net.blocks[1].options = {1}
    nnx.jit(lambda m: None)(net)


def _not_mutable():
    with nnx.mutable("params"):
        Dense()(jnp.ones((1, 2)))


def _donated():
    dense = Dense()
    dense.w.delete()
    dense(jnp.ones((1, 2)))


def _closure():
    dense = Dense()
    jax.jit(lambda x: x @ dense.w)(jnp.ones((1, 2)))


def _plain_write():
    dense = Dense()
    jax.vmap(lambda x: dense(x))(jnp.ones((3, 1, 2)))


class Unset(nnx.Module):
    w: jax.Array = nnx.param()


# For each class: what the user did, and what the message must name and advise.
PROVOKED = [
    (errors.TraceLevelError, _plain_write, ["Dense.calls", "'counters'", "vmap", "nnx.vmap"]),
    (errors.TraceLevelError, _other_thread, ["'params'", "nnx.jit", "another thread"]),
    (
        errors.ReadOnlyError,
        lambda: jax.jit(lambda m: m(jnp.ones((1, 2))))(Dense()),
        ["Dense.calls", "jax.jit", "nnx.jit", "nnx.clone"],
    ),
    (errors.ForeignTracerError, _kept_tracer, ["Dense.w", "float32[]", "Return the value"]),
    (errors.EndedTraceError, _kept_ref, ["nnx.jit", "_kept_ref", "ended", "Return"]),
    (errors.ClosureError, _closure, ["Dense.w", "constant", "argument", "nnx.jit"]),
    (errors.DonationError, _donated, ["Dense.w", "donate", "clone(model, copy=True)"]),
    (errors.NotMutableError, _not_mutable, ["Dense.calls", "'counters'", "mutable", "Add"]),
    (errors.StructureError, _hidden_in_frozenset, ["parts", "frozenset", "Use a list"]),
    (errors.UnhashableStaticError, _unhashable, ["blocks.1.options", "set", "Use a tuple"]),
    (
        errors.UnpicklableStaticError,
        lambda: pickle.dumps(nnx.split([Dense(), {"act": lambda x: x}])),
        ["'1.act'", "<lambda>", "`def`"],
    ),
    (
        errors.UnknownPathError,
        lambda: nnx.update(Net(), {"blocks.7.w": jnp.ones(1)}),
        ["blocks.7.w", "blocks.0.w"],
    ),
    (
        errors.MissingPathError,
        lambda: nnx.merge(*nnx.split(Net(), nnx.PathContains("0"), ...)[:2]),
        ["blocks.1.w", "every partition"],
    ),
    (
        errors.UnmatchedPathError,
        lambda: nnx.split(Dense(), "params"),
        ["calls", "... as the last filter"],
    ),
    (
        errors.ShapeError,
        lambda: nnx.update(Net(), {"blocks.0.w": jnp.ones((3, 3))}),
        ["blocks.0.w", "(2, 2)", "(3, 3)", "strict=False"],
    ),
    (
        errors.DtypeError,
        lambda: nnx.update(Net(), {"blocks.0.w": jnp.ones((2, 2), "float16")}),
        ["blocks.0.w", "float32", "float16", "astype", "strict=False"],
    ),
    (errors.ValueTypeError, lambda: Ref([Dense()]), ["Dense", "attribute", "get_ref"]),
    (errors.FilterError, lambda: Dense()[["params"]], ["['params']", "tuple"]),
    (errors.UnsetFieldError, lambda: Unset().w, ["Unset.w", "__init__", "default"]),
    (nnx.MissingStreamError, lambda: nnx.make_rng("noise"), ["'noise'", "init", "apply", "scope"]),
    (nnx.MissingFlagError, lambda: nnx.get_flag("mode"), ["'mode'", "scope", "apply"]),
    (
        nnx.DifferentiationError,
        lambda: nnx.grad(lambda m: 0.0, wrt="weights")(Dense()),
        ["'weights'", "'params'"],
    ),
]


@pytest.mark.parametrize(
    "cls, provoke, words",
    PROVOKED,
    ids=[f"{i}-{c.__name__}" for i, (c, _, _) in enumerate(PROVOKED)],
)
def test_the_message_names_the_place_and_the_remedy(cls, provoke, words):
    with pytest.raises(cls) as caught:
        provoke()
    assert type(caught.value) is cls and isinstance(caught.value, nnx.RefError)
    text = str(caught.value)
    missing = [w for w in words if w not in text]
    assert not missing, text
    assert len(text) < 700


def test_every_class_is_provoked():
    provoked = {cls.__name__ for cls, _, _ in PROVOKED} | {"RefError"}
    assert set(errors.__all__) <= provoked
    assert all(getattr(refx, name) is getattr(nnx, name) for name in errors.__all__)


@pytest.mark.parametrize(
    "cls, builtin",
    [
        (errors.UnknownPathError, KeyError),
        (errors.MissingPathError, KeyError),
        (errors.ShapeError, ValueError),
        (errors.DtypeError, TypeError),
        (errors.UnsetFieldError, AttributeError),
        (errors.UnhashableStaticError, TypeError),
        (errors.UnpicklableStaticError, pickle.PicklingError),
    ],
)
def test_errors_are_caught_as_the_builtin_that_they_are(cls, builtin):
    assert issubclass(cls, builtin)
    assert str(cls("a 'quoted' message")) == "a 'quoted' message"


def test_a_write_through_another_name_does_not_slip_past_the_filter(net):
    with pytest.raises(nnx.UnknownPathError, match=r"blocks\.2\.w"):
        net["counters"] = {"blocks.2.w": jnp.ones((2, 2))}
    assert not (net.blocks[0].w == 1).all()


def test_writing_a_ref_of_an_ended_plain_transformation_says_that_it_ended():
    kept = []
    jax.jit(lambda x: kept.append(Ref(x, "params")) or x)(1.0)
    with pytest.raises(nnx.RefError, match="ended"):
        kept[0].value = 1.0
