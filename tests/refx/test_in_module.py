"""`InModule` works wherever a filter does."""

import copy
import pickle

import jax
import jax.numpy as jnp
import optax
import pytest

import nnx


class Norm(nnx.LayerNorm):
    """A subclass."""


class Block(nnx.Module):
    def __init__(self):
        self.linear = nnx.Linear(2, 2)
        self.norms = [nnx.LayerNorm(2), {"last": Norm(2)}]

    def __call__(self, x):
        return self.norms[1]["last"](self.norms[0](self.linear(x)))


class Net(nnx.Module):
    def __init__(self):
        self.block = Block()
        self.head = nnx.Linear(2, 2)

    def __call__(self, x):
        return self.head(self.block(x))


X = jnp.array([[1.0, 2.0], [3.0, 5.0]])
NORMS = ["block.norms.0.bias", "block.norms.0.scale"]
LAST = ["block.norms.1.last.bias", "block.norms.1.last.scale"]
IN_NORM = nnx.InModule(nnx.LayerNorm)


def names(paths):
    return sorted(".".join(path) for path in paths)


@pytest.fixture
def net():
    return Net.init(0)()


@pytest.mark.parametrize(
    "filter, expected",
    [
        (IN_NORM, NORMS + LAST),
        (nnx.InModule(Norm), LAST),
        (nnx.InModule((Norm, nnx.Embed)), LAST),
        (
            nnx.All(nnx.InModule(Block), nnx.Not(IN_NORM)),
            ["block.linear.bias", "block.linear.kernel"],
        ),
        (("batch_stats", nnx.InModule(Norm)), LAST),
        (nnx.InModule(nnx.Embed), []),
    ],
)
def test_it_selects_by_the_class_of_an_owner_near_or_far(net, filter, expected):
    assert names(net[filter]) == expected
    assert names(nnx.split(net, filter, ...)[1]) == expected
    assert names(nnx.get_partition([net], filter)) == [f"0.{name}" for name in expected]
    assert len(net[nnx.InModule(Net)]) == 8


def test_it_is_a_filter_of_every_transformation(net):
    assert names(nnx.grad(lambda m: m(X).sum(), wrt=IN_NORM)(net)) == NORMS + LAST
    assert names(nnx.jit(lambda m: m[IN_NORM])(net)) == NORMS + LAST
    assert names(nnx.jit(nnx.grad(lambda m: m(X).sum(), wrt=nnx.InModule(Norm)))(net)) == LAST
    two = nnx.clone(net)
    stacked = jax.tree.map(lambda v: jnp.stack([v, v]), net[IN_NORM])
    nnx.update(two, stacked, strict=False)
    out = nnx.vmap(lambda m, x: m(x), in_axes=({IN_NORM: 0, ...: None}, 0))(two, X)
    assert jnp.allclose(out, net(X), atol=1e-5)
    step = nnx.jit(
        lambda m: nnx.update(m, jax.tree.map(lambda v: 2 * v, m[IN_NORM])), donate=IN_NORM
    )
    scale, kernel = net.block.norms[0].scale, net.head.kernel
    step(net)
    assert scale.is_deleted() and not kernel.is_deleted()
    assert (net.block.norms[0].scale == 2).all() and net.head.kernel is kernel


def test_it_says_what_may_be_written_and_trained(net):
    with nnx.mutable(IN_NORM, tree=net):
        net.block.norms[0].bias = jnp.ones(2)
        with pytest.raises(nnx.NotMutableError):
            net.head.bias = jnp.ones(2)
    with pytest.raises(nnx.FilterError, match="needs the tree"):
        with nnx.mutable(IN_NORM):
            pass
    net[IN_NORM] = net[IN_NORM]
    with pytest.raises(nnx.UnknownPathError, match=r"InModule\(LayerNorm\) does not select"):
        net[IN_NORM] = net["params"]
    optimizer = nnx.Optimizer(net, {IN_NORM: optax.set_to_zero(), ...: optax.sgd(0.1)})
    before = net["params"]
    optimizer.update(net, jax.tree.map(jnp.ones_like, before))
    changed = [path for path, w in net["params"].items() if not jnp.array_equal(w, before[path])]
    assert names(changed) == names(before.keys() - set(net[IN_NORM]))
    mask = nnx.training.mask(net, nnx.Not((IN_NORM, nnx.PathContains("bias"))))
    assert names(p for p, on in mask.items() if on) == ["block.linear.kernel", "head.kernel"]
    nnx.Optimizer(net, optax.adamw(1e-3, mask=mask)).update(net, before)


def test_it_selects_the_modules_in_a_module(net):
    _, captured = nnx.capture(net, nnx.InModule(Block))(X)
    assert names(captured) == ["block.linear", "block.norms.0", "block.norms.1.last"]


def test_paths_stay_plain_where_they_leave(net):
    path = next(iter(net["params"]))
    for copied in (pickle.loads(pickle.dumps(path)), copy.deepcopy(path)):
        assert copied == path and all(type(name) is str for name in copied)
    # A dict with such a key is like any other.
    key = path[-1]
    a, b = nnx.split({key: nnx.Ref(1.0)})[0], nnx.split({str(key): nnx.Ref(1.0)})[0]
    assert a is b


def test_what_it_takes_and_what_has_no_modules(net):
    with pytest.raises(nnx.FilterError, match="takes the class of a module.*got 'LayerNorm'"):
        nnx.InModule("LayerNorm")
    with pytest.raises(
        nnx.FilterError, match=r"A Partition does not know its modules.*training\.mask"
    ):
        nnx.get_partition(net["params"], IN_NORM)
    assert repr(nnx.InModule((Norm, Block))) == "InModule(Norm, Block)"
    assert IN_NORM == nnx.InModule(nnx.LayerNorm) != nnx.InModule(Norm)
    assert hash(IN_NORM) == hash(nnx.InModule(nnx.LayerNorm))


def test_a_saved_filter(tmp_path):
    wrapped = nnx.Linear.init(0)(2, 2)
    wrapped.filter = IN_NORM
    nnx.save(tmp_path / "m.npz", wrapped)
    assert nnx.load(tmp_path / "m.npz").filter == IN_NORM
