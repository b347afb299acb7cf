"""Every layer in NumPy and float64, with gradients from `tape.py`: the reference for the layers.

Each function takes the parameters by their paths and the inputs, as `Var`s, and the layer for its
settings.
"""

import itertools

import numpy as np

from tests.nnx.layers.tape import (
    concatenate,
    einsum,
    sigmoid,
    softmax,
    stack,
    tanh,
    var,
    where,
)


def linear(p, x, m, at=""):
    y = x @ p[f"{at}kernel"]
    return y + p[f"{at}bias"] if f"{at}bias" in p else y


def linear_general(p, x, m):
    # Over the axes (1, -1) of four, with a batch axis: (b, i, n, j) -> (b, n, o, q).
    y = einsum("binj,bijoq->bnoq", x, p["kernel"])
    return y + p["bias"].reshape(x.shape[0], 1, *p["bias"].shape[1:])


def einsum_layer(p, x, m):
    return einsum(m.einsum_str, x, p["kernel"]) + p["bias"]


def windows(x, size, strides, pads, dilation, spread):
    """`(batch, *spatial, channels)` -> `(batch, positions, window, channels)`, zeros outside."""
    _, *spatial, channels = x.shape
    axes = []
    for n, k, s, (lo, hi), d, w in zip(spatial, size, strides, pads, dilation, spread, strict=True):
        wide = (n - 1) * w + 1
        count = (wide + lo + hi - (k - 1) * d - 1) // s + 1
        at = np.arange(count)[:, None] * s + np.arange(k) * d - lo
        axes.append(np.where((at >= 0) & (at < wide) & (at % w == 0), at // w, -1))
    shape = tuple(a.shape[0] for a in axes)
    index = np.empty((np.prod(shape, dtype=int), int(np.prod(size))), int)
    for i, position in enumerate(itertools.product(*map(range, shape))):
        for j, offset in enumerate(itertools.product(*map(range, size))):
            at = [a[o, k] for a, o, k in zip(axes, position, offset, strict=True)]
            index[i, j] = -1 if min(at) < 0 else np.ravel_multi_index(at, spatial)
    whole = np.arange(x.value.size).reshape(x.shape[0], int(np.prod(spatial)), channels)
    found = np.where((index >= 0)[..., None], whole[:, np.maximum(index, 0)], -1)
    return x.take(found), shape


def batched(fn):
    """For any number of batch axes."""

    def run(p, x, m, axes):
        batch = x.shape[: x.ndim - axes - 1]
        y = fn(p, x.reshape(int(np.prod(batch)), *x.shape[len(batch) :]), m, axes)
        return y.reshape(*batch, *y.shape[1:])

    return run


@batched
def conv(p, x, m, axes):
    size = m.kernel_size
    reach = [(k - 1) * d for k, d in zip(size, m.kernel_dilation, strict=True)]
    pads = [(0, 0)] * axes
    if m.padding in ("CIRCULAR", "REFLECT"):
        mode = {"CIRCULAR": "wrap", "REFLECT": "reflect"}[m.padding]
        around = [(0, 0), *((r // 2, (r + 1) // 2) for r in reach), (0, 0)]
        x = x.take(np.pad(np.arange(x.value.size).reshape(x.shape), around, mode))
    elif m.padding == "CAUSAL":
        pads = [(reach[0], 0)]
    elif m.padding == "SAME":
        for i, (n, s, r, w) in enumerate(
            zip(x.shape[1:-1], m.strides, reach, m.input_dilation, strict=True)
        ):
            n = (n - 1) * w + 1
            total = max((-(-n // s) - 1) * s + r + 1 - n, 0)
            pads[i] = (total // 2, total - total // 2)
    elif m.padding != "VALID":
        pads = m.padding
    found, shape = windows(x, size, m.strides, pads, m.kernel_dilation, m.input_dilation)
    kernel = p["kernel"] if m.mask is None else p["kernel"] * np.asarray(m.mask, np.float64)
    kernel = kernel.reshape(-1, *kernel.shape[-2:])
    groups = m.feature_group_count
    per, out = kernel.shape[1], kernel.shape[2] // groups
    parts = [
        einsum(
            "nokc,kcd->nod",
            found[..., g * per : (g + 1) * per],
            kernel[:, :, g * out : (g + 1) * out],
        )
        for g in range(groups)
    ]
    y = concatenate(parts)
    y = y + p["bias"] if "bias" in p else y
    return y.reshape(x.shape[0], *shape, kernel.shape[2])


@batched
def conv_transpose(p, x, m, axes):
    """Each input adds a multiple of the kernel at `strides` times its position."""
    kernel, size = p["kernel"], m.kernel_size
    if m.transpose_kernel:
        kernel = kernel.transpose((*range(axes), axes + 1, axes))
    else:
        # Correlated with the dilated input, as flax does it.
        flat = np.arange(kernel.value.size).reshape(kernel.shape)
        kernel = kernel.take(np.flip(flat, tuple(range(axes))))
    pads = []
    for k, s in zip(size, m.strides, strict=True):
        before = k - 1 if s > k - 1 else -(-(k + s - 2) // 2)
        total = k + s - 2 if m.padding == "SAME" else k + s - 2 + max(k - s, 0)
        before = before if m.padding == "SAME" else k - 1
        pads.append((before, total - before))
    found, shape = windows(x, size, [1] * axes, pads, [1] * axes, m.strides)
    flat = np.arange(kernel.value.size).reshape(kernel.shape)
    turned = kernel.take(np.flip(flat, tuple(range(axes)))).reshape(-1, *kernel.shape[-2:])
    y = einsum("nokc,kcd->nod", found, turned) + p["bias"]
    return y.reshape(x.shape[0], *shape, turned.shape[2])


def embed(p, x, m):
    return p["embedding"][x]


def attend(p, x, m):
    return einsum("...a,ba->...b", x, p["embedding"])


def normalized(x, axes, mask, epsilon, center=True):
    """If nothing is kept, as if the mean were 0 and the variance 1."""
    kept = np.broadcast_to(True if mask is None else mask, x.shape).any(axes, keepdims=True)
    if center and x.value.size:
        # Without the offset, which float64 subtracts exactly, rounding is negligible.
        x = x - np.round(x.value.mean(axes, keepdims=True)) * kept
    mean = x.mean(axes, mask) if center else 0.0
    variance = where(kept, ((x - mean) ** 2).mean(axes, mask), 1.0)
    return (x - mean) * (variance + epsilon) ** -0.5


def layer_norm(p, x, m, mask=None, center=True):
    axes = m.reduction_axes if isinstance(m.reduction_axes, tuple) else (m.reduction_axes,)
    axes = tuple(a % x.ndim for a in axes)
    y = normalized(x, axes, mask, m.epsilon, center)
    features = m.feature_axes if isinstance(m.feature_axes, tuple) else (m.feature_axes,)
    along = [n if i in {f % x.ndim for f in features} else 1 for i, n in enumerate(x.shape)]
    y = y * p["scale"].reshape(*along) if "scale" in p else y
    return y + p["bias"].reshape(*along) if "bias" in p else y


def group_norm(p, x, m, mask=None):
    grouped = x.reshape(*x.shape[:-1], m.num_groups, m.group_size)
    if mask is not None:
        mask = np.broadcast_to(mask, x.shape).reshape(grouped.shape)
    axes = (*range(1, x.ndim - 1), x.ndim)
    y = normalized(grouped, axes, mask, m.epsilon).reshape(*x.shape)
    return y * p["scale"] + p["bias"]


def instance_norm(p, x, m, mask=None):
    y = normalized(x, tuple(range(1, x.ndim - 1)), mask, m.epsilon)
    return y * p["scale"] + p["bias"]


def batch_norm(p, x, m, mask=None, training=True):
    if not training:
        y = (x - p["mean"]) * (p["var"] + m.epsilon) ** -0.5
    else:
        y = normalized(x, tuple(range(x.ndim - 1)), mask, m.epsilon)
    return y * p["scale"] + p["bias"]


def weight_norm(p, x, m):
    w = p["layer_instance.kernel"]
    w = w * ((w * w).sum(0, keepdims=True) + m.epsilon) ** -0.5 * p["scales.kernel"]
    return x @ w + p["layer_instance.bias"]


def spectral_norm(p, x, m):
    w, u = p["layer_instance.kernel"], p["batch_stats.kernel.u"].value
    for _ in range(m.n_steps):
        v = u @ w.value.T
        v = v / np.sqrt((v * v).sum() + m.epsilon)
        u = v @ w.value
        u = u / np.sqrt((u * u).sum() + m.epsilon)
    sigma = (w * (v.T @ u)).sum()
    return x @ (w / sigma) + p["layer_instance.bias"]


def lora(p, x, m):
    return linear(p, x, m) + x @ p["lora.lora_a"] @ p["lora.lora_b"] * m.lora.scale


def attention(q, k, v, bias=None, mask=None, causal=False):
    """Heads are in the last axis but one; there may be fewer key heads."""
    times = q.shape[-2] // k.shape[-2]
    heads = np.arange(q.shape[-2]) // times
    k, v = k[..., heads, :], v[..., heads, :]
    logits = einsum("...ahd,...bhd->...hab", q, k) * q.shape[-1] ** -0.5
    logits = logits if bias is None else logits + bias
    seen = np.ones(logits.shape, bool) if mask is None else np.broadcast_to(mask, logits.shape)
    if causal:
        seen = seen & np.tril(np.ones(logits.shape[-2:], bool))
    logits = where(seen, logits, -1e30)
    return einsum("...hab,...bhd->...ahd", softmax(logits), v)


def multi_head_attention(p, x, m, causal=False):
    def project(name):
        return einsum("...a,ahd->...hd", x, p[f"{name}.kernel"]) + p[f"{name}.bias"]

    y = attention(project("query"), project("key"), project("value"), causal=causal)
    return einsum("...hd,hdo->...o", y, p["out.kernel"]) + p["out.bias"]


def lstm_cell(p, c, h, x, m, at="", names=("i", "f_", "g", "o")):
    if f"{at}dense_i.kernel" in p:
        gates = linear(p, x, m, f"{at}dense_i.") + linear(p, h, m, f"{at}dense_h.")
        n = gates.shape[-1] // 4
        i, f, g, o = (gates[..., k * n : (k + 1) * n] for k in range(4))
    else:
        i, f, g, o = (
            linear(p, x, m, f"{at}i{k}.") + linear(p, h, m, f"{at}h{k.rstrip('_')}.") for k in names
        )
    c = sigmoid(f) * c + sigmoid(i) * tanh(g)
    return c, sigmoid(o) * tanh(c)


def gru_cell(p, h, x, m, at=""):
    a, b = linear(p, x, m, f"{at}dense_i."), linear(p, h, m, f"{at}dense_h.")
    n = h.shape[-1]
    a, b = ([y[..., k * n : (k + 1) * n] for k in range(3)] for y in (a, b))
    r, z = sigmoid(a[0] + b[0]), sigmoid(a[1] + b[1])
    new = tanh(a[2] + r * b[2])
    return (1 - z) * new + z * h


def simple_cell(p, h, x, m, at=""):
    y = linear(p, x, m, f"{at}dense_i.") + linear(p, h, m, f"{at}dense_h.")
    return tanh(y + h if m.residual else y)


def rnn(p, x, m):
    """Runs over the last axis but one, starting from zeros."""
    hidden = m.cell.hidden_features
    h = c = var(np.zeros((*x.shape[:-2], hidden)))
    out = []
    for t in range(x.shape[-2]):
        if type(m.cell).__name__ == "GRUCell":
            h = gru_cell(p, h, x[..., t, :], m, "cell.")
        else:
            c, h = lstm_cell(p, c, h, x[..., t, :], m, "cell.")
        out.append(h)
    return stack(out, axis=-2)


def pooling(kind, x, size, strides, pads, inside=True):
    axes = len(size)

    def run(_, x, m, axes):
        found, shape = windows(x, size, strides, pads, [1] * axes, [1] * axes)
        real, _ = windows(var(np.ones(x.shape)), size, strides, pads, [1] * axes, [1] * axes)
        if kind == "avg":
            count = real.value.sum(2) if not inside else np.prod(size)
            y = found.sum(2) / count
        else:
            sign = 1 if kind == "max" else -1
            best = np.where(real.value > 0, sign * found.value, -np.inf).argmax(2)
            n, o, k, c = found.shape
            index = np.arange(n * o * k * c).reshape(n, o, k, c)
            y = found.take(np.take_along_axis(index, best[:, :, None], 2)[:, :, 0])
        return y.reshape(x.shape[0], *shape, x.shape[-1])

    return batched(run)({}, x, None, axes)


def prelu(p, x, m):
    return where(x.value >= 0, x, p["negative_slope"] * x)


def rotary(x, positions, base, features, interleaved):
    angles = np.asarray(positions, np.float64)[..., None, None] * (
        base ** (-np.arange(0, features, 2) / features)
    )
    sin, cos = np.sin(angles), np.cos(angles)
    a, b = (x[..., 0:features:2], x[..., 1:features:2]) if interleaved else (
        x[..., : features // 2], x[..., features // 2 : features]
    )  # fmt: skip
    turned = (a * cos - b * sin, a * sin + b * cos)
    y = stack(turned, -1).reshape(*x.shape[:-1], features) if interleaved else concatenate(turned)
    return concatenate([y, x[..., features:]]) if features < x.shape[-1] else y
