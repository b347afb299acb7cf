"""Reverse-mode differentiation of NumPy in float64: the reference that the layers are compared with.

It does not use JAX. `test_tape.py` compares it with finite differences.
"""

import numpy as np


class Var:
    """An array in float64 and its origin: pairs of an operand and its vector-Jacobian product."""

    __array_priority__ = 1000

    def __init__(self, value, parents=()):
        self.value = np.asarray(value, np.float64)
        self.parents = parents

    @property
    def shape(self):
        return self.value.shape

    @property
    def ndim(self):
        return self.value.ndim

    def __add__(self, other):
        a, b = self, var(other)
        return Var(a.value + b.value, ((a, lambda g: fit(g, a)), (b, lambda g: fit(g, b))))

    def __mul__(self, other):
        a, b = self, var(other)
        return Var(
            a.value * b.value,
            ((a, lambda g: fit(g * b.value, a)), (b, lambda g: fit(g * a.value, b))),
        )

    def __pow__(self, n):
        return Var(self.value**n, ((self, lambda g: g * n * self.value ** (n - 1)),))

    def __sub__(self, other):
        return self + var(other) * -1

    def __rsub__(self, other):
        return var(other) - self

    def __truediv__(self, other):
        return self * var(other) ** -1

    def __rtruediv__(self, other):
        return var(other) / self

    def __neg__(self):
        return self * -1

    __radd__, __rmul__ = __add__, __mul__

    def __matmul__(self, other):
        return einsum("...a,ab->...b", self, other)

    def sum(self, axis=None, keepdims=False):
        axes = tuple(range(self.ndim)) if axis is None else axis
        axes = (axes,) if isinstance(axes, int) else tuple(axes)

        def back(g):
            return np.broadcast_to(g if keepdims else np.expand_dims(g, axes), self.shape)

        return Var(self.value.sum(axes, keepdims=keepdims), ((self, back),))

    def mean(self, axis, where=None):
        """The mean, which keeps its axes with size 1; 0 if there are no elements."""
        kept = np.broadcast_to(True if where is None else where, self.shape)
        count = np.maximum(kept.sum(axis, keepdims=True), 1)
        return (self * kept).sum(axis, keepdims=True) / count

    def reshape(self, *shape):
        return Var(self.value.reshape(*shape), ((self, lambda g: g.reshape(self.shape)),))

    def transpose(self, axes):
        return Var(self.value.transpose(axes), ((self, lambda g: g.transpose(np.argsort(axes))),))

    def take(self, index):
        """Elements of the flattened array; an index of -1 is a zero."""

        def back(g):
            out = np.zeros(self.value.size + 1)
            np.add.at(out, index.ravel(), g.ravel())
            return out[:-1].reshape(self.shape)

        return Var(np.append(self.value.ravel(), 0.0)[index], ((self, back),))

    def __getitem__(self, key):
        return self.take(np.arange(self.value.size).reshape(self.shape)[key])

    def grad(self, cotangent, *wrt):
        """The gradients of `sum(self * cotangent)`."""
        order, seen = [], set()

        def visit(x):
            if id(x) not in seen:
                seen.add(id(x))
                for parent, _ in x.parents:
                    visit(parent)
                order.append(x)

        visit(self)
        grads = {id(self): np.asarray(cotangent, np.float64)}
        for x in reversed(order):
            for parent, back in x.parents:
                if id(x) in grads:
                    grads[id(parent)] = grads.get(id(parent), 0.0) + back(grads[id(x)])
        return [np.broadcast_to(grads.get(id(x), 0.0), x.shape) for x in wrt]


def var(x):
    return x if isinstance(x, Var) else Var(x)


def fit(g, x):
    """The sum over the axes that were broadcast."""
    g = g.sum(tuple(range(g.ndim - x.ndim)))
    axes = tuple(i for i, n in enumerate(x.shape) if n == 1 and g.shape[i] != 1)
    return g.sum(axes, keepdims=True)


def einsum(equation, a, b):
    a, b = var(a), var(b)
    left, out = equation.split("->")
    one, two = left.split(",")

    # NumPy does not allow an ellipsis that one operand lacks.
    rest = "UVWXYZ"[: max(x.ndim - len(s.replace("...", "")) for x, s in ((a, one), (b, two)))]
    one, two, out = (s.replace("...", rest) for s in (one, two, out))

    def back(wanted, other, theirs):
        # An axis that only this operand has is summed over, so the gradient is constant along it.
        def run(g, own):
            kept = "".join(c for c in wanted if c in out + theirs)
            small = np.einsum(f"{out},{theirs}->{kept}", g, other.value)
            index = tuple(slice(None) if c in kept else None for c in wanted)
            return np.broadcast_to(small[index], own.shape)

        return run

    first, second = back(one, b, two), back(two, a, one)
    value = np.einsum(f"{one},{two}->{out}", a.value, b.value)
    return Var(value, ((a, lambda g: first(g, a)), (b, lambda g: second(g, b))))


def exp(x):
    y = np.exp(x.value)
    return Var(y, ((x, lambda g: g * y),))


def log(x):
    return Var(np.log(x.value), ((x, lambda g: g / x.value),))


def tanh(x):
    y = np.tanh(x.value)
    return Var(y, ((x, lambda g: g * (1 - y * y)),))


def sigmoid(x):
    return 0.5 * tanh(0.5 * x) + 0.5


def where(condition, a, b):
    a, b = var(a), var(b)
    return Var(
        np.where(condition, a.value, b.value),
        ((a, lambda g: fit(np.where(condition, g, 0), a)), (b, lambda g: fit(np.where(condition, 0, g), b))),
    )  # fmt: skip


def stack(xs, axis=0):
    def back(i):
        return lambda g: np.take(g, i, axis)

    return Var(np.stack([x.value for x in xs], axis), [(x, back(i)) for i, x in enumerate(xs)])


def concatenate(xs, axis=-1):
    ends = np.cumsum([0, *(x.shape[axis] for x in xs)])

    def back(i):
        return lambda g: np.take(g, np.arange(ends[i], ends[i + 1]), axis)

    return Var(
        np.concatenate([x.value for x in xs], axis), [(x, back(i)) for i, x in enumerate(xs)]
    )


def softmax(x):
    e = exp(x - x.value.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)
