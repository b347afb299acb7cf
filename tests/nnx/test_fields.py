"""Fields: declarations in a class, and the `__init__` generated from them."""

import jax
import jax.numpy as jnp
import pytest

import nnx
from tests.models import Dense


def test_fields_read_values_and_write_refs(dense):
    ref = nnx.get_ref(dense, "w")
    dense.w = dense.w * 0
    assert nnx.get_ref(dense, "w") is ref and (ref.value == 0).all()
    assert ref.collection == "params" and nnx.get_ref(dense, "calls").collection == "counters"


def test_a_field_may_be_none_and_may_be_tied(dense):
    other = Dense(seed=5)
    other.w = nnx.get_ref(dense, "w")
    dense.w = jnp.ones((2, 2))
    assert (other.w == 1).all() and len(nnx.refs([dense, other])) == 5
    other.b = None
    assert other.b is None and "b" not in other["params"]
    other.b = jnp.ones(2)
    assert nnx.get_ref(other, "b").collection == "params"


def test_an_unset_field_says_so():
    class Half(nnx.Module):
        w: jax.Array = nnx.param()
        n: int = nnx.static()

    half = Half()
    with pytest.raises(nnx.UnsetFieldError, match=r"Half\.w was read before it was set.*__init__"):
        _ = half.w
    with pytest.raises(AttributeError, match=r"Half\.n"):
        _ = half.n
    assert not hasattr(half, "w")


def test_get_ref_explains_itself(dense):
    with pytest.raises(nnx.UnsetFieldError, match=r"no attribute 'x'. Its Ref .* w, b, calls"):
        nnx.get_ref(dense, "x")
    dense.x = 1
    with pytest.raises(nnx.ValueTypeError, match=r"Dense\.x holds int"):
        nnx.get_ref(dense, "x")


def test_defaults_are_made_for_each_instance():
    class Counter(nnx.Module):
        n: jax.Array = nnx.ref("counters", default_factory=lambda: jnp.array(3))
        k: int = nnx.static(default=2)

    a, b = Counter(), Counter()
    a.n = jnp.array(4)
    assert (int(a.n), int(b.n), a.k) == (4, 3, 2)
    with pytest.raises(ValueError, match="All instances would share a list"):
        nnx.param(default=[])
    with pytest.raises(ValueError, match="not both"):
        nnx.param(default=1, default_factory=int)


def test_dataclass_makes_an_init():
    @nnx.dataclass
    class Affine(nnx.Module):
        w: jax.Array = nnx.param()
        act: str = nnx.static(default="relu", kw_only=True)
        b: jax.Array | None = nnx.param(default=None)
        n: jax.Array = nnx.ref("counters", default_factory=lambda: jnp.array(0), init=False)
        layers: list = nnx.static(default=())

    a = Affine(jnp.ones(2), act="tanh")
    assert (
        a.act == "tanh" and a.b is None and int(a.n) == 0 and list(nnx.refs(a)) == [("w",), ("n",)]
    )
    assert a != Affine(jnp.ones(2))
    with pytest.raises(TypeError, match="'w'"):
        Affine()


def test_fields_are_inherited_and_overridden():
    class Base(nnx.Module):
        w: jax.Array = nnx.param()

    class Frozen(Base):
        w: jax.Array = nnx.ref("frozen")

    class Fixed(Base):
        w = 3

    frozen = Frozen()
    frozen.w = jnp.ones(1)
    assert nnx.get_ref(frozen, "w").collection == "frozen"
    assert Fixed().w == 3


@pytest.mark.parametrize(
    "make, name",
    [
        (
            lambda: nnx.param(jnp.ones(3)),
            r"nnx\.param declares.*of type ArrayImpl.*= nnx\.param\(\)`",
        ),
        (lambda: nnx.ref("a", 3), r"nnx\.ref declares.*of type int.*= nnx\.ref\("),
        (lambda: nnx.ref(jnp.ones(3)), r"nnx\.ref declares.*of type ArrayImpl.*default_factory="),
        (lambda: nnx.static(3), r"nnx\.static declares.*of type int.*`w: int = nnx\.static"),
    ],
)
def test_a_specifier_takes_no_value(make, name):
    with pytest.raises(TypeError, match=name):
        make()
