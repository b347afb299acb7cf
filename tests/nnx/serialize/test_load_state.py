"""Loading values into an existing model: every kind of value, tied weights, and values that cannot be written."""

import collections
import json
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import save_file

import nnx
from tests.models import Dense, Net
from tests.nnx.serialize import fuzz

State = collections.namedtuple("State", "count moments")


def buffers():
    return [
        {"obs": jnp.arange(6.0).reshape(2, 3), "done": np.array([True, False])},
        [jnp.ones(2), [jnp.zeros(1), 3]],
        (jnp.ones(2), {"a": (jnp.arange(3), [jnp.ones(())])}),
        State(jnp.array(1), {"m": [jnp.ones(2)]}),
        {},
        [],
        optax.adam(1e-3).init({"w": [jnp.ones(2)]}),
    ]


@pytest.mark.parametrize("number", range(len(buffers())))
@pytest.mark.parametrize("kind", ["npz", "safetensors"])
def test_a_replay_buffer(tmp_path, kind, number):
    path = tmp_path / f"m.{kind}"
    buffer = buffers()[number]
    run = {"buffer": nnx.Ref(buffer, "buffer"), "w": nnx.Ref(jnp.ones(2), "params")}
    into = {
        "buffer": nnx.Ref(
            jax.tree.map(lambda x: x ^ x if getattr(x, "dtype", None) == "bool" else x * 0, buffer),
            "buffer",
        ),
        "w": nnx.Ref(jnp.zeros(2), "params"),
    }
    nnx.save(path, nnx.get_partition(run))
    assert len(nnx.load_state(path, into=into).loaded) == 2
    jax.tree.map(np.testing.assert_array_equal, into["buffer"].value, buffer)
    partition = nnx.load(path)
    jax.tree.map(np.testing.assert_array_equal, dict(partition)[("buffer",)], buffer)


def test_a_partition_as_older_files_have_it(tmp_path):
    # Lists and dicts in it were objects, which `load_state` did not read.
    structure = {
        "format": "nnx",
        "version": 1,
        "root": {"partition": [[["buffer"], {"object": 0}], [["w"], 2.0]]},
        "objects": [{"dict": [["x", {"tuple": [{"object": 1}]}]]}, {"list": [1, 2]}],
        "leaves": [],
        "classes": {},
    }
    with zipfile.ZipFile(tmp_path / "m.npz", "w") as file:
        file.writestr("nnx.json", json.dumps(structure))
    assert dict(nnx.load(tmp_path / "m.npz")) == {("buffer",): {"x": ([1, 2],)}, ("w",): 2.0}
    into = {"buffer": nnx.Ref({"x": ([0, 0],)}), "w": nnx.Ref(0.0)}
    nnx.load_state(tmp_path / "m.npz", into=into)
    assert into["buffer"].value == {"x": ([1, 2],)} and into["w"].value == 2.0


# ---- tied weights


class Decoder(nnx.Module):
    kernel: jax.Array = nnx.param()
    bias: jax.Array = nnx.param()

    def __init__(self, n=2):
        self.kernel = jnp.zeros((n, n))
        self.bias = jnp.zeros(n)


class Tied(nnx.Module):
    def __init__(self, turned=False):
        names = ("embed", "head")
        for name in names[::-1] if turned else names:
            setattr(self, name, Decoder())
        self.head.kernel = nnx.get_ref(self.embed, "kernel")


def weights(**changes):
    ones = np.ones((2, 2), np.float32)
    bias = np.ones(2, np.float32)
    names = {"embed.kernel": ones, "embed.bias": bias, "head.kernel": ones, "head.bias": bias}
    return {name: array for name, array in {**names, **changes}.items() if array is not None}


@pytest.mark.parametrize("kind", ["npz", "safetensors"])
@pytest.mark.parametrize("missing", [None, "embed.kernel", "head.kernel"])
def test_every_name_of_a_tied_weight_loads_it(tmp_path, kind, missing):
    path = tmp_path / f"m.{kind}"
    given = weights(**({missing: None} if missing else {}))
    if kind == "npz":
        np.savez(path, **given)
    else:
        save_file(given, path)
    model = Tied()
    report = nnx.load_state(path, into=model)
    assert len(report.loaded) == 3 and ("embed", "kernel") in report.loaded
    assert (model.head.kernel == 1).all() and model.head.kernel is model.embed.kernel


def test_a_tied_weight_that_was_saved_by_its_other_name(tmp_path):
    path = tmp_path / "m.npz"
    model, other = Tied(turned=True), Tied()
    model.embed.kernel = jnp.ones((2, 2))
    assert ("head", "kernel") in nnx.refs(model) and ("embed", "kernel") in nnx.refs(other)
    for tree in (model, model["params"]):
        nnx.save(path, tree)
        other = Tied()
        nnx.load_state(path, into=other)
        assert (other.head.kernel == 1).all()


def test_names_of_a_tied_weight_that_disagree(tmp_path):
    path = tmp_path / "m.npz"
    for wrong in (np.zeros((2, 2), np.float32), np.ones((3, 2), np.float32), np.ones((2, 2))):
        np.savez(path, **weights(**{"head.kernel": wrong}))
        model = Tied()
        message = (
            r"does not fit, and nothing was changed: .*'head.kernel' is float\d\d\[.,2\] with other "
            r"values than 'embed.kernel' in the file and tied to 'embed.kernel' in the model"
        )
        with pytest.raises(nnx.LoadError, match=message):
            nnx.load_state(path, into=model)
        assert (model.embed.kernel == 0).all() and (model.embed.bias == 0).all()
        report = nnx.load_state(path, into=model, strict=False)
        assert list(report.mismatched) == [("head", "kernel")] and len(report.loaded) == 3
        assert (model.head.kernel == 1).all()
    nan = np.full((2, 2), np.nan, np.float32)
    np.savez(path, **weights(**{"head.kernel": nan, "embed.kernel": nan}))
    nnx.load_state(path, into=Tied())


