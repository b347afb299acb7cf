"""Tables of models, from abstract evaluation."""

import dataclasses
import io
import threading

import jax
import jax.numpy as jnp
import pytest
import rich.console
import rich.text

import nnx
from nnx.show import _calls
from nnx.show._cost import Costs
from nnx.show.tabulate import tabulate

S = jax.ShapeDtypeStruct


@pytest.fixture(autouse=True)
def _wide(monkeypatch):
    # The tables must fit in the terminal in which the tests happen to run.
    monkeypatch.setenv("COLUMNS", "160")


def linear_flops(batch, n, m):
    """Forward, and with both products and the sum of the backward pass."""
    ahead = 2 * batch * n * m + batch * m
    return ahead, ahead + 4 * batch * n * m + (batch - 1) * m


class Twice(nnx.Module):
    def __init__(self, n):
        self.layer = nnx.Linear(n, n)
        self.same = self.layer
        self.unused = nnx.Linear(n, 1)

    def __call__(self, x):
        return self.same(self.layer(x))

    def encode(self, x, scale=1.0):
        return self.layer(x) * scale


@pytest.fixture
def mlp():
    with nnx.scope(0):
        return nnx.Sequential(nnx.Linear(3, 4), nnx.relu, nnx.BatchNorm(4), nnx.Linear(4, 1))


def test_rows_have_shapes_sizes_and_operations(mlp):
    table = tabulate(mlp, jnp.ones((8, 3)))
    root, first, norm, last = table.rows
    assert [row.path for row in table.rows] == [
        (),
        ("layers", "0"),
        ("layers", "2"),
        ("layers", "3"),
    ]
    assert first.inputs == ((S((8, 3), jnp.float32),), {}) and first.outputs == S((8, 4), "float32")
    assert (first.flops, first.flops_with_backward) == linear_flops(8, 3, 4)
    assert (last.flops, last.flops_with_backward) == linear_flops(8, 4, 1)
    assert norm.sizes == {"batch_stats": (8, 32), "params": (8, 32)}
    assert root.sizes == table.sizes == {"params": (29, 116), "batch_stats": (8, 32)}
    inside = first.flops + norm.flops + last.flops
    assert table.flops == inside + 8 * 4  # the relu
    # The input of the model needs no gradient, so one product less than its layers together.
    assert table.flops_with_backward < sum(r.flops_with_backward for r in table.rows[1:]) + 200


def test_shapes_will_do_and_nothing_is_written_or_used_up(mlp):
    before = nnx.get_partition(mlp)
    with nnx.scope(0):
        keys = [nnx.make_rng("dropout") for _ in range(2)]
    with nnx.scope(0):
        assert (nnx.make_rng("dropout") == keys[0]).all()
        table = tabulate(mlp, S((8, 3), jnp.float32))
        tabulate(nnx.Dropout(0.5), jnp.ones(3))
        assert (nnx.make_rng("dropout") == keys[1]).all()
    assert table.rows == tabulate(mlp, jnp.ones((8, 3))).rows
    after = nnx.get_partition(mlp)
    assert list(after) == list(before) and all(after[p] is before[p] for p in before)
    assert type(mlp.layers[0]) is nnx.Linear and vars(mlp).keys() == {"layers"}


def test_keys_and_flags_come_from_the_scope_or_are_not_needed():
    drop = nnx.Dropout(0.5)
    plain = tabulate(drop, jnp.ones((4, 4))).flops
    assert plain > 16
    with nnx.scope(deterministic=True):
        assert tabulate(drop, jnp.ones((4, 4))).flops == 0
    assert tabulate(drop, jnp.ones((4, 4)), deterministic=True).flops == 0


def test_shared_modules_count_each_call_and_unused_ones_say_so():
    model = Twice.init(0)(4)
    table = tabulate(model, jnp.ones((2, 4)))
    _, layer, unused = table.rows
    assert layer.calls == 2 and layer.flops == 2 * linear_flops(2, 4, 4)[0]
    assert (unused.calls, unused.inputs, unused.flops) == (0, None, None)
    text = str(table)
    assert "2 calls: f32[2,4]" in text and "not called" in text


