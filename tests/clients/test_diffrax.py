"""Neural differential equations: each way to differentiate a solve, against the closed form."""

import diffrax
import jax
import jax.numpy as jnp
import pytest

import nnx

Y0 = jnp.array([1.0, 0.5])


class Field(nnx.Module):
    """y' = A y + b, whose solution is known."""

    a: jax.Array = nnx.param()

    def __init__(self):
        self.a = jnp.array([[-0.5, 1.0], [-1.0, -0.3]])
        self.steps = jnp.array(3)  # an array that is never differentiated

    def __call__(self, t, y, args):
        return self.a @ y


def exact(a):
    return (jax.scipy.linalg.expm(a) @ Y0).sum()


def solve(field, adjoint, term=lambda t, y, field: field(t, y, None)):
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(term), diffrax.Heun(), 0.0, 1.0, 1 / 32, Y0, args=field, adjoint=adjoint
    )
    return solution.ys.sum()


ADJOINTS = {
    "checkpoints": diffrax.RecursiveCheckpointAdjoint(),
    "backsolve": diffrax.BacksolveAdjoint(),
    "direct": diffrax.DirectAdjoint(),
}


@pytest.mark.parametrize("name", ADJOINTS)
def test_the_gradient_of_a_solve(name):
    field = Field()
    expected = jax.grad(exact)(field.a)
    loss = lambda field: solve(field, ADJOINTS[name])
    assert jnp.allclose(nnx.grad(loss)(field)["a"], expected, atol=2e-3)
    if name == "backsolve":
        return
    gradient = jax.jit(jax.grad(loss, allow_int=True))(field)
    assert jnp.allclose(gradient.a, expected, atol=2e-3)


def test_compiled_gradients_by_solving_backward():
    field, expected = Field(), jax.grad(exact)(Field().a)
    loss = lambda field: solve(field, ADJOINTS["backsolve"])
    assert jnp.allclose(nnx.jit(nnx.grad(loss))(field)["a"], expected, atol=2e-3)


def test_the_gradient_forward():
    field = Field()
    direction = {"a": jnp.ones((2, 2))}
    expected = jax.jvp(exact, (field.a,), (direction["a"],))
    given = nnx.jvp(lambda f: solve(f, diffrax.ForwardMode()), (field,), (direction,))
    assert jnp.allclose(jnp.stack(given), jnp.stack(expected), atol=2e-3)


class Decay(nnx.Module):
    """y' = k - 2 y, which comes to rest at k / 2."""

    k: jax.Array = nnx.param()

    def __init__(self):
        self.k = jnp.array(3.0)

    def __call__(self, t, y, args):
        return self.k - 2 * y


@pytest.mark.parametrize("transform", [nnx.grad, lambda f: nnx.jit(nnx.grad(f)), jax.grad])
def test_the_implicit_gradient_of_a_steady_state(transform):
    def rest(field):
        return diffrax.diffeqsolve(
            diffrax.ODETerm(field),
            diffrax.ImplicitEuler(),
            0.0,
            jnp.inf,
            0.5,
            jnp.array(0.0),
            max_steps=None,
            event=diffrax.Event(diffrax.steady_state_event(rtol=1e-4, atol=1e-4)),
            adjoint=diffrax.ImplicitAdjoint(),
            stepsize_controller=diffrax.PIDController(rtol=1e-3, atol=1e-4),
        ).ys[0]

    (gradient,) = jax.tree.leaves(transform(rest)(Decay()))
    assert jnp.allclose(gradient, 0.5, atol=1e-4)


def test_a_module_holds_a_solver_and_learns():
    class Model(nnx.Module):
        def __init__(self):
            self.field = Field()
            self.solver = diffrax.Heun()

        def __call__(self, y):
            return diffrax.diffeqsolve(
                diffrax.ODETerm(self.field), self.solver, 0.0, 1.0, 1 / 8, y
            ).ys[-1]

    model = Model()

    @nnx.jit
    def step(model):
        loss, grads = nnx.value_and_grad(lambda m: ((m(Y0) - 1.0) ** 2).sum())(model)
        model["params"] = jax.tree.map(lambda w, g: w - 0.3 * g, model["params"], grads)
        return loss

    losses = [step(model) for _ in range(10)]
    assert losses[-1] < 0.1 * losses[0]
