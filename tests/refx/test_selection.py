"""A filter that selects nothing: a mistake is an error, but a missing collection is not."""

import jax.numpy as jnp
import pytest

import nnx
import refx


class Block(refx.Node):
    def __init__(self):
        self.kernel = refx.Ref(jnp.ones(2), "params")
        self.table = jnp.ones(3)


class Plain(refx.Node):
    pass


class Net(nnx.Module):
    def __init__(self):
        self.enc = Block()
        self.blocks = [self.enc, Block()]
        self.act = Plain()
        self.named = {"a": Block()}
        self.size = 3
        self.cache = None


@pytest.fixture
def model():
    return Net()


@pytest.mark.parametrize(
    "filter, message",
    [
        ("enc", r"^'enc' is a path.*nnx\.PathMatches\('enc\.\*\*'\).*model\.enc goes there\.$"),
        (
            "enc.kernel",
            r"^'enc\.kernel' is a path.*PathMatches\('enc\.kernel'\).*model\.enc\.kernel",
        ),
        ("enc.table", r"^'enc\.table' is a path.*PathMatches\('enc\.table'\)"),
        ("blocks.0.kernel", r"PathMatches\('blocks\.0\.kernel'\).*model\.blocks\[0\]\.kernel goes"),
        ("blocks", r"PathMatches\('blocks\.\*\*'\)"),
        ("named.a", r"PathMatches\('named\.a\.\*\*'\)"),
        ("blocks.*.kernel", r"PathMatches\('blocks\.\*\.kernel'\) selects by path\.$"),
        (
            "act",
            r"^'act' is a path here, but a string selects a collection: model\.act goes there\.$",
        ),
        ("parms", r"^There is no collection 'parms' here; did you mean 'params'\?$"),
        (("batch_stats", "parms"), "did you mean 'params'"),
        (refx.Any("batch_stats", "parms"), "did you mean 'params'"),
        (refx.All("parms", refx.PathContains("enc")), "did you mean 'params'"),
        (
            0,
            r"^A filter selects Refs, and 0 is not a collection here.*holds it: model\.blocks\[0\]",
        ),
        (-1, r"holds it: model\.blocks\[-1\]"),
        (slice(0, 2), r"slice the list that holds them: model\.layers\[1:3\]"),
        (
            refx.OfType(Block),
            r"^OfType\(Block\) selects nothing\. Filters see Refs.*PathContains",
        ),
        (refx.OfType((int, Block)), r"but not a Block"),
        (
            Block,
            r"^Block is a class, not a filter\. Filters see Refs.*model\.encoder\['params'\]",
        ),
    ],
)
def test_a_mistake_is_an_error_that_says_what_to_write(model, filter, message):
    with pytest.raises(refx.FilterError, match=message):
        model[filter]
    with pytest.raises(refx.FilterError, match=message):
        model[filter] = {}
    with pytest.raises(refx.FilterError, match=message):
        refx.split(model, filter, ...)
    with pytest.raises(refx.FilterError, match=message):
        model.apply(mutable=filter)()


@pytest.mark.parametrize(
    "filter",
    [
        *("batch_stats", "opt_state", "cache", "size", "params_ema", "ema_params"),
        *("", None, (), True),
        refx.OfType(int),
        refx.PathContains("head"),
        refx.PathContains("enc.0"),
        refx.Not(...),
        refx.All("params", refx.PathContains("head")),
        lambda path, ref: False,
        ("batch_stats", "opt_state"),
    ],
)
def test_what_a_model_happens_to_lack_is_not_an_error(model, filter):
    assert len(model[filter]) == 0
    model[filter] = {}
    _, part, rest = refx.split(model, filter, ...)
    assert not len(part) and len(rest) == 6
    with refx.mutable(filter, model):
        pass


def test_a_collection_that_has_the_name_of_an_attribute_or_is_a_number():
    model = Net()
    model.stats = refx.Ref(1.0, "enc")
    model.more = refx.Ref(2.0, 0)
    assert [list(model[f]) for f in ("enc", 0)] == [[("stats",)], [("more",)]]
    assert len(model["paramz", "enc"]) == 1


def test_a_path_of_a_shared_ref_and_a_tree_that_is_no_node(model):
    with pytest.raises(refx.FilterError, match=r"'0\.blocks\.0\.kernel' is a path"):
        refx.get_partition([model], "0.blocks.0.kernel")
    with pytest.raises(refx.FilterError, match=r"holds it: model\.layers\[3\]"):
        refx.get_partition(model.enc, 3)


def test_filters_of_transformations(model):
    def read(model):
        return model.enc.kernel.value.sum()

    near = r"no collection 'parms' here; did you mean 'params'"
    with pytest.raises(nnx.DifferentiationError, match=rf"nothing to differentiate.*{near}"):
        nnx.grad(read, wrt="parms")(model)
    with pytest.raises(nnx.DifferentiationError, match=r"are 'params'\.$"):
        nnx.grad(read, wrt="batch_stats")(model)
    with pytest.raises(refx.FilterError, match=near):
        nnx.jit(read, donate="parms")(model)
    with pytest.raises(refx.FilterError, match=near):
        nnx.vmap(read, in_axes=({"parms": 0, ...: None},), axis_size=2)(model)
    with pytest.raises(refx.FilterError, match=near):
        nnx.scan(lambda c, m: (c, read(m)), 0.0, model, axes={"parms": nnx.CARRY})
    assert nnx.jit(read, donate="opt_state")(model) == 2.0
    axes = ({"batch_stats": 0, "params": None, ...: None},)
    assert nnx.vmap(read, in_axes=axes, axis_size=2)(model).tolist() == [2.0, 2.0]