def test_a_method_with_settings():
    model = Twice.init(0)(4)
    table = tabulate(model.encode, jnp.ones((2, 4)), scale=2.0)
    assert table.rows[0].outputs == S((2, 4), jnp.float32)
    assert table.flops == linear_flops(2, 4, 4)[0] + 8
    assert table.rows[0].inputs == ((S((2, 4), jnp.float32),), {"scale": 2.0})


@pytest.mark.parametrize(
    "loop",
    [
        lambda layer, x: nnx.scan(lambda h, _: (layer(h), None), x, None, length=6)[0],
        lambda layer, x: nnx.scan(lambda c, _: ((c[0], c[0](c[1])), None), (layer, x), None, 6)[0][
            1
        ],
        lambda layer, x: nnx.fori_loop(0, 6, lambda i, h: layer(h), x),
        lambda layer, x: nnx.vmap(layer)(jnp.stack([x] * 6)),
        lambda layer, x: nnx.scan(
            lambda h, _: (nnx.vmap(layer)(h), None), jnp.stack([x] * 2), None, length=3
        )[0],
    ],
)
def test_a_module_that_a_loop_closes_over_or_carries_counts_every_step(loop):
    class Looped(nnx.Module):
        def __init__(self):
            self.layer = nnx.Linear(16, 16)

        def __call__(self, x):
            return loop(self.layer, x)

    table = tabulate(Looped.init(0)(), jnp.ones((4, 16)))
    ahead, _ = linear_flops(4, 16, 16)
    assert table.rows[1].calls == 6 and table.rows[1].flops == 6 * ahead
    assert 6 * ahead <= table.flops <= 6 * ahead + 20


def test_loops_count_every_step():
    for unroll in (1, 3):
        stack = nnx.Stack.init(0)(lambda: nnx.Linear(16, 16), 8, unroll=unroll)
        table = tabulate(stack, jnp.ones((4, 16)))
        ahead, both = linear_flops(4, 16, 16)
        assert table.rows[1].calls == 8 and table.rows[1].flops == 8 * ahead
        assert table.rows[1].inputs[0][0].shape == (4, 16)
        assert table.rows[1].flops_with_backward == 8 * both
        # The loop itself counts its steps, and adds up gradients.
        assert 8 * ahead <= table.flops <= 8 * ahead + 20
        # From 0.12 on, JAX leaves out a gradient of the input in a step outside the loop.
        assert -2 * 4 * 16 * 16 <= table.flops_with_backward - 8 * both <= 20


def test_equal_modules_are_lowered_once_and_share_a_line(monkeypatch):
    count = Costs._count
    counted = []
    monkeypatch.setattr(Costs, "_count", lambda *a: counted.append(a) or count(*a))
    with nnx.scope(0):
        model = nnx.Sequential(*(nnx.Linear(4, 4) for _ in range(20)), nnx.Linear(4, 2))
    table = tabulate(model, jnp.ones((2, 4)))
    assert len(counted) == 3 and len(table.rows) == 22
    text = str(table)
    assert "layers.0..19" in text and "Linear ×20" in text and "for n equal modules" in text
    # Modules with equal structure but other shapes in the call do not share a line.
    model = Calls()
    assert "×" not in str(tabulate(model, jnp.ones((2, 4))))


class Calls(nnx.Module):
    def __init__(self):
        self.layers = [nnx.Linear.init(0)(4, 4), nnx.Linear.init(0)(4, 4)]

    def __call__(self, x):
        return self.layers[0](x)[None] + self.layers[1](x[:1])


def test_depth_width_and_sizes_alone(mlp):
    with nnx.scope(0):
        deep = nnx.Sequential(mlp, nnx.Linear(1, 1))
    text = str(tabulate(deep, jnp.ones((8, 3)), depth=1))
    assert "Sequential" in text and "BatchNorm" not in text and "layers.1" in text
    assert "BatchNorm" in str(tabulate(deep, jnp.ones((8, 3))))
    table = tabulate(deep, jnp.ones((8, 3)), console_width=90)
    assert max(map(len, str(table).splitlines())) <= 90
    alone = tabulate(deep)
    assert "inputs" not in str(alone) and "31 (124 B)" in str(alone) and alone.flops is None
    assert "(model)" in repr(tabulate(deep, jnp.ones((8, 3)), depth=0))


