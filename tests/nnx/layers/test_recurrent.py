"""Recurrent cells and networks against flax.nnx, and the LSTM against NumPy in float64."""

import flax.nnx as fnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.nnx.nn.recurrent import flip_sequences as their_flip

import nnx
from nnx.layers._cell import RNNCellBase
from nnx.layers.recurrent import GRUCell, LSTMCell, OptimizedLSTMCell, SimpleCell
from nnx.layers.rnn import RNN, Bidirectional, flip_sequences
from tests.nnx.layers.test_layer_norm import cheap
from tests.nnx.layers.test_layers import draw, from_flax

X = draw(2, 5, 3)
LENGTHS = jnp.array([5, 3])
CELLS = [
    (LSTMCell, fnx.LSTMCell, {}),
    (OptimizedLSTMCell, fnx.OptimizedLSTMCell, {}),
    (GRUCell, fnx.GRUCell, {}),
    (SimpleCell, fnx.SimpleCell, {"residual": True}),
]
NAMES = ["lstm", "optimized", "gru", "simple"]
inits = dict.fromkeys(("kernel_init", "recurrent_kernel_init", "bias_init"), cheap)


def close(a, b, **tolerance):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **{"atol": 1e-5, **tolerance}), a, b)


def both(kind=2, **options):
    """Our network and flax's, with the same weights."""
    ours, theirs, more = CELLS[kind]
    theirs = fnx.RNN(theirs(3, 4, rngs=fnx.Rngs(0), **more, **inits), **options)
    return from_flax(RNN(ours.init(1)(3, 4, **more, **inits), **options), theirs), theirs


@pytest.mark.parametrize("kind", range(4), ids=NAMES)
def test_values_and_gradients(kind):
    ours, theirs = both(kind, return_carry=True)

    def loss(m):
        carry, y = m(X, seq_lengths=LENGTHS)
        total = jnp.sum(jnp.sin(y)) + sum(jnp.sum(jnp.cos(c)) for c in jax.tree.leaves(carry))
        return total, (carry, y)

    (_, result), grads = nnx.jit(nnx.value_and_grad(loss, has_aux=True))(ours)
    (_, expected), their_grads = fnx.jit(fnx.value_and_grad(loss, has_aux=True))(theirs)
    close(result, expected)
    for path, value in their_grads.flat_state():
        np.testing.assert_allclose(grads[tuple(map(str, path))], value[...], atol=1e-4)


@pytest.mark.parametrize(
    "lengths, options",
    [
        (LENGTHS, {"reverse": True, "unroll": 2}),
        (LENGTHS, {"reverse": True, "keep_order": True, "time_major": True}),
        (None, {"reverse": True, "keep_order": True}),
    ],
)
def test_directions(options, lengths):
    ours, theirs = both(return_carry=True, **options)
    x = X.swapaxes(0, 1) if "time_major" in options else X
    close(*(m(x, seq_lengths=lengths) for m in (ours, theirs)))


def test_arguments_of_a_call_win_over_the_attributes():
    options = {"reverse": True, "keep_order": True, "time_major": True, "return_carry": True}
    rnn, _ = both(**options)
    close(RNN(rnn.cell)(X, **options), rnn(X))
    close(rnn(X, **dict.fromkeys(options, False)), RNN(rnn.cell)(X))


@pytest.mark.parametrize("kind", [0, 1])
def test_lstm_against_float64(kind):
    rnn, _ = both(kind)
    weights = {path: np.asarray(w, np.float64) for path, w in rnn["params"].items()}
    if kind:
        wi, wh, b = (
            weights["cell", name, kind]
            for name, kind in (("dense_i", "kernel"), ("dense_h", "kernel"), ("dense_h", "bias"))
        )
    else:
        wi, wh = (
            np.concatenate([weights["cell", k, "kernel"] for k in names], -1)
            for names in (("ii", "if_", "ig", "io"), ("hi", "hf", "hg", "ho"))
        )
        b = np.concatenate([weights["cell", k, "bias"] for k in ("hi", "hf", "hg", "ho")])

    def sigmoid(a):
        return 1 / (1 + np.exp(-a))

    c = h = np.zeros((2, 4))
    outputs = []
    for t in range(5):
        i, f, g, o = np.split(np.asarray(X, np.float64)[:, t] @ wi + h @ wh + b, 4, -1)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        outputs.append(h)
    carry, y = rnn(X, return_carry=True)
    close(y, np.stack(outputs, 1))
    close(carry, (c, h))