def test_ties_through_lists_tuples_and_named_tuples(tmp_path):
    shared = nnx.Ref(jnp.zeros(2), "params")
    tree = {"a": [shared], "b": State(shared, (shared,))}
    for name in ("a.0", "b.count", "b.moments.0"):
        np.savez(tmp_path / "m.npz", **{name: np.full(2, 3.0, np.float32)})
        shared.value = jnp.zeros(2)
        assert nnx.load_state(tmp_path / "m.npz", into=tree).loaded == (("a", "0"),)
        assert (shared.value == 3).all()
    for name in ("a.1", "a.٠", "a.-1", "b.0.0", "a.0.value", "a." + "9" * 5000, "b.moments", "."):
        with (
            zipfile.ZipFile(tmp_path / "m.npz", "w") as file,
            file.open(f"{name}.npy", "w") as part,
        ):
            np.lib.format.write_array(part, np.full(2, 3.0, np.float32), (1, 0))
        report = nnx.load_state(tmp_path / "m.npz", into=tree, strict=False)
        assert report.unexpected == (tuple(name.split(".")),) and not report.loaded


# ---- what cannot be written


class Holder(nnx.Module):
    def __init__(self, x):
        self.w = nnx.Ref(jnp.zeros(2), "params")
        self.x = x


@pytest.mark.parametrize(
    "make", [lambda x: (x,), lambda x: [State(x, 1)], lambda x: {"a": ((x, 2), 1)}]
)
def test_an_array_in_a_tuple(tmp_path, make):
    path = tmp_path / "m.npz"
    saved = Holder(make(jnp.ones(2)))
    saved.w.value = jnp.ones(2)
    nnx.save(path, saved)
    model = Holder(make(jnp.zeros(2)))
    message = (
        r"'x[\w.]*' is float32\[2\] in the file and float32\[2\], but in a tuple.*list, or in a Ref"
    )
    with pytest.raises(nnx.LoadError, match=message):
        nnx.load_state(path, into=model)
    assert all((x == 0).all() for x in jax.tree.leaves(model) if hasattr(x, "shape"))
    report = nnx.load_state(path, into=model, strict=False)
    assert report.loaded == (("w",),) and len(report.mismatched) == 1
    assert (model.w.value == 1).all()


def test_a_write_that_fails_half_way_is_taken_back(tmp_path):
    path = tmp_path / "m.npz"
    saved = Holder(jnp.ones(2))
    saved.w.value = jnp.ones(2)
    nnx.save(path, saved)
    model = Holder(jnp.zeros(2))
    with nnx.mutable(None), pytest.raises(nnx.NotMutableError):
        nnx.load_state(path, into=model)
    assert (model.x == 0).all() and (model.w.value == 0).all()
    nnx.load_state(path, into=model)
    assert (model.x == 1).all() and (model.w.value == 1).all()


def test_a_ref_of_a_trace_that_has_ended_is_named(tmp_path):
    path = tmp_path / "m.npz"
    nnx.save(path, Dense())
    leaked = []

    @nnx.jit
    def step(model):
        inner = Dense()
        inner.w = model.w * 2
        leaked.append(inner)

    step(Dense())
    with pytest.raises(nnx.LoadError, match="The Ref at 'w' cannot take a value.* has ended"):
        nnx.load_state(path, into=leaked[0])
    with pytest.raises(
        nnx.LoadError, match=r"Ref at '1.model.w' cannot take a value\. .*nnx.jit\(.*step"
    ):
        nnx.load_state(path, into=(Net(), {"model": leaked[0]}))
    with pytest.raises(nnx.SaveError, match="The value at 'w' cannot be saved.* has ended"):
        nnx.save(path, leaked[0])

    @jax.jit
    def plain(w):
        inner = Dense()
        inner.w = w
        leaked.append(inner)
        return w

    plain(jnp.ones((2, 2)))
    for call, error in (
        (lambda: nnx.load_state(path, into=leaked[-1]), nnx.LoadError),
        (lambda: nnx.save(path, leaked[-1]), nnx.SaveError),
    ):
        with pytest.raises(error, match="'w' is a tracer of a transformation that has ended"):
            call()


def test_load_and_load_state_agree_about_a_file(tmp_path):
    """Paths that are not those of the tree are refused by `load`, which does not need them."""
    kind, data = fuzz.seeds()[0]
    assert kind == "npz"
    text, parts = fuzz.unpacked("npz", data)
    structure = json.loads(text)
    refs = [spec["ref"] for spec in structure["objects"] if "ref" in spec]
    refs[0]["path"], refs[1]["path"] = refs[1]["path"], refs[0]["path"]
    swapped = fuzz.packed("npz", json.dumps(structure), parts)
    with pytest.raises(nnx.LoadError, match="damaged: the path '.*' is not that of its Ref"):
        nnx.load(fuzz.Named(swapped, "npz"))
    refs[0]["path"] = refs[1]["path"]
    doubled = fuzz.packed("npz", json.dumps(structure), parts)
    for call in (nnx.load, lambda file: nnx.load_state(file, into=Dense(), strict=False)):
        with pytest.raises(nnx.LoadError, match="not that of its Ref|its paths has a key twice"):
            call(fuzz.Named(doubled, "npz"))
