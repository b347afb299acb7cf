"""Low-rank adapters: against flax.nnx, and in typical use."""

import flax.nnx as fnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nnx
from nnx.layers.lora import LoRA, LoRALinear
from nnx.layers.lora_surgery import apply_lora, merge_lora
from tests.nnx.layers.test_layer_norm import cheap, compare
from tests.nnx.layers.test_layers import draw

X = draw(5, 3)


@pytest.mark.parametrize("options", [{}, {"dtype": jnp.bfloat16}])
def test_lora_beside_a_module(options):
    theirs = fnx.LoRA(
        3,
        2,
        4,
        base_module=fnx.Linear(3, 4, rngs=fnx.Rngs(0)),
        b_initializer=cheap,
        rngs=fnx.Rngs(1),
        **options,
    )
    compare(LoRA.init(0)(3, 2, 4, base_module=nnx.Linear.init(0)(3, 4), **options), theirs, X)


@pytest.mark.parametrize(
    "options", [{}, {"dtype": jnp.bfloat16, "lora_dtype": jnp.bfloat16, "use_bias": False}]
)
def test_lora_linear(options):
    theirs = fnx.LoRALinear(3, 4, lora_rank=2, b_initializer=cheap, rngs=fnx.Rngs(0), **options)
    compare(LoRALinear.init(0)(3, 4, lora_rank=2, **options), theirs, X)


def test_initial_values_collection_scale_and_metadata():
    lora = LoRA.init(0)(64, 2, 64, alpha=4.0, lora_param_type="adapters", a_metadata={"axes": "in"})
    assert set(nnx.get_partition(lora, "adapters")) == {("lora_a",), ("lora_b",)}
    assert (lora.lora_b == 0).all() and abs(float(lora.lora_a.std()) - (2 / 64) ** 0.5) < 0.03
    assert nnx.get_ref(lora, "lora_a").metadata["axes"] == "in"
    lora.lora_b = jnp.ones((2, 64))
    x = draw(3, 64)
    np.testing.assert_allclose(lora(x), x @ lora.lora_a @ lora.lora_b * 2, atol=1e-4)


class Model(nnx.Module):
    def __init__(self):
        shared = nnx.Linear(3, 3)
        self.first, self.second = shared, shared
        self.blocks = [nnx.Linear(3, 3), (nnx.Linear(3, 3), {"deep": shared})]
        self.stack = nnx.Stack(lambda: nnx.Sequential(nnx.Linear(3, 3), nnx.tanh), 2)
        self.head = nnx.Linear(3, 2)

    def __call__(self, x):
        x = self.second(nnx.tanh(self.first(x)))
        x = self.blocks[1][1]["deep"](self.blocks[1][0](self.blocks[0](x)))
        return self.head(self.stack(x))


def fresh(**options):
    with nnx.scope(0):
        model = Model()
        kernels = nnx.refs(model)
        return model, kernels, apply_lora(model, 2, b_initializer=cheap, **options)


def test_apply_keeps_the_function_the_refs_and_the_sharing():
    with nnx.scope(0):
        model = Model()
        y, refs, stack = nnx.jit(lambda m: m(X))(model), nnx.refs(model), model.stack
        assert apply_lora(model, 2) is model
    np.testing.assert_array_equal(nnx.jit(lambda m: m(X))(model), y)
    after = nnx.refs(model)
    assert all(after[path] is cell for path, cell in refs.items())
    assert model.first is model.second is model.blocks[1][1]["deep"]
    assert isinstance(model.blocks[1], tuple) and model.stack is stack
    adapters = nnx.get_partition(model, "lora")
    assert len(adapters) == 2 * 5 and adapters["first.lora.lora_a"].shape == (3, 2)
    stacked = adapters["stack.layers.layers.0.lora.lora_a"]
    assert stacked.shape == (2, 3, 2) and not jnp.allclose(stacked[0], stacked[1])
    clone = nnx.clone(model)
    assert clone.first is clone.second and isinstance(clone.head, LoRALinear)


def test_training_trains_the_adapters_alone_and_merging_keeps_the_function():
    model, _, _ = fresh(alpha=1.0)
    kernel = model.head.kernel
    target = draw(5, 2)

    @nnx.jit
    def step(model):
        loss, grads = nnx.value_and_grad(lambda m: jnp.mean((m(X) - target) ** 2), wrt="lora")(
            model
        )
        model["lora"] = jax.tree.map(lambda w, g: w - 0.3 * g, model["lora"], grads)
        return loss

    losses = [float(step(model)) for _ in range(20)]
    assert losses[-1] < 0.9 * losses[0] and jnp.array_equal(model.head.kernel, kernel)
    forward = nnx.jit(lambda m: m(X))
    y, lora, cell = forward(model), model.head.lora, nnx.get_ref(model.head, "kernel")
    assert merge_lora(model) is model
    np.testing.assert_allclose(forward(model), y, atol=1e-5)
    np.testing.assert_allclose(cell.value, kernel + lora.lora_a @ lora.lora_b / 2, atol=1e-6)
    assert type(model.head) is nnx.Linear and nnx.get_ref(model.head, "kernel") is cell
    assert model.first is model.second and set(nnx.refs(model)) == set(nnx.refs(Model.init(1)()))