def test_an_empty_sequence_keeps_its_first_carry():
    rnn, _ = both()
    first = draw(2, 4)
    carry, y = rnn(X, initial_carry=first, seq_lengths=jnp.array([0, 2]), return_carry=True)
    close(carry, jnp.stack([first[0], y[1, 1]]))
    carry, y = rnn(X[:, :0], initial_carry=first, return_carry=True)
    assert y.shape == (2, 0, 4)
    close(carry, first)


def test_other_batches():
    rnn, _ = both()
    lengths = jnp.array([[5, 1], [3, 2], [4, 5]])
    x = draw(3, 2, 5, 3)
    options = {"return_carry": True, "reverse": True, "keep_order": True}
    carry, y = rnn(x, seq_lengths=lengths, **options)
    flat_carry, flat = rnn(x.reshape(6, 5, 3), seq_lengths=lengths.reshape(6), **options)
    close((carry, y), (flat_carry.reshape(3, 2, 4), flat.reshape(3, 2, 5, 4)))
    close(
        rnn(x[0, 0], return_carry=True), jax.tree.map(lambda a: a[0, 0], rnn(x, return_carry=True))
    )


@pytest.mark.parametrize("time_major, lengths", [(False, LENGTHS), (True, None)])
def test_bidirectional(time_major, lengths):
    (a, b), (c, d) = both(), both()
    ours = Bidirectional(a, c, time_major=time_major, return_carry=True)
    theirs = fnx.Bidirectional(b, d, time_major=time_major, return_carry=True)
    c.cell.dense_i.kernel *= 2
    d.cell.dense_i.kernel[...] *= 2
    x = X.swapaxes(0, 1) if time_major else X
    close(*(m(x, seq_lengths=lengths) for m in (ours, theirs)))


def test_bidirectional_merges_and_takes_carries():
    rnn, _ = both()
    layer = Bidirectional(rnn, rnn, merge_fn=jnp.add)
    assert len(nnx.refs(layer)) == len(nnx.refs(rnn)) and layer(X).shape == (2, 5, 4)
    first = (draw(2, 4), 2 * draw(2, 4))
    (ahead, back), y = layer(X, initial_carry=first, return_carry=True)
    carry, forwards = rnn(X, initial_carry=first[0], return_carry=True)
    last, backwards = rnn(X[:, ::-1], initial_carry=first[1], return_carry=True)
    close((ahead, back, y), (carry, last, forwards + backwards[:, ::-1]))


@pytest.mark.parametrize("shape, batch, major", [((2, 5, 3), 1, False), ((5, 2, 3), 1, True)])
def test_flip_sequences(shape, batch, major):
    x = draw(*shape)
    for lengths in (None, LENGTHS):
        close(flip_sequences(x, lengths, batch, major), their_flip(x, lengths, batch, major))


class Noisy(RNNCellBase):
    """A cell with batch statistics, dropout and a counter inside."""

    num_feature_axes = 1

    def __init__(self):
        self.norm, self.drop = nnx.BatchNorm(3), nnx.Dropout(0.5)
        self.steps = nnx.Ref(0, "counters")

    def initialize_carry(self, input_shape, carry_init=None):
        return jnp.zeros(input_shape)

    def __call__(self, carry, inputs):
        self.steps.value += 1
        return carry + 1, self.drop(self.norm(inputs))


def test_a_cell_with_state_is_the_python_loop():
    rnn, loop = RNN(Noisy()), nnx.BatchNorm(3)
    with nnx.scope(0):
        y = nnx.jit(lambda m, x: m(x))(rnn, X)
        masks = np.asarray(y != 0)
    for t in range(5):
        expected = loop(X[:, t]) * 2
        np.testing.assert_allclose(y[:, t], jnp.where(masks[:, t], expected, 0), atol=1e-4)
    np.testing.assert_allclose(rnn.cell.norm.var, loop.var, rtol=1e-5)
    assert int(rnn.cell.steps.value) == 5 and len({m.tobytes() for m in masks.swapaxes(0, 1)}) > 1
    rnn.eval()(X)  # needs no keys
    assert int(rnn.cell.steps.value) == 10


def test_broadcast_rngs_give_the_same_mask_at_every_step_and_others_at_every_call():
    rnn = RNN(Noisy(), broadcast_rngs="dropout")
    with nnx.scope(0):
        masks = np.stack([rnn(X) != 0, rnn(X) != 0])
    assert (masks == masks[:, :, :1]).all() and not (masks[0] == masks[1]).all()
    rnn.eval()(X)


