"""Weights of PyTorch state dicts and safetensors files, against NumPy in float64."""

import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

import nnx
from nnx.bridge import BridgeError, from_state_dict
from nnx.layers.attention import MultiHeadAttention
from nnx.layers.conv_transpose import ConvTranspose
from nnx.layers.embedding import Embed
from nnx.layers.layer_norm import LayerNorm
from nnx.layers.linear_general import LinearGeneral
from nnx.layers.prelu import PReLU
from tests.nnx.test_bridge import DIGITS, close, unchanged

# PyTorch's layers in float64, as its documentation defines them.


def torch_conv(x, weight, bias, groups=1):
    """`Conv2d` with padding 1 over (N, C, H, W)."""
    n, c, h, w = x.shape
    out = np.zeros((n, len(weight), h, w))
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    per_in, per_out = c // groups, len(weight) // groups
    for g in range(groups):
        part = padded[:, g * per_in : (g + 1) * per_in]
        rows = slice(g * per_out, (g + 1) * per_out)
        for i in range(3):
            for j in range(3):
                out[:, rows] += np.einsum(
                    "nchw,oc->nohw", part[:, :, i : i + h, j : j + w], weight[rows, :, i, j]
                )
    return out + bias[:, None, None]


def torch_norm(x, s, name, axis=1):
    shape = [-1 if i == axis else 1 for i in range(x.ndim)]
    mean, var, w, b = (
        s[f"{name}.{k}"].reshape(shape) for k in ("running_mean", "running_var", "weight", "bias")
    )
    return (x - mean) / np.sqrt(var + 1e-5) * w + b


def digits_state(rng=None):
    rng = np.random.default_rng(0) if rng is None else rng
    return {
        "features.0.weight": rng.normal(size=(4, 1, 3, 3)),
        "features.0.bias": rng.normal(size=4),
        "features.1.weight": rng.normal(size=4),
        "features.1.bias": rng.normal(size=4),
        "features.1.running_mean": rng.normal(size=4),
        "features.1.running_var": rng.random(4) + 0.5,
        "features.1.num_batches_tracked": np.array(7),
        "features.3.weight": rng.normal(size=(6, 2, 3, 3)) / 4,
        "features.3.bias": rng.normal(size=6),
        "fc.weight": rng.normal(size=(10, 6)),
        "fc.bias": rng.normal(size=10),
    }


def torch_digits(s, images):
    x = np.moveaxis(images.astype(np.float64), -1, 1)
    x = torch_norm(torch_conv(x, s["features.0.weight"], s["features.0.bias"]), s, "features.1")
    x = torch_conv(np.maximum(x, 0), s["features.3.weight"], s["features.3.bias"], groups=2)
    return x.mean((2, 3)) @ s["fc.weight"].T + s["fc.bias"]


class OursAsTorch(nnx.Module):
    def __init__(self, fc="fc"):
        self.features = nnx.Sequential(
            nnx.Conv(1, 4, (3, 3)),
            nnx.BatchNorm(4, use_running_average=True),
            nnx.relu,
            nnx.Conv(4, 6, (3, 3), feature_group_count=2),
        )
        setattr(self, fc, nnx.Linear(6, 10))
        self.name = fc

    def __call__(self, x):
        return getattr(self, self.name)(self.features(x).mean((1, 2)))


def test_a_state_dict_with_the_same_names():
    s = digits_state()
    ours = OursAsTorch.init(0)()
    assert from_state_dict(s, ours) is ours
    close(ours(DIGITS), torch_digits(s, DIGITS), 1e-4)


@pytest.mark.parametrize(
    "names",
    [
        {"fc": "head"},
        {"fc.weight": "head.weight", "fc.bias": "head.bias"},
        {"fc": ("head",)},
        lambda name: name.replace("fc", "head"),
        [(r"fc\.(.*)", r"head.\1"), (r"(features.*)", r"\1")],
        [
            (r".*tracked", None),
            (r"fc\.(.*)", r"head.\1"),
            (r"features\.(.*)", r"features.layers.\1"),
        ],
    ],
    ids=["prefix", "names", "path", "function", "rules", "drops"],
)
def test_names(names):
    s = digits_state()
    ours = from_state_dict(s, OursAsTorch.init(0)("head"), names=names)
    close(ours(DIGITS), torch_digits(s, DIGITS), 1e-4)


