"""The bridge into lists and Stacks, with reports and prefixes, and out again."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx as fnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors.numpy import save_file

import nnx
from nnx.bridge import BridgeError, from_flax, from_state_dict, to_flax, to_state_dict

FORMS = {
    "list": list,
    "Stack": nnx.Stack.of,
    "Sequential": lambda layers: nnx.Sequential(*layers),
}


class Block(nnx.Module):
    def __init__(self):
        self.attn = nnx.MultiHeadAttention(2, 4, decode=False)
        self.norm = nnx.BatchNorm(4, use_running_average=True)

    def __call__(self, x):
        return self.norm(self.attn(x))


class Model(nnx.Module):
    def __init__(self, form=list):
        self.embed = nnx.Embed(5, 4)
        self.blocks = form([Block() for _ in range(3)])
        self.conv = nnx.ConvTranspose(4, 6, (3, 2))
        self.rnn = nnx.Bidirectional(nnx.RNN(nnx.LSTMCell(6, 2)), nnx.RNN(nnx.LSTMCell(6, 2)))
        self.head = nnx.Sequential(nnx.Linear(4, 2), nnx.relu, nnx.PReLU())
        self.scale = nnx.Ref(jnp.ones(2), "params")


def torch_state(seed=0):
    """PyTorch's `state_dict()` for such a model."""
    shapes = {"embed.weight": (5, 4)}
    for i in range(3):
        shapes |= {
            f"blocks.{i}.attn.in_proj_weight": (12, 4),
            f"blocks.{i}.attn.in_proj_bias": (12,),
            f"blocks.{i}.attn.out_proj.weight": (4, 4),
            f"blocks.{i}.attn.out_proj.bias": (4,),
            f"blocks.{i}.norm.weight": (4,),
            f"blocks.{i}.norm.bias": (4,),
            f"blocks.{i}.norm.running_mean": (4,),
            f"blocks.{i}.norm.running_var": (4,),
            f"blocks.{i}.norm.num_batches_tracked": (),
        }
    shapes |= {"conv.weight": (4, 6, 3, 2), "conv.bias": (6,)}
    for end in ("", "_reverse"):
        shapes |= {f"rnn.weight_ih_l0{end}": (8, 6), f"rnn.weight_hh_l0{end}": (8, 2)}
        shapes |= {f"rnn.bias_ih_l0{end}": (8,), f"rnn.bias_hh_l0{end}": (8,)}
    shapes |= {"head.0.weight": (2, 4), "head.0.bias": (2,), "head.2.weight": (1,), "scale": (2,)}
    rng = np.random.default_rng(seed)
    state = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    for name in state:
        if "bias_hh" in name:
            state[name][:] = 0
        if "num_batches" in name:
            state[name] = np.array(0, np.int64)
    return state


def same(a, b):
    assert list(a) == list(b)
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.mark.parametrize("form", FORMS)
def test_a_state_dict_goes_in_and_comes_out(form):
    state = torch_state()
    ours = from_state_dict(state, nnx.eval_shape(lambda: Model.init(0)(FORMS[form])))
    out = to_state_dict(ours)
    assert set(out) == set(state)
    same({name: out[name] for name in state}, state)
    same(to_state_dict(ours, like=state), state)
    layer = ours.blocks[1]
    wanted = state["blocks.1.attn.in_proj_weight"][:4].T.reshape(4, 2, 2)
    np.testing.assert_array_equal(layer.attn.query.kernel, wanted)


def test_out_with_other_names_tied_weights_and_dtypes():
    state = torch_state()
    ours = from_state_dict(state, Model.init(0)())
    names = {"tok": "embed", "lm_head": "embed", "h": "blocks", "out": "head.0", "k": "conv.kernel"}
    out = to_state_dict(ours, names)
    assert out["tok.weight"] is not out["lm_head.weight"]
    np.testing.assert_array_equal(out["tok.weight"], out["lm_head.weight"])
    np.testing.assert_array_equal(out["h.2.norm.weight"], state["blocks.2.norm.weight"])
    np.testing.assert_array_equal(out["out.weight"], state["head.0.weight"])
    assert out["k"].shape == (3, 2, 4, 6) and "conv.weight" not in out and "embed.weight" not in out
    again = from_state_dict(out, Model.init(1)(nnx.Stack.of), names)
    same(to_state_dict(again, names), out)
    half = to_state_dict(
        ours, like={k: v.astype(jnp.bfloat16) if v.dtype == "f4" else v for k, v in state.items()}
    )
    assert half["head.0.weight"].dtype == jnp.bfloat16
    shared = nnx.Linear.init(0)(2, 2)
    assert list(to_state_dict({"a": shared, "b": shared})) == [
        "a.weight",
        "a.bias",
        "b.weight",
        "b.bias",
    ]
    with pytest.raises(ValueError, match="Pass like="):
        to_state_dict(ours, lambda name: name)


class Tensor:
    """Behaves like a torch tensor, as far as the bridge uses it."""

    def __init__(self, array, dtype):
        self.array, self.dtype, self.shape = array, dtype, array.shape

    def new_tensor(self, array, dtype):
        return Tensor(np.asarray(array), dtype)


def test_out_as_tensors_where_the_other_side_has_them():
    ours = nnx.Linear.init(0)(2, 3, param_dtype=jnp.bfloat16)
    like = {"weight": Tensor(np.zeros((3, 2)), "torch.bfloat16"), "bias": Tensor(np.zeros(3), "f")}
    out = to_state_dict(ours, like=like)
    assert out["weight"].dtype == "torch.bfloat16" and out["weight"].array.dtype == np.float32
    np.testing.assert_array_equal(out["weight"].array, np.asarray(ours.kernel, np.float32).T)