def test_state_axes_have_a_value_for_each_step():
    rnn = RNN(Noisy().eval(), state_axes={"counters": 0})
    rnn.cell.steps.value = jnp.arange(5) * 10
    rnn(X)
    assert rnn.cell.steps.value.tolist() == [1, 11, 21, 31, 41]


@pytest.mark.parametrize("kind", range(4), ids=NAMES)
def test_half_precision(kind):
    make = CELLS[kind][0]
    some = {} if kind == 2 else inits  # one with the defaults: QR has no half precision
    cell = make.init(0)(3, 4, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, **some)
    assert {a.dtype for a in nnx.get_partition(cell).values()} == {jnp.dtype(jnp.bfloat16)}
    mixed = RNN(make.init(0)(3, 4, dtype=jnp.bfloat16, **inits))
    half = RNN(cell)
    (carry, _), y = nnx.eval_shape(
        lambda x: (mixed(x, return_carry=True), half(x.astype(jnp.bfloat16))), X
    )
    assert {c.dtype for c in jax.tree.leaves(carry)} == {jnp.dtype(jnp.float32)}
    assert y.dtype == jnp.bfloat16


@pytest.mark.parametrize("make", [LSTMCell, GRUCell])
def test_first_carry(make):
    cell = make.init(0)(3, 4, carry_init=nnx.initializers.ones, **inits)
    assert all((c == 1).all() for c in jax.tree.leaves(cell.initialize_carry((2, 3))))
    with nnx.scope({"carry": 0}):
        drawn = jax.tree.leaves(cell.initialize_carry((7, 3), nnx.initializers.normal()))
    assert all(c.shape == (7, 4) and c.std() > 0 for c in drawn)
    assert len(drawn) == 1 or not jnp.array_equal(*drawn)


def test_settings_of_the_cells():
    names = {"kernel_metadata": {"axes": "i"}, "recurrent_kernel_metadata": {"axes": "h"}}
    cell = GRUCell.init(0)(3, 4, **names, bias_metadata={"axes": "b"})
    refs = {path: cell.metadata["axes"] for path, cell in nnx.refs(cell).items()}
    assert refs == {
        ("dense_i", "kernel"): "i",
        ("dense_i", "bias"): "b",
        ("dense_h", "kernel"): "h",
    }
    recurrent = SimpleCell.init(0)(3, 4).dense_h.kernel
    np.testing.assert_allclose(recurrent @ recurrent.T, jnp.eye(4), atol=1e-5)
    relu = SimpleCell.init(0)(3, 4, activation_fn=nnx.relu)
    assert (RNN(relu)(X) >= 0).all()


class Grows(Noisy):
    def __call__(self, carry, inputs):
        return jnp.concatenate([carry, carry]), inputs


class Forgets(Noisy):
    def __call__(self, carry, inputs):
        return (carry, carry), inputs


@pytest.mark.parametrize(
    "make, kind, message",
    [
        (
            lambda: GRUCell(3, 4)(jnp.ones((2, 4)), jnp.ones((2, 5))),
            ValueError,
            r"GRUCell expects inputs .* 3\).*\(2, 5\)",
        ),
        (
            lambda: LSTMCell(3, 4)((jnp.ones(4), jnp.ones(3)), jnp.ones(3)),
            ValueError,
            r"LSTMCell expects a carry .* 4\).*\(3,\)",
        ),
        (
            lambda: RNN(GRUCell(3, 4))(jnp.ones(3)),
            ValueError,
            r"RNN .*\(\*batch, time, \*features\), but got \(3,\)",
        ),
        (
            lambda: RNN(GRUCell(3, 4))(X, seq_lengths=jnp.ones(3, int)),
            ValueError,
            r"seq_lengths of shape \(2,\), but got \(3,\)",
        ),
        (
            lambda: RNN(GRUCell(3, 4), reverse=True)(X, seq_lengths=5),
            ValueError,
            r"seq_lengths of shape \(2,\), but got \(\)",
        ),
        (lambda: RNN(Grows())(X), nnx.CarryError, r"float32\[2,3\] to float32\[4,3\]"),
        (lambda: RNN(Forgets())(X), nnx.CarryError, "changes its structure"),
        (
            lambda: RNNCellBase().initialize_carry((2, 3)),
            NotImplementedError,
            "must define initialize_carry",
        ),
        (lambda: RNNCellBase()(None, X), NotImplementedError, "must define __call__"),
        (lambda: RNN(RNNCellBase())(X), NotImplementedError, "must define num_feature_axes"),
    ],
)
def test_mistakes_raise_errors_that_say_what_is_wrong(make, kind, message):
    with nnx.scope(0), pytest.raises(kind, match=message):
        make()