def test_a_safetensors_file_and_several(tmp_path):
    s = {k: v.astype(np.float32) for k, v in digits_state().items() if v.ndim}
    save_file(s, path := tmp_path / "model.safetensors")
    ours = from_state_dict(path, OursAsTorch.init(0)())
    close(ours(DIGITS), torch_digits(s, DIGITS), 1e-4)
    first = {k: v for k, v in s.items() if "features" in k}
    save_file(first, tmp_path / "1.safetensors")
    save_file({k: s[k] for k in s.keys() - first.keys()}, tmp_path / "2.safetensors")
    shards = [str(tmp_path / f"{i}.safetensors") for i in (1, 2)]
    again = from_state_dict(shards, OursAsTorch.init(1)())
    close(again(DIGITS), ours(DIGITS), 1e-6)
    half = {k: v.astype(ml_dtypes.bfloat16) for k, v in s.items()}
    save_file(half, path)
    close(from_state_dict(path, OursAsTorch.init(1)()).fc.kernel, half["fc.weight"].T)
    with pytest.raises(TypeError, match=r"got a list.*module.state_dict\(\)"):
        from_state_dict([1, 2], ours)


def test_a_safetensors_file_that_cannot_be_read(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    path = tmp_path / "model.bin"
    ours = nnx.Linear.init(0)(2, 3)
    state = {"weight": np.ones((3, 2), np.float32), "bias": np.ones(3, np.float32)}
    save_file(state, path)
    assert (from_state_dict(bytes(path), ours).kernel == 1).all()
    ours = nnx.Linear.init(0)(2, 3)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(nnx.LoadError, match=f"^{path} cannot be loaded: .*as large as the file"):
        from_state_dict([path], ours)
    with pytest.raises(FileNotFoundError, match=f"^{tmp_path}/none cannot be loaded: No such file"):
        from_state_dict(tmp_path / "none", ours)
    assert (ours.bias == 0).all()


class Tensor:
    """The part of a torch tensor that this library uses."""

    def __init__(self, array, dtype="torch.float32"):
        self._array, self.dtype = array, dtype
        self.steps = []

    def detach(self):
        self.steps.append("detach")
        return self

    def cpu(self):
        assert self.steps == ["detach"]
        self.steps.append("cpu")
        return self

    def float(self):
        return Tensor(np.asarray(self._array, np.float32))

    def numpy(self):
        assert self.dtype != "torch.bfloat16"
        return self._array

    def __array__(self, *args, **kwargs):
        raise RuntimeError("requires grad")


def test_tensors_of_torch():
    weight = np.random.default_rng(0).normal(size=(3, 2)).astype(np.float32)
    state = {"weight": Tensor(weight), "bias": Tensor(np.ones(3), "torch.bfloat16")}
    ours = from_state_dict(state, nnx.Linear.init(0)(2, 3))
    close(ours.kernel, weight.T)
    assert ours.bias.tolist() == [1, 1, 1]


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


@pytest.mark.parametrize("separate", [False, True])
def test_attention_embedding_and_layer_norm(separate):
    rng = np.random.default_rng(0)
    e, heads, tokens = 8, 2, np.array([[1, 4, 2, 0, 3]])
    w, b = rng.normal(size=(3 * e, e)), rng.normal(size=3 * e)
    if separate:
        parts = {f"attn.{n}_proj.weight": w[i * e : (i + 1) * e] for i, n in enumerate("qkv")}
        parts |= {f"attn.{n}_proj.bias": b[i * e : (i + 1) * e] for i, n in enumerate("qkv")}
    else:
        parts = {"attn.in_proj_weight": w, "attn.in_proj_bias": b}
    s = {
        **parts,
        "attn.out_proj.weight": rng.normal(size=(e, e)),
        "attn.out_proj.bias": rng.normal(size=e),
        "embed.weight": rng.normal(size=(5, e)),
        "norm.weight": rng.normal(size=e),
        "norm.bias": rng.normal(size=e),
    }

    class Ours(nnx.Module):
        def __init__(self):
            self.embed, self.norm = Embed(5, e), LayerNorm(e, epsilon=1e-5)
            self.attn = MultiHeadAttention(heads, e, decode=False)

        def __call__(self, tokens):
            return self.attn(self.norm(self.embed(tokens)))

    x = s["embed.weight"][tokens]
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    x = x * s["norm.weight"] + s["norm.bias"]
    q, k, v = ((x @ w[i * e : (i + 1) * e].T + b[i * e : (i + 1) * e]) for i in range(3))
    q, k, v = (a.reshape(1, 5, heads, e // heads).swapaxes(1, 2) for a in (q, k, v))
    y = softmax(q @ k.swapaxes(2, 3) / np.sqrt(e // heads)) @ v
    y = y.swapaxes(1, 2).reshape(1, 5, e) @ s["attn.out_proj.weight"].T + s["attn.out_proj.bias"]
    close(from_state_dict(s, Ours.init(0)())(tokens), y, 2e-4)


def test_a_transposed_convolution_and_prelu():
    rng = np.random.default_rng(0)
    s = {
        "0.weight": rng.normal(size=(2, 3, 4, 3)),
        "0.bias": rng.normal(size=3),
        "1.weight": rng.normal(size=1),
    }
    x = rng.normal(size=(1, 5, 6, 2)).astype(np.float32)
    y = np.zeros((1, 12, 13, 3)) + s["0.bias"]
    for i in range(5):
        for j in range(6):
            window = np.einsum("nc,cokl->nklo", x[:, i, j], s["0.weight"])
            y[:, 2 * i : 2 * i + 4, 2 * j : 2 * j + 3] += window
    expected = np.where(y > 0, y, s["1.weight"] * y)
    for transpose in (False, True):
        options = {"strides": (2, 2), "padding": "VALID", "transpose_kernel": transpose}
        conv = ConvTranspose.init(0)(2, 3, (4, 3), **options)
        close(from_state_dict(s, nnx.Sequential(conv, PReLU()))(x), expected, 1e-4)


def test_linear_general():
    rng = np.random.default_rng(0)
    s = {"weight": rng.normal(size=(6, 4)), "bias": rng.normal(size=6)}
    ours = from_state_dict(s, LinearGeneral.init(0)((2, 2), (3, 2), axis=(-2, -1)))
    x = rng.normal(size=(5, 2, 2)).astype(np.float32)
    close(ours(x).reshape(5, 6), x.reshape(5, 4) @ s["weight"].T + s["bias"], 1e-4)


def test_names_of_ours_are_taken_as_they_are_and_transforms_win():
    rng = np.random.default_rng(0)
    kernel, bias = rng.normal(size=(2, 2)), rng.normal(size=2)
    ours = from_state_dict({"kernel": kernel, "bias": bias}, nnx.Linear.init(0)(2, 2))
    close(ours.kernel, kernel)
    for key in ("a.weight", "b.kernel"):
        model = nnx.Linear.init(0)(2, 2)
        holder = type("Holder", (nnx.Module,), {})()
        holder.b = model
        from_state_dict(
            {"a.weight": kernel, "a.bias": bias}, holder, {"a": "b"}, {key: lambda w: w * 2}
        )
        close(model.kernel, kernel * 2)
    with pytest.raises(
        BridgeError, match="transforms names 'kernal', but no weight has that name or path"
    ):
        from_state_dict({"kernel": kernel}, ours, transforms={"kernal": np.transpose})


def test_a_class_of_the_users_has_no_rules():
    class Linear(nnx.Module):
        weight: jax.Array = nnx.param()

        def __init__(self):
            self.weight = jnp.zeros((2, 3))

    weight = np.ones((2, 3))
    close(from_state_dict({"weight": weight}, Linear()).weight, weight)


def test_errors_of_state_dicts_list_everything():
    s = digits_state()
    s["fc.weight"] = s["fc.weight"][:, :5]
    s["features.9.weight"] = np.ones(3)
    del s["features.1.bias"]
    ours = OursAsTorch.init(0)()
    unchanged(
        ours,
        lambda: from_state_dict(s, ours),
        BridgeError,
        r"(?s)fc.kernel has shape \(6, 10\), but fc.weight gives \(5, 10\).*"
        r"missing in the state dict:\n    features.layers.1.bias\n.*"
        r"unexpected in the state dict:\n    features.9.weight \(as 'features.layers.9.weight'\)",
    )
    del s["fc.weight"]
    unchanged(ours, lambda: from_state_dict(s, ours), BridgeError, "fc.kernel")
    kernel = ours.fc.kernel
    from_state_dict(s, ours, strict=False)
    assert ours.fc.kernel is kernel
    close(ours.fc.bias, s["fc.bias"])
    with pytest.raises(BridgeError, match=r"fc.bias \(no regex matches it\)"):
        from_state_dict(s, ours, names=[(r"(features.*)", r"\1")])


def test_two_values_for_one_shared_ref():
    class Tied(nnx.Module):
        def __init__(self):
            self.a, self.b = nnx.Linear(2, 2, use_bias=False), nnx.Linear(2, 2, use_bias=False)
            self.b.kernel = nnx.get_ref(self.a, "kernel")

    weight = np.arange(4.0).reshape(2, 2)
    ours = from_state_dict({"a.weight": weight, "b.weight": weight}, Tied.init(0)())
    close(ours.b.kernel, weight.T)
    with pytest.raises(
        BridgeError, match="a.kernel is one shared value, but a.weight and b.weight"
    ):
        from_state_dict({"a.weight": weight, "b.weight": weight + 1}, ours)
