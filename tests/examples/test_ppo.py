"""PPO: the pole, environments that restart, advantages, an iteration."""

import dataclasses
import math

import jax
import numpy as np

import nnx
from tests.examples import example, softmax

ppo = example("ppo")


def test_the_pole_falls_as_in_gymnasium():
    """Its equations, by hand, and its limits."""
    env = ppo.CartPole.init(0)()
    x, v, a, w = map(float, env.state)
    assert max(map(abs, (x, v, a, w))) <= 0.05
    for step in range(200):
        action = step % 3 == 0
        force = 10.0 if action else -10.0
        temp = (force + 0.05 * w**2 * math.sin(a)) / 1.1
        acc = (9.8 * math.sin(a) - math.cos(a) * temp) / (
            0.5 * (4 / 3 - 0.1 * math.cos(a) ** 2 / 1.1)
        )
        push = temp - 0.05 * acc * math.cos(a) / 1.1
        x, v, a, w = x + 0.02 * v, v + 0.02 * push, a + 0.02 * w, w + 0.02 * acc
        fallen = env.step(int(action))
        np.testing.assert_allclose(env.state, [x, v, a, w], rtol=1e-3, atol=1e-5)
        assert bool(fallen) == (abs(x) > 2.4 or abs(a) > math.radians(12))
        if fallen:
            break
    assert fallen and int(env.time) == step + 1


def test_each_environment_restarts_independently():
    with nnx.scope(0):
        episodes = nnx.vmap(lambda: ppo.Episodes(ppo.CartPole()), axis_size=4)()
    step = nnx.jit(nnx.vmap(lambda e, a: e.step(a)))
    starts, lengths = [np.asarray(episodes.env.state)], np.zeros(4, int)
    returns = [[] for _ in range(4)]
    assert len(np.unique(starts[0])) == 16 and np.isnan(episodes.last_return).all()
    rng = np.random.default_rng(0)
    for _ in range(60):
        reached, fallen, over = step(episodes, rng.integers(2, size=4))
        lengths += 1
        for i in range(4):
            if over[i]:
                assert fallen[i] and float(episodes.last_return[i]) == lengths[i]
                assert np.abs(episodes.env.state[i]).max() <= 0.05 < np.abs(reached[i]).max()
                returns[i].append(lengths[i])
                lengths[i] = 0
            else:
                np.testing.assert_array_equal(episodes.env.state[i], reached[i])
    assert all(returns)


def test_advantages_are_those_of_the_definition():
    settings = ppo.Settings(environments=3, steps=40)
    with nnx.scope(jax.random.key(0)):
        run = ppo.PPO(settings)
        steps = nnx.jit(lambda run: run.rollout())(run)
    value = np.asarray(run.agent.value(steps.state), np.float64)
    np.testing.assert_allclose(steps.target, steps.advantage + value, atol=1e-4)
    logits = np.asarray(run.agent.actor(steps.state), np.float64)
    chance = np.log(softmax(logits))
    taken = np.take_along_axis(chance, np.asarray(steps.action)[..., None], -1)[..., 0]
    np.testing.assert_allclose(steps.chance, taken, atol=1e-5)
    # In an episode, one step after the other: δ + γ λ A.
    checked = 0
    for i in range(3):
        for t in range(39):
            later = np.asarray(steps.state[t + 1, i])
            if np.abs(later).max() > 0.05:  # it did not restart
                delta = 1 + 0.99 * value[t + 1, i] - value[t, i]
                expected = delta + 0.99 * 0.95 * float(steps.advantage[t + 1, i])
                np.testing.assert_allclose(steps.advantage[t, i], expected, atol=1e-3)
                checked += 1
    assert checked > 60


def test_an_iteration_learns_and_is_one_program():
    settings = dataclasses.replace(ppo.Settings(), environments=4, steps=16, iterations=3)
    with nnx.scope(jax.random.key(0)):
        run = ppo.PPO(settings)
        before = {path: np.asarray(x) for path, x in run.agent["params"].items()}
        for _ in range(3):
            returns = run.iterate()
    assert returns.shape == (4,) and int(run.optimizer.step) == 3 * 32
    assert all((x != before[path]).any() for path, x in run.agent["params"].items())
    assert int(run.episodes.env.time.max()) <= 48