def test_the_whole_text(mlp):
    table = tabulate(mlp, jnp.ones((8, 3)))
    norm = table.rows[2].flops_with_backward
    # XLA's count of the backward pass of a normalization differs a little between its versions.
    assert 600 < norm < 700 and table.flops_with_backward == norm + 747
    expected = PLAIN.replace("1,395", f"{norm + 747:,.0f}").replace("648", f"{norm:.0f}")
    assert str(table) == expected


PLAIN = """\
path        class       inputs    outputs       params  batch_stats  FLOPs  with backward
──────────  ──────────  ────────  ────────  ──────────  ───────────  ─────  ─────────────
(model)     Sequential  f32[8,3]  f32[8,1]  29 (116 B)     8 (32 B)    600          1,395
  layers.0  Linear      f32[8,3]  f32[8,4]   16 (64 B)                 224            636
  layers.2  BatchNorm   f32[8,4]  f32[8,4]    8 (32 B)     8 (32 B)    272            648
  layers.3  Linear      f32[8,4]  f32[8,1]    5 (20 B)                  72            207
──────────  ──────────  ────────  ────────  ──────────  ───────────  ─────  ─────────────
total                                       29 (116 B)     8 (32 B)    600          1,395
Figures include submodules. Shared values count once."""


class Wide(nnx.Module):
    """Long paths, long shapes, and figures of all sizes."""

    def __init__(self):
        self.embed = nnx.Embed(50257, 512)
        self.attention = nnx.MultiHeadAttention(8, 512)
        self.convolution = nnx.Conv(512, 512, 3)
        self.norm = nnx.BatchNorm(512)

    def __call__(self, tokens):
        return self.norm(self.convolution(self.attention(self.embed(tokens))))


def test_a_narrow_console_cuts_no_figure_and_no_path():
    with nnx.scope(0):
        model = nnx.eval_shape(lambda: Wide())
    table = tabulate(model, S((4, 128), jnp.int32))
    header, cells = table._cells()
    whole = str(dataclasses.replace(table, console_width=200))
    assert "no room" not in whole and "  with backward\n" in whole
    widest = max(map(len, whole.splitlines()[:-1]))
    for width in (30, 60, 80, 100, 120, widest - 1, widest):
        lines = str(dataclasses.replace(table, console_width=width)).splitlines()
        titles = " ".join(lines[:2]).split()
        shown = [name for name in header if name.split()[0] in titles]
        assert set(header) - set(shown) <= {"inputs", "outputs"}
        rules = [i for i, line in enumerate(lines) if line.startswith("─")]
        rows = [*lines[rules[0] + 1 : rules[1]], lines[rules[1] + 1]]
        for line, row in zip(cells, rows, strict=True):
            for name, cell in zip(header, line, strict=True):
                assert name not in shown or not cell or f" {cell.strip()} " in f" {row} ", width
        notes = " ".join(lines[rules[1] + 2 :])
        left_out = [name for name in header if name not in shown]
        assert ("no room" in notes) == bool(left_out)
        if left_out:
            assert f"no room for {' and '.join(left_out)} in {width} columns" in notes
            assert f"console_width={widest})" in notes
        if width >= 100:
            assert max(map(len, lines)) <= width
    assert "outputs" in shown and "inputs" in shown


def test_an_error_in_the_model_leaves_no_trace(mlp):
    for _ in range(2):
        with pytest.raises(ValueError, match="Linear expects an input of shape"):
            tabulate(mlp, jnp.ones((8, 5)))
        assert _calls._running.recorders == []
    assert mlp(jnp.ones((8, 3))).shape == (8, 1)
    with pytest.raises(
        TypeError, match="takes a module or a bound method of a module, but got a list"
    ):
        tabulate([mlp], jnp.ones(3))


