"""Weights of PyTorch's recurrent layers, against its documented equations in NumPy in float64."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import nnx
from nnx.bridge import BridgeError, from_state_dict
from tests.nnx.test_bridge import close, unchanged

D, H = 3, 4


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def lstm(gates_i, gates_h, h, c):
    i, f, g, o = np.split(gates_i + gates_h, 4, axis=-1)
    c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
    return sigmoid(o) * np.tanh(c), c


def gru(gates_i, gates_h, h, c):
    (ir, iz, inew), (hr, hz, hnew) = np.split(gates_i, 3, -1), np.split(gates_h, 3, -1)
    r, z = sigmoid(ir + hr), sigmoid(iz + hz)
    # The second bias of this gate is in `hnew`, so that r multiplies it.
    return (1 - z) * np.tanh(inew + r * hnew) + z * h, c


def simple(gates_i, gates_h, h, c):
    return np.tanh(gates_i + gates_h), c


def run(step, s, x, suffix):
    """One layer in one direction, over `(batch, time, features)`."""
    h = c = np.zeros((len(x), H))
    ys = []
    for t in range(x.shape[1]):
        gates_i = x[:, t] @ s[f"weight_ih_{suffix}"].T + s[f"bias_ih_{suffix}"]
        gates_h = h @ s[f"weight_hh_{suffix}"].T + s[f"bias_hh_{suffix}"]
        h, c = step(gates_i, gates_h, h, c)
        ys.append(h)
    return np.stack(ys, 1)


def torch_rnn(step, s, x, layers=1, both=False):
    for n in range(layers):
        y = run(step, s, x, f"l{n}")
        if both:
            back = run(step, s, x[:, ::-1], f"l{n}_reverse")[:, ::-1]
            y = np.concatenate([y, back], -1)
        x = y
    return x


def state(gates, layers=1, both=False, seed=0):
    rng, s = np.random.default_rng(seed), {}
    for n in range(layers):
        inputs = D if n == 0 else H * (1 + both)
        for suffix in [f"l{n}", f"l{n}_reverse"][: 1 + both]:
            s[f"weight_ih_{suffix}"] = rng.normal(size=(gates * H, inputs)) / 2
            s[f"weight_hh_{suffix}"] = rng.normal(size=(gates * H, H)) / 2
            s[f"bias_ih_{suffix}"] = rng.normal(size=gates * H)
            s[f"bias_hh_{suffix}"] = rng.normal(size=gates * H)
    return s


def gru_cell(inputs=D, hidden=H):
    cell = nnx.GRUCell(inputs, hidden)
    cell.dense_h.bias = jnp.zeros(3 * hidden)
    return cell


X = np.random.default_rng(5).normal(size=(2, 5, D)).astype(np.float32)
CELLS = [
    (nnx.LSTMCell, lstm, 4),
    (nnx.OptimizedLSTMCell, lstm, 4),
    (gru_cell, gru, 3),
    (nnx.SimpleCell, simple, 1),
]
KINDS = pytest.mark.parametrize("cell, step, gates", CELLS, ids=["split", "lstm", "gru", "simple"])


@KINDS
def test_one_layer(cell, step, gates):
    class Ours(nnx.Module):
        def __init__(self):
            self.rnn, self.head = nnx.RNN(cell(D, H)), nnx.Linear(H, 2)

    s = state(gates)
    rng = np.random.default_rng(1)
    head = {"fc.weight": rng.normal(size=(2, H)), "fc.bias": rng.normal(size=2)}
    theirs = {f"recurrent.{name}": value for name, value in s.items()} | head
    ours = Ours.init(0)()
    from_state_dict(theirs, ours, {"recurrent": "rnn", "fc": "head"})
    close(ours.rnn(X), torch_rnn(step, s, X), 1e-5)
    close(ours.head.kernel, head["fc.weight"].T)
    # The weights of a PyTorch cell have no number, and fit both an RNN of the cell and the cell alone.
    plain = {name.removesuffix("_l0"): value for name, value in s.items()}
    for source, other in ((plain, nnx.RNN), (plain, lambda c: c), (s, lambda c: c)):
        with nnx.scope(1):
            model = from_state_dict(source, other(cell(D, H)))
        inside = model.cell if isinstance(model, nnx.RNN) else model
        wanted = nnx.get_partition(ours.rnn.cell)
        got = nnx.get_partition(inside)
        assert set(got) == set(wanted)
        assert all(jnp.array_equal(got[path], wanted[path]) for path in wanted)


@KINDS
def test_both_directions(cell, step, gates):
    s = state(gates, both=True)
    with nnx.scope(0):
        ours = nnx.Bidirectional(nnx.RNN(cell(D, H)), nnx.RNN(cell(D, H)))
    close(from_state_dict(s, ours)(X), torch_rnn(step, s, X, both=True), 1e-5)


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("container", [lambda *x: nnx.Sequential(*x), lambda *x: [*x]])
def test_several_layers_with_dropout_between_them(both, container):
    s = state(3, 2, both)

    def layer(inputs):
        rnns = [nnx.RNN(gru_cell(inputs)) for _ in range(1 + both)]
        return nnx.Bidirectional(*rnns) if both else rnns[0]

    class Ours(nnx.Module):
        def __init__(self):
            dropout = nnx.Dropout(0.5, deterministic=True)
            self.gru = container(layer(D), dropout, layer(H * (1 + both)))

    ours = Ours.init(0)()
    from_state_dict({f"gru.{name}": value for name, value in s.items()}, ours)
    y = nnx.Sequential(*ours.gru)(X) if isinstance(ours.gru, list) else ours.gru(X)
    close(y, torch_rnn(gru, s, X, 2, both), 1e-5)


def test_the_second_bias_of_a_gru():
    s = state(3)
    ours = nnx.RNN(nnx.GRUCell.init(0)(D, H))
    unchanged(
        ours,
        lambda: from_state_dict(s, ours),
        BridgeError,
        r"bias_hh_l0 has shape \(12,\): its last third .* reset gate .* "
        r"cell.dense_h.bias = jnp.zeros\(12\)",
    )
    s["bias_hh_l0"][2 * H :] = 0
    close(from_state_dict(s, ours)(X), torch_rnn(gru, s, X), 1e-5)
    # The other way round, the bias outside the gate must be zero.
    ours.cell.dense_h.bias, ours.cell.dense_i.bias = ours.cell.dense_i.bias, None
    with pytest.raises(BridgeError, match=r"bias_ih_l0 .* cell.dense_i.bias = jnp.zeros\(12\)"):
        from_state_dict(s, ours)
    s = state(3)
    s["bias_ih_l0"][2 * H :] = 0
    close(from_state_dict(s, ours)(X), torch_rnn(gru, s, X), 1e-5)


def test_without_biases_and_with_relu():
    s = {name: w for name, w in state(1).items() if "weight" in name}
    ours = nnx.RNN(nnx.SimpleCell.init(0)(D, H, activation_fn=nnx.relu))
    unchanged(ours, lambda: from_state_dict(s, ours), BridgeError, "missing.*\n *cell.dense_i.bias")
    ours.cell.dense_i.bias = None
    zeros = {"bias_ih_l0": np.zeros(H), "bias_hh_l0": np.zeros(H)}
    expected = torch_rnn(lambda i, h, *_: (np.maximum(i + h, 0), 0), s | zeros, X)
    close(from_state_dict(s, ours)(X), expected, 1e-5)
    message = r"bias_ih_l0 \(the dense_i and dense_h of this cell have no bias\)"
    with pytest.raises(BridgeError, match=message):
        from_state_dict(s | zeros, ours)


def test_biases_in_half_precision_are_added_in_single():
    s = {name: w.astype(ml_dtypes.bfloat16) for name, w in state(4).items()}
    ours = from_state_dict(s, nnx.OptimizedLSTMCell.init(0)(D, H))
    biases = [s[f"bias_{side}_l0"].astype(np.float32) for side in ("ih", "hh")]
    assert jnp.array_equal(ours.dense_h.bias, sum(biases))


def test_transforms_come_before_the_sum_and_half_a_sum_is_an_error():
    s, ours = state(4), nnx.OptimizedLSTMCell.init(0)(D, H)
    b, c = s["bias_ih_l0"], s["bias_hh_l0"]
    from_state_dict(s, ours, transforms={"bias_hh_l0": lambda bias: 2 * bias})
    close(ours.dense_h.bias, b + 2 * c)
    from_state_dict(s, ours, transforms={"dense_h.bias": lambda bias: 3 * bias})
    close(ours.dense_h.bias, 3 * b + 3 * c)
    short = s | {"bias_hh_l0": c[:4]}
    message = r"sum of bias_ih_l0 \+ bias_hh_l0, but these have shapes \(16,\) and \(4,\)"
    unchanged(ours, lambda: from_state_dict(short, ours), BridgeError, message)
    del s["bias_hh_l0"]
    message = "dense_h.bias is the sum of two biases, but there is only bias_ih_l0"
    unchanged(ours, lambda: from_state_dict(s, ours), BridgeError, message)
    from_state_dict(s, ours, strict=False)
    close(ours.dense_h.bias, b)


def rnn():
    return nnx.RNN(nnx.LSTMCell(D, H))


class Own(nnx.RNNCellBase):
    pass


@pytest.mark.parametrize(
    "make, name, message",
    [
        (rnn, "weight_ih_l1", "for several layers put a list or Sequential of RNN here"),
        (rnn, "weight_ih_l0_reverse", "for both directions put a Bidirectional here"),
        (rnn, "weight_hr_l0", "no cell here has a projection like that of proj_size"),
        (lambda: nnx.LSTMCell(D, H), "bias_hh_l2", "for several layers put a list"),
        (lambda: nnx.Bidirectional(rnn(), rnn()), "weight_ih_l1_reverse", "for several layers"),
        (lambda: nnx.Sequential(rnn(), rnn()), "weight_ih_l2", "there are 2 RNN or Bidirectional"),
        (lambda: nnx.Sequential(rnn()), "weight_ih_l0_reverse", "for both directions put"),
        (lambda: nnx.RNN(Own()), "weight_ih_l0", "no rule for cell of class Own; give names"),
    ],
)  # fmt: skip
def test_what_has_no_place_says_so(make, name, message):
    with nnx.scope(0):
        ours = make()
    with pytest.raises(BridgeError, match=rf"(?s)unexpected in the state dict:.*{name}.*{message}"):
        from_state_dict({name: np.ones((4 * H, D))}, ours)