@pytest.mark.parametrize(
    "filter",
    [
        nnx.PathContains("head"),
        lambda path, module: path == ("head",),
        lambda path, module: module.out_features == 2,
        nnx.Not(lambda path, module: path != ("head",)),
    ],
)
def test_a_filter_or_a_predicate_selects(filter):
    model, _, _ = fresh(filter=filter)
    assert list(nnx.get_partition(model, "lora")) == [
        ("head", "lora", "lora_a"),
        ("head", "lora", "lora_b"),
    ]


def test_under_jit_the_surgery_reaches_the_model():
    with nnx.scope(0):
        model = nnx.Sequential(nnx.Linear(3, 3, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16))
        nnx.jit(lambda m: apply_lora(m, 2) and None)(model)
    assert isinstance(model.layers[0], LoRALinear) and model(X).dtype == jnp.bfloat16
    assert model.layers[0].lora.lora_a.dtype == jnp.bfloat16
    nnx.jit(lambda m: merge_lora(m) and None)(model)
    assert type(model.layers[0]) is nnx.Linear and len(nnx.refs(model)) == 2


def test_merging_names_a_tied_kernel_and_changes_nothing():
    with nnx.scope(0):
        model = nnx.Sequential(nnx.Linear(3, 3), nnx.Linear(3, 3))
        model.layers[1].kernel = nnx.get_ref(model.layers[0], "kernel")
        apply_lora(model, 2, nnx.PathContains("1"), b_initializer=cheap)
    before = nnx.get_partition(model)
    with pytest.raises(ValueError, match=r"kernel of 'layers.1' is tied to 'layers.0'.*Untie"):
        merge_lora(model)
    assert isinstance(model.layers[1], LoRALinear)
    assert all(jnp.array_equal(x, before[path]) for path, x in nnx.get_partition(model).items())


@pytest.mark.parametrize(
    "make, kind, message",
    [
        (lambda: LoRA(3, 0, 4), ValueError, "must be at least 1, but is 0"),
        (lambda: LoRA(3, 2, 4, base_module=nnx.Module()), TypeError, "callable, but is a Module"),
        (lambda: LoRA(3, 2, 4)(jnp.ones((2, 5))), ValueError, r"LoRA .* 3\), but got \(2, 5\)"),
        (
            lambda: LoRALinear(3, 4, lora_rank=2)(jnp.ones((2, 5))),
            ValueError,
            r"LoRALinear .* 3\), but got \(2, 5\)",
        ),
        (
            lambda: apply_lora(nnx.Sequential(nnx.Linear(3, 3)), 2, "params"),
            ValueError,
            "no layer of Sequential with the filter 'params'. Its Linear and LinearGeneral layers are: layers.0.",
        ),
        (lambda: apply_lora(nnx.BatchNorm(3), 2), ValueError, "LinearGeneral layers are: none"),
        (lambda: apply_lora(nnx.Linear(3, 3), 2), ValueError, "a Linear alone cannot be the model"),
        (
            lambda: merge_lora(nnx.Linear(3, 3)),
            ValueError,
            "found no layer with an adapter, such as a LoRALinear, in Linear",
        ),
    ],
)
def test_mistakes_raise_errors_that_say_what_is_wrong(make, kind, message):
    with nnx.scope(0), pytest.raises(kind, match=message):
        make()


def test_a_failure_changes_nothing():
    with nnx.scope(0):
        model = Model()
    before = nnx.split(model)[0]
    with pytest.raises(nnx.MissingStreamError):
        apply_lora(model, 2)
    assert nnx.split(model)[0] is before


def test_apply_draws_from_a_key_or_the_scope():
    def model():
        return nnx.Sequential(nnx.Linear.init(0)(3, 4))

    with nnx.scope(5):
        a = nnx.apply_lora(model(), 2)
    b = nnx.apply_lora(model(), 2, rngs=5)
    assert all(map(jnp.array_equal, a["lora"].values(), b["lora"].values()))
    plain = model()
    with pytest.raises(nnx.MissingStreamError, match="'params'"):
        nnx.apply_lora(plain, 2)
    assert type(plain.layers[0]) is nnx.Linear


def test_bound_methods_follow_their_layers():
    class Model(nnx.Module):
        def __init__(self):
            self.a = nnx.Linear(3, 3)
            self.call = self.a.__call__

    model = nnx.apply_lora(Model.init(0)(), 2, rngs=1)
    assert type(model.a) is nnx.LoRALinear and model.call.__self__ is model.a
    nnx.merge_lora(model)
    assert type(model.a) is nnx.Linear and model.call.__self__ is model.a