def test_unknown_figures_are_left_out():
    class Uses(nnx.Module):
        def __call__(self, layer, x):
            return layer(x)

    class Outer(nnx.Module):
        def __init__(self):
            self.layer, self.uses = nnx.Linear(3, 3), Uses()

        def __call__(self, x):
            return self.uses(self.layer, x)

    table = tabulate(Outer.init(0)(), jnp.ones((2, 3)))
    uses = next(row for row in table.rows if row.cls == "Uses")
    assert uses.flops is None and uses.calls == 1 and "Linear(…), f32[2,3]" in str(table)
    assert table.flops == linear_flops(2, 3, 3)[0]


def test_threads_do_not_see_each_other():
    models = [nnx.Sequential.init(0)(nnx.Linear.init(0)(n, n)) for n in range(1, 5)]
    tables = {}

    def work(n):
        tables[n] = tabulate(models[n - 1], jnp.ones((2, n)))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(1, 5)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    for n, table in tables.items():
        assert [row.calls for row in table.rows] == [1, 1]
        assert table.rows[1].flops == linear_flops(2, n, n)[0]


# Llama 3 70B: https://arxiv.org/abs/2407.21783, table 3.
WIDTH, HIDDEN, DEPTH, TOKENS, HEADS, KV = 8192, 28672, 80, 128256, 64, 8


def dense(n, m):
    return nnx.Linear(n, m, use_bias=False, param_dtype=jnp.bfloat16)


class Block(nnx.Module):
    def __init__(self):
        self.q, self.o = dense(WIDTH, WIDTH), dense(WIDTH, WIDTH)
        self.k, self.v = dense(WIDTH, 128 * KV), dense(WIDTH, 128 * KV)
        self.gate, self.up, self.down = (
            dense(WIDTH, HIDDEN), dense(WIDTH, HIDDEN), dense(HIDDEN, WIDTH),
        )  # fmt: skip

    def __call__(self, x):
        b, n, _ = x.shape
        q, k, v = (f(x).reshape(b, n, -1, 128) for f in (self.q, self.k, self.v))
        x = x + self.o(jax.nn.dot_product_attention(q, k, v).reshape(b, n, WIDTH))
        return x + self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class Llama(nnx.Module):
    embedding: jax.Array = nnx.param()

    def __init__(self):
        self.embedding = jnp.zeros((TOKENS, WIDTH), jnp.bfloat16)
        self.layers = [Block() for _ in range(DEPTH)]
        self.head = dense(WIDTH, TOKENS)

    def __call__(self, tokens):
        x = self.embedding[tokens]
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def test_seventy_billion_parameters():
    with nnx.scope(0):
        model = nnx.eval_shape(lambda: Llama())
    table = tabulate(model, S((1, 4096), jnp.int32))
    block = 2 * WIDTH**2 + 2 * WIDTH * 128 * KV + 3 * WIDTH * HIDDEN
    total = DEPTH * block + 2 * TOKENS * WIDTH
    assert table.sizes == {"params": (total, 2 * total)} and total > 70e9
    # Two operations for each weight and token, and attention's two products.
    dots = 2 * 4096 * (DEPTH * block + TOKENS * WIDTH) + DEPTH * 4 * 4096**2 * WIDTH
    assert dots <= table.flops <= 1.02 * dots
    assert 2.9 * dots <= table.flops_with_backward <= 3.1 * dots
    text = str(table)
    assert "layers.0..79" in text and "Block ×80" in text and "70.6 B (141 GB)" in text
    assert len(text.splitlines()) < 25


@pytest.mark.parametrize("width", [80, 100, 120])
def test_rich_prints_the_same_table_in_its_own_width(mlp, width):
    table = tabulate(mlp, jnp.ones((8, 3)))
    out = io.StringIO()
    console = rich.console.Console(width=width, file=out, force_terminal=True, color_system="256")
    console.print(table)
    plain = rich.text.Text.from_ansi(out.getvalue()).plain
    expected = str(dataclasses.replace(table, console_width=width))
    assert [x.rstrip() for x in plain.splitlines()] == expected.splitlines()
    assert "\x1b[1m" in out.getvalue()
