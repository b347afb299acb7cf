"""`jax.export` of functions of modules: what is called, what is written, and what is refused."""

import json
import random
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax import export

import nnx
from nnx import _exported

X = jnp.ones((3, 2))


class Net(nnx.Module):
    def __init__(self):
        self.blocks = [nnx.Linear(2, 2), nnx.BatchNorm(2)]
        self.tied = self.blocks[0]
        self.table = jnp.arange(2.0)
        self.act, self.sizes, self.gain = jax.nn.relu, {"a": (1, None)}, 1.5

    def __call__(self, x, scale=1.0):
        for block in [*self.blocks, self.tied]:
            x = block(x)
        return self.act(x) * self.gain * scale + self.table


@pytest.fixture
def net():
    return Net.init(0)().eval()


def again(exported):
    return export.deserialize(exported.serialize())


@pytest.mark.parametrize("transform", [nnx.jit, nnx.jit_filter, jax.jit])
def test_the_program_is_called_with_the_arguments_of_the_user(net, transform):
    f = transform(lambda model, x, *, scale: {"y": model(x, scale)})
    exported = export.export(f)(net, X, scale=jnp.array(2.0))
    assert exported.in_tree == jax.tree.structure(((net, X), {"scale": 2.0}))
    for program in (exported, again(exported)):
        assert jnp.allclose(program.call(net, X, scale=3.0)["y"], net(X, 3.0))
        net.table = net.table + 1
        net.blocks[0].bias = net.blocks[0].bias + 1
        assert jnp.allclose(program.call(net, X, scale=3.0)["y"], net(X, 3.0))
    gradient = jax.grad(lambda x: exported.call(net, x, scale=2.0)["y"].sum())(X)
    assert jnp.allclose(gradient, jax.grad(lambda x: net(x, 2.0).sum())(X), atol=1e-5)


@pytest.mark.parametrize("kind", ["module", "method", "closure", "static"])
@pytest.mark.parametrize("transform", [nnx.jit, nnx.jit_filter])
def test_what_is_no_argument_is_a_constant_of_the_program(net, kind, transform):
    f, arguments = {
        "module": (transform(net), (X,)),
        "method": (transform(net.__call__), (X,)),
        "closure": (transform(lambda x: net(x)), (X,)),
        "static": (transform(lambda n, x: net(x) * n / 2, static_argnums=0), (2, X)),
    }[kind]
    expected = net(X)
    program = again(export.export(f)(*arguments))
    net.table = net.table + 1  # the program is as it was
    assert jnp.allclose(program.call(X), expected)
    assert jnp.allclose(f(*arguments), net(X))


@pytest.mark.parametrize("transform", [nnx.jit, nnx.jit_filter])
def test_arguments_are_shapes_of_any_size_for_any_platform(net, transform):
    f = transform(lambda model, x: model(x))
    shapes = jax.ShapeDtypeStruct(export.symbolic_shape("batch, 2"), jnp.float32)
    like = jax.eval_shape(lambda m: m, net)
    program = again(export.export(f, platforms=("cpu", "tpu"))(like, shapes))
    assert program.platforms == ("cpu", "tpu")
    for size in (1, 5):
        x = jnp.ones((size, 2))
        assert jnp.allclose(program.call(net, x), net(x), atol=1e-5)
    assert jnp.allclose(f(net, X), net(X))


@pytest.mark.parametrize("transform", [nnx.jit, nnx.jit_filter])
def test_modules_are_results_and_share_what_they_share(net, transform):
    f = transform(lambda a, b: (a.blocks, b[0].table, nnx.grad(lambda a: b[0](X).sum())(a)))
    program = again(export.export(f)(net, [net]))
    blocks, table, grads = program.call(net, [net])
    assert isinstance(blocks[0], nnx.Linear) and jnp.array_equal(blocks[0].kernel, net.tied.kernel)
    assert jnp.array_equal(table, net.table)
    expected = nnx.grad(lambda m: m(X).sum())(net)
    assert all(jnp.allclose(grads[path], g, atol=1e-5) for path, g in expected.items())


def test_frozen_modules_structures_and_other_trees(net):
    frozen = nnx.frozen(net)
    call = lambda model, x: model(x)  # noqa: E731
    program = again(export.export(nnx.jit(call))(frozen, X))
    assert jnp.allclose(program.call(frozen, X), net(X))
    with pytest.raises(ValueError, match="same pytree structure"):
        program.call(net, X)
    dagdef, values = nnx.split([net, {"b": net.table}])
    merged = jax.jit(lambda dagdef, values, x: nnx.merge(dagdef, values)[0](x))
    program = again(export.export(merged)(dagdef, values, X))
    assert jnp.allclose(program.call(dagdef, values, X), net(X))


