"""Roots, least squares and linear systems over modules: implicit gradients against closed forms."""

import jax
import jax.numpy as jnp
import lineax
import optimistix
import pytest

import nnx


class Square(nnx.Module):
    """y² - a: the root is √a, and its derivative 1 / (2 √a)."""

    a: jax.Array = nnx.param()

    def __init__(self):
        self.a = jnp.array(2.0)

    def __call__(self, y):
        return y**2 - self.a


EXPECTED = 1 / (2 * jnp.sqrt(2.0))
TOLERANCES = dict(rtol=1e-5, atol=1e-5)
SOLVERS = {
    "Newton": (optimistix.root_find, optimistix.Newton(**TOLERANCES)),
    "Chord": (optimistix.root_find, optimistix.Chord(**TOLERANCES)),
    "LM": (optimistix.least_squares, optimistix.LevenbergMarquardt(**TOLERANCES)),
    "GaussNewton": (optimistix.least_squares, optimistix.GaussNewton(**TOLERANCES)),
    "Dogleg": (optimistix.least_squares, optimistix.Dogleg(**TOLERANCES)),
}


@pytest.mark.parametrize("closes_over", [False, True])
@pytest.mark.parametrize("name", SOLVERS)
def test_the_implicit_gradient_of_a_solution(name, closes_over):
    solve, solver = SOLVERS[name]

    def root(model):
        if closes_over:
            return solve(lambda y, _: model(y), solver, jnp.array(1.0)).value
        return solve(lambda y, model: model(y), solver, jnp.array(1.0), args=model).value

    assert jnp.allclose(nnx.jit(nnx.grad(root))(Square())["a"], EXPECTED, atol=1e-3)
    transform = nnx.grad if closes_over else jax.grad
    (gradient,) = jax.tree.leaves(transform(root)(Square()))
    assert jnp.allclose(gradient, EXPECTED, atol=1e-3)


def test_a_module_is_what_is_found():
    x = jax.random.normal(jax.random.key(0), (8, 2))
    line = nnx.Linear.init(0)(2, 1)
    target = x @ jnp.array([[1.0], [-2.0]]) + 3
    solver = optimistix.LevenbergMarquardt(rtol=1e-6, atol=1e-6)
    found = optimistix.least_squares(lambda m, _: m(x) - target, solver, line).value
    assert jnp.allclose(found.kernel, jnp.array([[1.0], [-2.0]]), atol=1e-3)
    found.bias = found.bias + 1  # a module like any other
    assert not jnp.allclose(line.bias, 3, atol=0.1)

    pure, state = nnx.functional(line)
    loss = lambda state, _: ((pure(state, x)[0] - target) ** 2).sum()
    found = optimistix.minimise(loss, optimistix.BFGS(rtol=1e-6, atol=1e-6), state).value
    nnx.update(line, found)
    assert jnp.allclose(line.bias, 3, atol=1e-2)


class Matrix(nnx.Module):
    w: jax.Array = nnx.param()

    def __init__(self):
        self.w = jnp.array([[3.0, 1.0], [0.5, 2.0]])

    def __call__(self, x):
        return self.w @ x


def test_linear_systems_whose_operator_is_a_module():
    b = jnp.array([1.0, 2.0])
    exact = lambda w: jnp.linalg.solve(w, b).sum()

    def by_jacobian(model):
        operator = lineax.JacobianLinearOperator(lambda x, model: model(x), jnp.zeros(2), model)
        return lineax.linear_solve(operator, b).value.sum()

    def by_function(model):
        operator = lineax.FunctionLinearOperator(model, jax.eval_shape(lambda: b))
        return lineax.linear_solve(
            operator, b, lineax.AutoLinearSolver(well_posed=True)
        ).value.sum()

    for solve in (by_jacobian, by_function):
        model = Matrix()
        assert jnp.allclose(solve(nnx.frozen(model)), exact(model.w), atol=1e-4)
        gradient = nnx.jit(nnx.grad(solve))(model)["w"]
        assert jnp.allclose(gradient, jax.grad(exact)(model.w), atol=1e-4)


def test_an_operator_is_an_attribute():
    class Solve(nnx.Module):
        def __init__(self):
            self.operator = lineax.MatrixLinearOperator(2 * jnp.eye(2))

        def __call__(self, b):
            return lineax.linear_solve(self.operator, b).value

    model = Solve()
    for f in (nnx.jit(model), jax.jit(lambda b: nnx.frozen(model)(b)), nnx.clone(model)):
        assert jnp.allclose(f(jnp.ones(2)), 0.5)
    gradient = jax.grad(lambda m: m(jnp.ones(2)).sum())(model)
    assert jnp.allclose(gradient.operator.matrix, -0.25)
