"""The reference differentiates correctly: compared with finite differences in float64."""

import numpy as np

from tests.nnx.layers import reference as ref
from tests.nnx.layers.tape import Var, concatenate, einsum, exp, log, sigmoid, softmax, tanh, where

A = np.random.default_rng(0).normal(size=(3, 4))
B = np.random.default_rng(1).normal(size=(4, 2))
INDEX = np.array([[0, -1, 5], [5, 5, 11]])

FUNCTIONS = [
    lambda a, b: a @ b,
    lambda a, b: einsum("ab,bc->c", a, b),
    lambda a, b: einsum("...b,bc->...", a, b),
    lambda a, b: exp(a) / (1 + a * a) - 2 / (3 + sigmoid(a)),
    lambda a, b: tanh(a[:, :2]) * log(1 + b[0] * b[0]) - (1 - b[3]) ** 3,
    lambda a, b: softmax(a).sum(0) + a.mean((0,)),
    lambda a, b: concatenate([a.take(INDEX), a.transpose((1, 0))[:2]], 0),
    lambda a, b: where(a.value > 0, a, 0.5 * a) * where(a.value > 1, 1.0, a[0]),
    lambda a, b: ref.stack([a, 2 * a], axis=-2).reshape(6, 4) @ b,
    lambda a, b: a.mean((1,), a.value < 0.5),
]


def test_gradients_are_differences():
    for function in FUNCTIONS:
        y = function(Var(A), Var(B))
        cotangent = np.random.default_rng(2).normal(size=y.shape)
        a, b = Var(A), Var(B)
        found = function(a, b).grad(cotangent, a, b)

        def at(a, b, function=function, cotangent=cotangent):
            return (function(Var(a), Var(b)).value * cotangent).sum()

        step = 1e-6
        for i, (x, gradient) in enumerate(zip((A, B), found, strict=True)):
            for place in np.ndindex(x.shape):
                ends = [[A, B], [A, B]]
                for end, sign in zip(ends, (1, -1), strict=True):
                    end[i] = x.copy()
                    end[i][place] += sign * step
                difference = (at(*ends[0]) - at(*ends[1])) / (2 * step)
                np.testing.assert_allclose(gradient[place], difference, atol=1e-7)