def test_what_the_function_writes_is_refused_with_the_way_out():
    norm = nnx.BatchNorm(2)
    message = (
        r"nnx\.jit\(.*\) writes 'mean', 'var', but an exported program has no Refs.*"
        r"pure, state = nnx\.functional\(fn, model\).*model\.eval\(\)"
    )
    with pytest.raises(nnx.ReadOnlyError, match=message):
        export.export(nnx.jit(lambda m, x: m(x)))(norm, X)
    with pytest.raises(nnx.ReadOnlyError, match="writes 'mean', 'var'"):
        export.export(nnx.jit(norm))(X)
    with pytest.raises(nnx.ReadOnlyError, match="changes a module"):
        export.export(nnx.jit(lambda m: setattr(m, "new", 1)))(norm)
    assert not norm.mean.any() and not hasattr(norm, "new")
    # The way out.
    pure, state = nnx.functional(norm)
    program = again(export.export(jax.jit(pure))(state, X))
    out, new = program.call(state, X)
    assert jnp.allclose(out, 0) and jnp.allclose(new["mean"], 0.01)
    nnx.update(norm, new)
    assert jnp.allclose(norm.mean, 0.01)

    drop = nnx.Dropout(0.5)
    with (
        nnx.scope(0),
        pytest.raises(nnx.ReadOnlyError, match=r"draws keys.*model\.apply\(rngs=key\)"),
    ):
        export.export(nnx.jit(lambda m, x: m(x)))(drop, X)
    keyed = nnx.jit(lambda m, key, x: m.apply(rngs=key)(x))
    key = jax.random.key(1)
    program = export.export(keyed)(drop, jax.random.key(0), X)
    assert jnp.array_equal(program.call(drop, key, X), drop.apply(rngs=key)(X))


def test_a_filtered_function_may_write_what_it_is_given():
    norm = nnx.BatchNorm(2)
    f = nnx.jit_filter(lambda m, x: (m, m(x)))
    program = again(export.export(f)(norm, X))
    new, out = program.call(norm, X)
    assert jnp.allclose(out, 0) and jnp.allclose(new.mean, 0.01) and not norm.mean.any()
    with (
        nnx.scope(0),
        pytest.raises(nnx.ReadOnlyError, match=r"draws keys.*model\.apply\(rngs=key\)"),
    ):
        export.export(f)(nnx.Dropout(0.5), X)


def test_a_static_leaf_is_no_argument_of_an_exported_program(net):
    f = nnx.jit_filter(lambda m, x, how: m(x) if how == "as is" else -m(x))
    with pytest.raises(
        nnx.ArgumentError,
        match=r"nnx\.jit_filter\(.*\) was called with the static value 'as is'.*static_argnames",
    ):
        export.export(f)(net, X, "as is")
    f = nnx.jit_filter(f.__wrapped__, static_argnames="how")
    program = again(export.export(f)(net, X, how="negative"))
    assert jnp.allclose(program.call(net, X), -net(X))


def test_a_module_that_has_no_name_in_a_file(net):
    net.act = lambda x: x
    exported = export.export(nnx.jit(lambda m, x: m(x)))(net, X)
    assert jnp.allclose(exported.call(net, X), net(X))
    message = r"(?s)'act' is .*<lambda>.*@nnx\.saveable.*nnx\.merge\(dagdef, values\)\(x\)"
    with pytest.raises(nnx.SaveError, match=message):
        exported.serialize()


_PROGRAM = """
import sys
import jax.numpy as jnp, nnx
from jax import export

class Cell(nnx.Module):
    def __init__(self):
        self.linear = nnx.Linear(2, 2, bias_init=nnx.initializers.ones)
    def __call__(self, x):
        return 0 * self.linear(x) + 2

class Cell(nnx.Module):  # a notebook's cell that ran twice
    def __init__(self):
        self.linear = nnx.Linear(2, 2)
    def __call__(self, x):
        return 0 * self.linear(x) + 3

cell = Cell.init(0)()
if sys.argv[1] == "write":
    exported = export.export(nnx.jit(lambda m, x: m(x)))(cell, jnp.ones((3, 2)))
    open(sys.argv[2], "wb").write(exported.serialize())
else:
    program = export.deserialize(open(sys.argv[2], "rb").read())
    assert (program.call(cell, jnp.ones((3, 2))) == 3).all()
    print("called")
"""


def test_another_process_calls_it(tmp_path):
    def python(program, what):
        command = [sys.executable, "-c", program, what, str(tmp_path / "program")]
        return subprocess.run(command, capture_output=True, text=True)

    program = _PROGRAM.replace(", bias_init=nnx.initializers.ones", "")
    written = python(program, "write")
    assert written.returncode == 0, written.stderr
    # There the class is defined once.
    first = program.index("class Cell")
    once = program[:first] + program[program.index("class Cell", first + 1) :]
    read = python(once, "read")
    assert read.stdout == "called\n", read.stderr
    without = once.replace("class Cell", "class Other").replace("Cell.init", "Other.init")
    assert "class that this program has not imported" in python(without, "read").stderr


def test_a_damaged_structure_is_a_load_error(net):
    data = _exported._to_bytes(nnx.split(net)[0])
    assert _exported._from_bytes(data) is nnx.split(net)[0]
    draw = random.Random(0)
    for i in range(100):
        changed = bytearray(data)
        at = draw.randrange(len(changed))
        if i % 2:
            changed[at] = draw.randrange(256)
        else:
            del changed[at : at + draw.randrange(1, 20)]
        try:
            assert isinstance(_exported._from_bytes(bytes(changed)), nnx.DagDef)
        except nnx.LoadError as error:
            assert str(error).startswith("A module in an exported program cannot be read: ")
    for wrong in (b"", b"[]", b"{}", json.dumps({"structure": 1, "frozen": 2}).encode()):
        with pytest.raises(nnx.LoadError, match="cannot be read"):
            _exported._from_bytes(wrong)
