"""How modules print."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nnx
from nnx.show._format import bytes_text, count_text, short
from nnx.show.text import tree_repr
from nnx.training.optimizer import Optimizer
from tests.models import Dense, Net


class Box(nnx.Module):
    """A module with the given attributes."""

    def __init__(self, **attributes):
        for name, value in attributes.items():
            setattr(self, name, value)


class Layer(nnx.Module):
    w: jax.Array = nnx.param()
    mean: jax.Array = nnx.ref("batch_stats")

    def __init__(self, n, rate=0.5, act=jax.nn.relu, sizes=(1, 2)):
        self.w = nnx.Ref(np.zeros((n, 2), np.float32), "params", axis="data")
        self.mean = np.zeros(2, np.float16)
        self.n = n
        self.rate = rate
        self.act = act
        self.sizes = sizes
        self._cache = {"private": 1}
        self._count = nnx.Ref(0, "counters")


def lines(model):
    return tree_repr(model).splitlines()


def test_a_layer_has_shapes_collections_metadata_and_what_is_not_the_default():
    assert tree_repr(Layer(3)) == (
        "Layer(\n"
        "  w = float32[3,2]  # params, axis='data'\n"
        "  mean = float16[2]  # batch_stats\n"
        "  n=3\n"
        "  _count = 0  # counters\n"
        ")"
    )
    assert "  n=3, rate=0.1, act=gelu, sizes=(3,)" in lines(Layer(3, 0.1, jax.nn.gelu, (3,)))
    # 1 == 1.0 == True, but they are different settings.
    assert "  n=3, rate=1" in lines(Layer(3, 1))


def test_the_last_line_counts_shared_values_once():
    layer = Layer(3)
    model = Box(a=layer, b=layer, c=Layer(1), table=np.zeros(5, np.int8))
    assert lines(model)[-1] == (
        ")  # params: 8 (32 B), batch_stats: 4 (8 B), counters: 2 (0 B), arrays: 5 (5 B)"
    )
    assert "#" not in lines(Box(rate=1))[-1]


def test_what_is_at_several_places_is_shown_once_and_cycles_end():
    layer, numbers = Layer(1), [Layer(2)]
    model = Box(a=layer, inner=Box(b=layer, w=nnx.get_ref(layer, "w")), one=numbers, two=numbers)
    model.inner.parent = model
    numbers.append(numbers)
    text = tree_repr(model)
    assert text.count("Layer(") == 2
    for line in (
        "    b = <same as a>",
        "    w = <same as a.w>",
        "    parent = <same as the root>",
        "  two = <same as one>",
        "    1: <same as one>",
    ):
        assert line in text.splitlines()


def test_equal_neighbours_fold():
    model = Box(layers=[Layer(2) for _ in range(48)], by={c: Layer(3) for c in "abcde"})
    text = lines(model)
    assert "    0..47: Layer ×48 (" in text and "    'a' … 'e': Layer ×5 (" in text
    assert sum("Layer" in line for line in text) == 2
    heads = Box(q=Layer(2), k=Layer(2), v=Layer(2), other=(Layer(1), Layer(1), Layer(1)))
    assert "  q, k, v = Layer ×3 (" in lines(heads) and "    0..2: Layer ×3 (" in lines(heads)
    assert "    0..2: float32[2] ×3" in lines(Box(x=[np.ones(2, np.float32)] * 3))
    nested = Box(x=[[Layer(1)] * 1 for _ in range(4)])
    assert "    0..3: 4 × [" in lines(nested)
    pair = Box(x=[Layer(2), Layer(2)])
    assert sum("Layer(" in line for line in lines(pair)) == 2


@pytest.mark.parametrize(
    "other",
    [
        lambda: Layer(3),
        lambda: Layer(2, rate=0.25),
        lambda: Layer(2, act=jax.nn.gelu),
        lambda: Layer(2, sizes=(1, 2.0)),
        lambda: Box(n=2),
        lambda: nnx.Ref(1.0),
        lambda: Layer(2).n,
    ],
)
def test_what_differs_does_not_fold(other):
    model = Box(x=[Layer(2) for _ in range(3)] + [other()] + [Layer(2) for _ in range(3)])
    text = lines(model)
    assert "    0..2: Layer ×3 (" in text and "    4..6: Layer ×3 (" in text
    assert any(line.startswith("    3: ") for line in text)


def test_sharing_decides_whether_neighbours_are_equal():
    def tied():
        layer = Layer(2)
        return Box(a=layer, b=layer)

    assert "    0..3: Box ×4 (" in lines(Box(x=[tied() for _ in range(4)]))
    common = Layer(2)
    text = lines(Box(x=[Box(a=common) for _ in range(5)]))
    assert "    0: Box(" in text and "    1..4: Box ×4 (" in text
    assert "      a = <same as x.0.a>" in text
    # Each points to the one before: as many different structures.
    chain = [Box(n=1)]
    for _ in range(4):
        chain.append(Box(before=chain[-1]))
    assert not any("×" in line for line in lines(Box(x=chain)))
    layers = [Layer(i) for i in range(1, 5)]
    text = lines(Box(first=layers, again=list(layers), one=[layers[0]] * 6, mixed=layers[::-1]))
    assert "    0..3: <same as first.0..3>" in text and "    0..5: <same as first.0>" in text
    assert "    0: <same as first.3>" in text and "    3: <same as first.0>" in text


def test_deep_and_wide_models_stay_short():
    deep = Box(n=0)
    for _ in range(1000):
        deep = Box(child=deep, n=1)
    text = tree_repr(deep)
    assert len(text) < 5000 and re.search(r"Box\(… 1,9\d\d more inside\)", text)
    cycle = Box()
    cycle.items = {"x": ([cycle], 1)}
    assert "0: <same as the root>" in tree_repr(cycle)
    wide = Box(layers=[Layer(2) for _ in range(1000)])
    assert len(lines(wide)) == 10
    assert len(tree_repr(Box(numbers=list(range(10**5)), text="x" * 10**6))) < 400


def test_no_array_is_read(monkeypatch):
    model = nnx.Linear.init(0)(3, 4)
    model.table = jnp.ones(3)
    model.state = nnx.Ref({"a": (jnp.ones(2), 1)}, "state")

    def refuse(*args):
        raise AssertionError("an array was read")

    kind = type(model.table)
    for name in ("_value", "__array__", "__repr__", "__str__", "tolist", "item", "__iter__"):
        monkeypatch.setattr(kind, name, property(refuse) if name == "_value" else refuse)
    with pytest.raises(AssertionError):
        str(model.table)
    text = tree_repr(model)
    assert "kernel = float32[3,4]  # params" in text and "table = float32[3]" in text
    assert "state = {'a': (float32[2], 1)}  # state" in text


def test_settings_are_short():
    class Odd:
        def __repr__(self):
            raise RuntimeError

    partial = functools.partial(jax.nn.gelu, 1, approximate=True)
    text = tree_repr(
        Box(a=Odd(), f=partial, g=lambda x: x, d=jnp.bfloat16, e=np.dtype("int8"), k=object())
    )
    assert text == (
        "Box(a=<Odd>, f=partial(gelu, 1, approximate=True), g=<lambda>, d=bfloat16, e=int8, "
        "k=<object object>)"
    )
    assert short("x" * 100) == "'" + "x" * 43 + "…" + "x" * 14 + "'"
    assert short(tuple(range(20))) == "(0, 1, 2, 3, 4, 5, … 14 more)"
    assert short({"a": [1, (2,)], "b": {}}) == "{'a': [1, (2,)], 'b': {}}"
    assert short([[[[1]]]]) == "[[[list of 1]]]" and short(Dense) == "Dense"
    assert short(Dense().__call__) == "Dense.__call__"
    assert all(len(line) <= 102 for line in lines(Box(**{f"name{i}": i for i in range(50)})))


def test_numbers_and_sizes():
    assert [count_text(n) for n in (0, 99_999, 100_000, 70_553_706_496)] == [
        "0", "99,999", "100 k", "70.6 B",
    ]  # fmt: skip
    assert [bytes_text(n) for n in (0, 999, 1000, 999_900, 141.1e9, 5e18)] == [
        "0 B", "999 B", "1 kB", "1 MB", "141 GB", "5,000 PB",
    ]  # fmt: skip


def test_other_things_that_modules_hold():
    layer = Layer(1)
    optimizer = Optimizer(Net(), optax.adam(0.1))
    text = tree_repr(optimizer)
    assert text.startswith("Optimizer(\n  step = 0  # opt_state\n")
    assert "w = float32[2,2]  # opt_state" in text
    model = Box(call=layer.__call__ if callable(layer) else layer.train, p=optax.EmptyState())
    assert "  call = Layer.train(\n    __self__ = Layer(" in tree_repr(model)
    keys = Box(key=jax.random.key(0), part=nnx.Partition({"a": jnp.ones(2)}))
    assert "key = key<fry>[]" in tree_repr(keys) and "    a = float32[2]" in lines(keys)


def test_it_prints_in_every_trace():
    seen, kept = [], []

    @nnx.jit
    def f(model):
        seen.append(tree_repr(model))
        kept.append(Box(n=nnx.Ref(model.b * 2, "params")))

    f(Dense())
    assert "w = float32[2,2]  # params" in seen[0]
    assert tree_repr(kept[0]) == "Box(\n  n = float32[2]  # params\n)"
    shapes = nnx.eval_shape(lambda: nnx.Linear.init(0)(10**6, 10**6))
    assert "kernel = float32[1000000,1000000]  # params" in tree_repr(shapes)


def test_a_module_whose_transformation_has_ended_says_so():
    kept = []

    @nnx.jit
    def leak(model):
        kept.append(model)
        assert "float32[2,2]  # params" in repr(model)

    leak(nnx.Sequential(nnx.Linear.init(0)(2, 2)))
    text = repr(kept[0])
    assert "kernel = <ended trace>  # params" in text and "params: 0" not in text


def test_layers_that_take_turns_fold():
    with nnx.scope(0):
        pairs = [x for _ in range(50) for x in (nnx.Linear(2, 2), nnx.relu)]
        model = nnx.Sequential(*pairs, nnx.Linear(2, 1))
    assert (
        repr(model)
        == """Sequential(
  layers = [
    0..99: 50 × (
      0: Linear(
        kernel = float32[2,2]  # params
        bias = float32[2]  # params
        in_features=2, out_features=2
      )
      1: relu
    )
    100: Linear(
      kernel = float32[2,1]  # params
      bias = float32[1]  # params
      in_features=2, out_features=1
    )
  ]
)  # params: 303 (1.21 kB)"""
    )


def test_what_folds_in_turn_and_what_does_not():
    drop = nnx.Dropout(0.5)
    with nnx.scope(0):
        four = lambda: (nnx.Linear(2, 2), nnx.Linear(2, 2), nnx.relu, nnx.Dropout(0.1))
        long = nnx.Sequential(nnx.tanh, *[x for _ in range(3) for x in four()])
        twice = nnx.Sequential(*[x for _ in range(2) for x in (nnx.Linear(2, 2), nnx.relu)])
        shared = nnx.Sequential(*[x for _ in range(4) for x in (nnx.Linear(2, 2), drop)])
        differ = nnx.Sequential(*[x for i in range(1, 5) for x in (nnx.Linear(2, i), nnx.relu)])
    assert "0: tanh\n    1..12: 3 × (\n      1: Linear(" in repr(long)
    assert "      3: relu\n      4: Dropout(rate=0.1)\n    )\n  ]" in repr(long)
    assert "×" not in repr(twice) and "×" not in repr(differ)
    assert "1: Dropout(rate=0.5)\n    2..7: 3 × (" in repr(shared)
    assert "      3: <same as layers.1>\n    )\n  ]" in repr(shared)
