"""If nothing is mutable, modules do not change either."""

import copy

import jax
import jax.numpy as jnp
import pytest

import nnx
import refx


class Net(nnx.Module):
    w: jax.Array = nnx.param()

    def __init__(self):
        self.w = jnp.ones(2)
        self.sub = nnx.Linear.init(0)(2, 2)
        self.layers = [nnx.Linear.init(0)(2, 2), nnx.relu]
        self.sizes = {"a": [1], "b": 2}
        self.n = 1
        self.table = jnp.ones(2)

    def __call__(self, x):
        return self.sub(x * self.w) + self.n

    def grow(self):
        self.n += 1


ATTRIBUTES = {
    "a value": lambda m: setattr(m, "w", jnp.zeros(2)),
    "a setting": lambda m: setattr(m, "n", 2),
    "a new attribute": lambda m: setattr(m, "new", 2),
    "an array": lambda m: setattr(m, "table", jnp.zeros(2)),
    "a field without a Ref": lambda m: setattr(m, "w", None),
    "a tied field": lambda m: setattr(m, "w", refx.Ref(jnp.ones(2), "params")),
    "a deleted one": lambda m: delattr(m, "n"),
    "a deleted field": lambda m: delattr(m, "w"),
    "of a part": lambda m: setattr(m.sub, "n", 2),
    "of a part in a list": lambda m: setattr(m.layers[0], "n", 2),
    "by a method": lambda m: m.grow(),
    "train": lambda m: setattr(m.sub, "training", True),
    "under jit": nnx.jit(lambda m: setattr(m, "n", 2)),
    "a method under jit": nnx.jit(lambda m: m.grow()),
    "a list under jit": nnx.jit(lambda m: m.layers.append(nnx.gelu)),
}


@pytest.mark.parametrize("change", ATTRIBUTES)
@pytest.mark.parametrize("limited", [True, False])
@pytest.mark.parametrize("filter", [None, (), (None, refx.Any())])
def test_attributes_do_not_change(change, limited, filter):
    model = Net()
    before = dict(vars(model))
    with (
        pytest.raises(refx.NotMutableError, match="surrounding `mutable`") as error,
        refx.mutable(filter, model if limited else None),
    ):
        ATTRIBUTES[change](model)
    assert len(str(error.value).splitlines()) <= 4
    assert dict(vars(model)) == before and len(model.layers) == 2


CONTENTS = {
    "layers": lambda m: m.layers.append(nnx.gelu),
    "layers ": lambda m: m.layers.pop(),
    "sizes": lambda m: m.sizes.update(b=3),
    "sizes.a": lambda m: m.sizes["a"].append(2),
    "Net": lambda m: vars(m).update(n=3),
}


@pytest.mark.parametrize("path", CONTENTS)
def test_lists_and_dicts_are_compared_at_the_end(path):
    model = Net()
    where = "The Net was" if path == "Net" else f"'{path.strip()}' was"
    with (
        pytest.raises(refx.NotMutableError, match=f"{where} changed.*allows no changes"),
        refx.mutable(None, model),
    ):
        CONTENTS[path](model)
    with pytest.raises(refx.NotMutableError, match="changed"):
        _apply_change(CONTENTS[path])


def _apply_change(change):
    class Changing(Net):
        def __call__(self, x):
            change(self)
            return x

    Changing().apply(mutable=None)(jnp.ones(2))


def test_an_error_inside_is_not_replaced():
    model = Net()
    with pytest.raises(ZeroDivisionError), refx.mutable(None, model):
        model.layers.append(3)
        raise ZeroDivisionError
    model.n = 5
    model.w = jnp.zeros(2)


def test_what_is_read_and_what_is_new_is_free():
    model, x = Net(), jnp.ones(2)
    for tree in (None, model):
        with refx.mutable(None, tree):
            y = model(x)
            assert jnp.array_equal(nnx.jit(lambda m, x: m(x))(model, x), y)
            nnx.grad(lambda m: m(x).sum())(model)
            new = Net()
            new.n = 3
            new.w = new.w + 1
            new.layers.append(nnx.gelu)
            copy = nnx.clone(model)
            copy.n = 4
            copy.sub = None
            assert nnx.jit(lambda: Net())().n == 1
    other = Net()
    with refx.mutable(None, model):
        other.n = 7
        other.w = jnp.zeros(2)
        with refx.mutable(None), pytest.raises(refx.NotMutableError):
            other.n = 8
        with refx.mutable(...), pytest.raises(refx.NotMutableError):
            model.n = 8
    assert other.n == 7


def test_other_filters_limit_refs_only():
    model = Net()
    with refx.mutable("params", model):
        model.n = 2
        model.w = jnp.zeros(2)
    with refx.mutable("batch_stats", model):
        model.n = 3
        with pytest.raises(refx.NotMutableError, match="'params'"):
            model.w = jnp.zeros(2)


def test_nothing_is_kept():
    with jax.check_tracer_leaks(), refx.mutable(None):

        @nnx.jit
        def f(x):
            net = Net()
            net.w = net.w * x
            return net.w

        f(jnp.ones(2))


def test_what_is_made_within_may_be_changed_however_it_is_made():
    class Counter(refx.Node):
        def __init__(self):
            self.n = refx.Ref(1, "counters")

    def count(counter):
        counter.n.value += 1

    old = Counter()
    with refx.mutable(None):
        made = [
            Counter(),
            refx.clone(old),
            copy.deepcopy(old),
            jax.tree.map(lambda x: x, old),
            refx.merge(*refx.split(old)),
            nnx.jit(Counter)(),
        ]
        for counter in made:
            count(counter)
            nnx.jit(count)(counter)
        for use in (count, nnx.jit(count)):
            with pytest.raises(refx.NotMutableError, match="was written, but the surrounding"):
                use(old)
    assert [int(counter.n.value) for counter in [old, *made]] == [1, 3, 3, 3, 3, 3, 3]