def test_what_does_not_fit_on_the_way_out():
    ours, state = Model.init(0)(), torch_state()
    state["more.weight"] = np.zeros(3)
    state["head.0.weight"] = np.zeros((3, 4), np.float32)
    del state["scale"]
    with pytest.raises(BridgeError) as error:
        to_state_dict(ours, like=state)
    text = str(error.value)
    assert r"head.0.weight has shape (3, 4), but head.layers.0.kernel is float32[4,2]" in text
    assert "missing in our model:\n    more.weight" in text
    assert "unexpected in our model:\n    scale" in text
    with pytest.raises(BridgeError, match="embed.embedding is a shape without values"):
        to_state_dict(nnx.eval_shape(lambda: Model.init(0)()), like=torch_state())


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod."])
def test_a_prefix_is_named_and_taken(prefix):
    state = torch_state()
    with_prefix = {prefix + name: x for name, x in state.items()}
    with pytest.raises(BridgeError, match=f"pass prefix='{prefix}'"):
        from_state_dict(with_prefix, Model.init(0)())
    for given in (prefix, ("module", "_orig_mod", "model")):
        ours = from_state_dict(with_prefix, Model.init(0)(), prefix=given)
        same(to_state_dict(ours, like=state), state)


def test_a_report_says_what_was_done():
    state = torch_state()
    kernel = state["head.0.weight"]
    state |= {"more": np.zeros(2), "old": np.zeros(1), "head.0.weight": np.zeros((3, 4))}
    del state["blocks.1.norm.weight"]
    ours = Model.init(0)(nnx.Stack.of)
    scale = ours.blocks.layers.norm.scale
    result, report = from_state_dict(state, ours, {"old": None}, strict=False)
    assert result is ours and ("embed", "embedding") in report.loaded
    assert report.missing == (("blocks", "1", "norm", "scale"),)
    assert report.unexpected == (("more",),) and ("old",) in report.skipped
    assert report.mismatched == {
        ("head", "layers", "0", "kernel"): ("float64[4,3]", "float32[4,2]")
    }
    assert "skipped: " in repr(report) and kernel.shape == (2, 4)
    np.testing.assert_array_equal(ours.blocks.layers.norm.scale[1], scale[1])
    np.testing.assert_array_equal(ours.blocks.layers.norm.scale[2], state["blocks.2.norm.weight"])


def test_shards_with_their_index(tmp_path):
    state = torch_state()
    index = {}
    for i in range(2):
        part = dict(list(state.items())[i::2])
        save_file(part, tmp_path / f"model-{i}.safetensors")
        index |= dict.fromkeys(part, f"model-{i}.safetensors")
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": index}))
    ours = from_state_dict(path, nnx.eval_shape(lambda: Model.init(0)(nnx.Stack.of)))
    same(to_state_dict(ours, like=state), state)
    for bad, text in [
        (index | {"x": "../x.safetensors"}, "not the name of a file beside it"),
        (index | {"x": "model-1.safetensors"}, "model-1.safetensors lacks 'x'"),
        (index | {"x": "model-9.safetensors"}, "No such file"),
        (3, "not an index of safetensors files"),
    ]:
        path.write_text(json.dumps({"weight_map": bad}))
        with pytest.raises(nnx.LoadError, match=text):
            from_state_dict(path, ours)


def test_straight_into_shards():
    state = {"weight": np.arange(8, dtype=np.float64).reshape(2, 4), "bias": np.zeros(2)}
    sharding = NamedSharding(Mesh(np.array(jax.devices()[:1]), ("x",)), PartitionSpec("x"))
    ours = nnx.eval_shape(lambda: nnx.Linear.init(0)(4, 2))
    for ref in nnx.refs(ours).values():
        ref.value = jax.ShapeDtypeStruct(ref.value.shape, jnp.bfloat16, sharding=sharding)
    from_state_dict(state, ours)
    assert ours.kernel.sharding == sharding and ours.kernel.dtype == jnp.bfloat16
    np.testing.assert_array_equal(ours.kernel, state["weight"].T)


class FlaxBlock(fnx.Module):
    def __init__(self, rngs):
        self.linear = fnx.Linear(3, 3, rngs=rngs)
        self.norm = fnx.BatchNorm(3, rngs=rngs)


class FlaxModel(fnx.Module):
    def __init__(self, seed, stacked):
        if stacked:
            rngs = fnx.Rngs(seed).split(3)
            self.blocks = fnx.vmap(FlaxBlock)(rngs)
        else:
            self.blocks = fnx.List([FlaxBlock(fnx.Rngs(seed + i)) for i in range(3)])


class OurBlock(nnx.Module):
    def __init__(self):
        self.linear, self.norm = nnx.Linear(3, 3), nnx.BatchNorm(3)

    def __call__(self, x):
        return self.norm(self.linear(x))


class OurModel(nnx.Module):
    def __init__(self, form):
        self.blocks = form([OurBlock() for _ in range(3)])


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_flax_both_ways(form, stacked):
    theirs = FlaxModel(0, stacked)
    ours = from_flax(theirs, nnx.eval_shape(lambda: OurModel.init(0)(FORMS[form])))
    blocks = theirs.blocks
    wanted = blocks.linear.kernel[...] if stacked else [b.linear.kernel[...] for b in blocks]
    np.testing.assert_array_equal([b.linear.kernel for b in ours.blocks], np.stack(wanted))
    empty = to_flax(ours, FlaxModel(7, stacked))
    for a, b in zip(
        jax.tree.leaves(fnx.state(empty)), jax.tree.leaves(fnx.state(theirs)), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    _, report = from_flax(theirs, ours, strict=False)
    assert not report.missing and not report.mismatched
