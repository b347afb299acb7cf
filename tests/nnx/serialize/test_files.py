"""A file gives back everything that was saved, with every way of saving and loading."""

import collections
import dataclasses
import enum
import functools
import json
import os
import stat
import sys
import types
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from jax.sharding import PartitionSpec

import nnx
from tests.models import Dense, Net
from tests.refx.test_dag import dags, same


@pytest.fixture(params=["npz", "safetensors"])
def path(request, tmp_path):
    return tmp_path / f"tree.{request.param}"


def trip(path, tree):
    nnx.save(path, tree)
    return nnx.load(path)


@settings(max_examples=80, deadline=None)
@given(dags())
def test_any_tree_comes_back(tree):
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        for kind in ("npz", "safetensors"):
            same(tree, trip(f"{folder}/t.{kind}", tree), {})


def test_a_model_comes_back_and_trains_on(path):
    model = Net()
    back = trip(path, model)
    assert back.blocks[0] is back.blocks[2] and back.blocks[0] is not back.blocks[1]
    assert back.scale == 2.0 and type(back) is Net
    x = jnp.ones((3, 2))
    assert jnp.array_equal(back(x), model(x))
    grads = nnx.jit(lambda m: nnx.grad(lambda m: m(x).sum())(m))
    assert jnp.array_equal(grads(back)["blocks.0.w"], grads(model)["blocks.0.w"])


DTYPES = [
    *("bool", "int4", "uint4", "int8", "uint8", "int16", "uint16", "int32", "uint32", "float16"),
    *("bfloat16", "float32", "complex64", "float8_e4m3fn", "float8_e5m2", "float8_e4m3b11fnuz"),
    *("float8_e5m2fnuz", "float8_e4m3fnuz", "float8_e8m0fnu", "float4_e2m1fn"),
]


@pytest.mark.parametrize("shape", [(), (3,), (0,), (2, 0, 3), (2, 3)])
def test_every_dtype_and_shape(path, shape):
    rng = np.random.default_rng(0)
    arrays = {}
    for name in DTYPES:
        dtype = jnp.dtype(name)
        values = (
            rng.integers(0, 2, shape)
            if name in ("bool", "float8_e8m0fnu")
            else rng.integers(0, 4, shape)
        )
        arrays[name] = jnp.asarray(np.asarray(values).astype(dtype))
        arrays["numpy_" + name] = np.asarray(values).astype(dtype)
    for name in ("float64", "int64", "complex128", "uint64"):
        arrays["numpy_" + name] = np.asarray(rng.normal(size=shape) * 9).astype(name)
    arrays["numpy_text"] = np.full(shape, "née")
    arrays["numpy_time"] = np.full(shape, np.datetime64("2020-02-02"))
    tree = {k: nnx.Ref(v, "params") if "numpy" not in k else v for k, v in arrays.items()}
    back = trip(path, tree)
    assert list(back) == list(tree)
    for name, array in arrays.items():
        found = back[name].value if "numpy" not in name else back[name]
        assert isinstance(found, np.ndarray) == ("numpy" in name)
        assert found.dtype == array.dtype and found.shape == shape
        assert np.asarray(found).tobytes() == np.asarray(array).tobytes()


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_random_keys_and_streams(path, impl):
    key = jax.random.key(7, impl=impl)
    keys = jax.random.split(key, (2, 3))
    a, b, legacy = trip(path, (nnx.Ref(key), keys, jax.random.PRNGKey(3)))
    assert a.value.dtype == key.dtype and b.dtype == keys.dtype and b.shape == (2, 3)
    assert (jax.random.key_data(b) == jax.random.key_data(keys)).all()
    assert jax.random.normal(a.value) == jax.random.normal(key)
    assert legacy.dtype == jnp.uint32 and (legacy == jax.random.PRNGKey(3)).all()
    stream = nnx.RngStream(key)
    stream.next()
    back = trip(path, stream)
    assert (jax.random.key_data(back.next()) == jax.random.key_data(stream.next())).all()


class Color(enum.Enum):
    RED = 1


class Flags(enum.IntFlag):
    A = 1


class Point(collections.namedtuple("Point", "x y")):
    pass


@nnx.saveable
@dataclasses.dataclass(frozen=True)
class Config:
    width: int
    names: tuple = ("a",)


class Unit:
    def __init__(self, n):
        self.n = n

    def __eq__(self, other):
        return other.n == self.n

    def __repr__(self):
        return f"Unit({self.n})"

    def __hash__(self):
        return hash(self.n)


nnx.saveable(Unit, save=lambda u: [u.n, {"k": 1}], load=lambda v: Unit(v[0]))


@nnx.saveable(name="tests.doubled")
def doubled(x):
    return 2 * x


STATICS = [
    None, True, 0, -(10**30), 1.5, -0.0, float("inf"), -float("inf"), 2 + 3j, "", "naïve \ud800 \0",
    b"\x00\xff", (), (1, (2.0, ("x",))), slice(1, None, 2), range(3), ..., frozenset({1, "a"}),
    jnp.float32, np.dtype("bfloat16"), np.dtype(">i4"), np.float32, np.float32(1.5), np.bool_(True),
    jnp.bfloat16(2.0).dtype, Color.RED, Flags.A, jax.lax.Precision.HIGHEST, Point(1, (2,)), Config(3),
    Unit(4), (Unit(1), Config(2, ("b",))), jax.nn.relu, jax.nn.initializers.zeros, jnp.tanh,
    jax.lax.dot_general, doubled, functools.partial(jax.nn.softmax, axis=-1), Dense, int,
    PartitionSpec("a", None, ("b", "c")), nnx.layers.linear.promote_dtype,
    nnx.PathContains("bn*"), nnx.PathMatches("a.**"), nnx.OfType((jax.Array, np.ndarray)),
    nnx.All("params", nnx.Not(nnx.Any("a", nnx.PathContains("b"))), ...),
]  # fmt: skip


class Holder(nnx.Module):
    def __init__(self, x):
        self.x = x


@pytest.mark.parametrize("number", range(len(STATICS)))
def test_hyperparameters(tmp_path, number):
    value = STATICS[number]
    back = trip(tmp_path / "m.npz", Holder(value)).x
    assert type(back) is type(value)
    if isinstance(value, functools.partial):
        assert (back.func, back.args, back.keywords) == (value.func, value.args, value.keywords)
    else:
        # A set has no order, and none in its repr.
        assert back == value and (isinstance(value, frozenset) or repr(back) == repr(value))
    if isinstance(value, type | types.FunctionType):
        assert back is value


def test_nan_lists_dicts_and_metadata(path):
    ref = nnx.Ref({"a": [jnp.ones(2), 3], "b": (None, 1.5)}, ("x", 1), axes=("in", None), n=nnx.Ref)
    with pytest.raises(nnx.SaveError, match="'ref.n'.*the class Ref"):
        nnx.save(path, {"ref": ref})
    ref = nnx.Ref({"a": [jnp.ones(2), 3], "b": (None, 1.5)}, ("x", 1), axes=("in", None))
    tree = Holder([float("nan"), {1: "a", (2, "b"): [ref]}, collections.OrderedDict(z=1, a=2)])
    tree.x.append(tree.x)
    tree.me = tree
    back = trip(path, tree)
    assert np.isnan(back.x[0]) and back.x[3] is back.x and back.me is back
    found = back.x[1][2, "b"][0]
    assert found.collection == ("x", 1) and dict(found.metadata) == {"axes": ("in", None)}
    assert found.value["b"] == (None, 1.5) and found.value["a"][1] == 3
    assert list(back.x[2].items()) == [("z", 1), ("a", 2)] and list(back.x[1]) == [1, (2, "b")]
    back.x[1]["new"] = 1
    found.value = {"a": [jnp.zeros(2), 0], "b": (None, 0.0)}


def test_bound_methods_partitions_and_optimizer_states(path):
    model = Dense()
    state = optax.adam(1e-3).init(model["params"])
    method, partition, back = trip(
        path, (model.__call__, model["params"], nnx.Ref(state, "opt_state"))
    )
    assert jnp.array_equal(method(jnp.ones((1, 2))), model(jnp.ones((1, 2))))
    assert list(partition) == list(model["params"]) and isinstance(partition, nnx.Partition)
    assert jax.tree.structure(back.value) == jax.tree.structure(state)


def test_long_chains_and_many_objects(path):
    model = Holder(None)
    for _ in range(3000):
        model = Holder(model)
    back = trip(path, model)
    for _ in range(3001):
        back = back.x
    assert back is None


def test_one_array_in_two_places_is_one_in_the_file(path):
    x = jnp.arange(5.0)
    a, b = trip(path, (nnx.Ref(x, "p"), nnx.Ref(x, "p")))
    assert a is not b and a.value is b.value


def test_local_classes_and_later_definitions(path):
    def make(extra):
        class Local(nnx.Module):
            def __init__(self):
                self.w = nnx.Ref(jnp.ones(2), "params")

            def __call__(self):
                return extra

        return Local

    nnx.save(path, make(1)())
    kept = make(2)
    assert nnx.load(path)() == 2 and kept


def test_a_class_that_was_captured_is_found_by_its_own_name(path):
    class Net(nnx.Module):
        def __init__(self):
            self.layer = Dense()

        def __call__(self, x):
            return self.layer(x)

    model = Net()
    nnx.capture(model)(jnp.ones((1, 2)))
    assert type(trip(path, model)) is Net


# ---- the file


def test_numpy_opens_the_file_and_names_are_paths(tmp_path):
    path = tmp_path / "model.npz"
    nnx.save(path, Net())
    with np.load(path, allow_pickle=False) as file:
        assert file["blocks.0.w"].shape == (2, 2) and "blocks.1.b" in file.files
        structure = json.loads(file["nnx.json"])
    assert structure["format"] == "nnx" and structure["version"] == 1


def test_other_tools_read_safetensors(tmp_path):
    from safetensors.numpy import load_file

    path = tmp_path / "model.safetensors"
    model = Net()
    nnx.save(path, model)
    np.testing.assert_array_equal(load_file(path)["blocks.0.w"], model.blocks[0].w)


def test_hostile_and_long_names_stay_inside_the_folder(tmp_path):
    refs = {
        "../../etc/x": 1,
        "/abs": 2,
        "a\\b": 3,
        "A\\B": 4,
        ".hidden": 5,
        "x" * 500: 6,
        "x" * 499: 7,
        "": 8,
    }
    tree = {k: nnx.Ref(jnp.array(v), "p") for k, v in refs.items()}
    back = trip(tmp_path / "t.npz", tree)
    assert {k: int(r.value) for k, r in back.items()} == refs
    with zipfile.ZipFile(tmp_path / "t.npz") as file:
        names = [n.lower() for n in file.namelist()]
    assert len(set(names)) == len(names) == 9
    assert all(
        "/" not in n and "\\" not in n and not n.startswith(".") and len(n) < 140 for n in names
    )


def test_the_same_tree_gives_the_same_file(tmp_path):
    for name in "ab":
        nnx.save(tmp_path / f"{name}.npz", Net())
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_a_failed_save_leaves_what_was_there(path, monkeypatch):
    nnx.save(path, Dense())
    before = path.read_bytes()
    with pytest.raises(nnx.SaveError):
        nnx.save(path, Holder(lambda: 0))

    def full(*_):
        raise OSError("No space left on device")

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, full)
            with pytest.raises(OSError, match="No space"):
                nnx.save(path, Dense(seed=1))
    assert path.read_bytes() == before and os.listdir(path.parent) == [path.name]


def test_modes_and_links_are_kept(path):
    nnx.save(path, Dense())
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~_mask()
    path.chmod(0o600)
    link = path.with_name(f"link{path.suffix}")
    link.symlink_to(path)
    nnx.save(link, Dense(seed=3))
    assert link.is_symlink() and stat.S_IMODE(path.stat().st_mode) == 0o600
    assert jnp.array_equal(nnx.load(path).w, Dense(seed=3).w)


def _mask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_progress_is_reported(path):
    seen = []
    nnx.save(path, Net(), progress=lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] == sum(x.nbytes for x in jax.tree.leaves(Net()))
    seen.clear()
    nnx.load(path, progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen) and 0 < seen[-1][0] <= seen[-1][1]


def test_safetensors_needs_no_library(tmp_path, monkeypatch):
    for name in [n for n in sys.modules if n.startswith("safetensors")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    nnx.save(tmp_path / "m.safetensors", Dense())
    assert jnp.array_equal(nnx.load(tmp_path / "m.safetensors").w, Dense().w)


def test_the_library_of_safetensors_reads_every_dtype(tmp_path):
    from safetensors import safe_open
    from safetensors.numpy import load_file, save_file

    path = tmp_path / "m.safetensors"
    rng = np.random.default_rng(0)
    arrays = {}
    for n, dtype in enumerate(DTYPES):
        shape = [(), (3,), (2, 0), (2, 3)][n % 4]
        arrays[dtype] = jnp.asarray(np.ones(shape) * rng.integers(0, 2, shape), dtype)
    nnx.save(path, nnx.Partition({(k,): v for k, v in arrays.items()}))
    theirs = load_file(path)
    for name, array in arrays.items():
        assert theirs[name].tobytes() == np.asarray(array).tobytes()
        if theirs[name].dtype != np.uint8:
            assert theirs[name].dtype == array.dtype and theirs[name].shape == array.shape
    with safe_open(path, "np") as file:
        structure = file.metadata()["nnx.json"]
    # And a file from the library is read here, in its order.
    save_file(theirs, path, {"note": "theirs"})
    model = {k: nnx.Ref(jnp.zeros(v.shape, v.dtype)) for k, v in theirs.items()}
    assert len(nnx.load_state(path, into=model).loaded) == len(theirs)
    assert model["float32"].value.tobytes() == theirs["float32"].tobytes() and "sums" in structure


# ---- what cannot be saved


@pytest.mark.parametrize(
    "value, message",
    [
        (lambda x: x, r"'x' is .*<lambda>, a function .*@nnx.saveable.*get_partition"),
        (np.array([object()]), r"'x' is a NumPy array of Python objects"),
        (jax.ShapeDtypeStruct((2,), jnp.float32), r"'x' is a shape without values"),
        (os, r"'x' is a module, which nnx.save does not know.*@nnx.saveable"),
        (optax.adam(1e-3), r"'x.*' is .*init_fn, a function"),
        (np.ma.array([1.0]), r"'x' is a MaskedArray; np.asarray"),
        (jax.nn.initializers.normal(), r"'x' is .*init, a function"),
        (print, r"'x' is print, a function"),
        (np.zeros(2, [("a", "f4")]), r"'x' is a NumPy array with named fields"),
        (
            functools.partial(doubled, Dense()),
            r"functools?.partial.*nnx.Partial|a partial that holds",
        ),
    ],
)
def test_what_cannot_be_saved(tmp_path, value, message):
    with pytest.raises(nnx.SaveError, match=message):
        nnx.save(tmp_path / "m.npz", Holder(value))
    assert os.listdir(tmp_path) == []


def test_saving_inside_a_transformation(tmp_path):
    with pytest.raises(nnx.SaveError, match="'w' is a tracer.*outside, after the step"):
        nnx.jit(lambda m: nnx.save(tmp_path / "m.npz", m))(Dense())


def test_saveable_says_what_is_wrong():
    with pytest.raises(TypeError, match="Plain is not a dataclass.*save= and load="):
        nnx.saveable(type("Plain", (), {}))
    with pytest.raises(TypeError, match="a function or a class, but got 3"):
        nnx.saveable(3)
    with pytest.raises(TypeError, match="both save= and load="):
        nnx.saveable(Config, save=lambda c: 1)
    with pytest.raises(ValueError, match="'tests.doubled' is taken.*name="):
        nnx.saveable(lambda: 0, name="tests.doubled")


# ---- weights alone


def test_load_state_into_a_model(path):
    a, b = Net(), Net()
    for block in a.blocks:
        block.b = block.b + 1
    nnx.save(path, a)
    report = nnx.load_state(path, into=b)
    assert len(report.loaded) == 6 and not report.missing and not report.unexpected
    assert jnp.array_equal(a(jnp.ones((1, 2))), b(jnp.ones((1, 2))))
    nnx.save(path, Net()["params"])
    report = nnx.load_state(path, into=b, strict=False)
    assert report.missing == (("blocks", "0", "calls"), ("blocks", "1", "calls"))
    assert (b.blocks[0].b == 0).all()
    with pytest.raises(
        nnx.LoadError, match=r"does not fit, and nothing.*missing.*'blocks.0.calls'"
    ):
        nnx.load_state(path, into=b)


def test_load_state_reports_what_does_not_fit(path):
    big = Dense(2, 3)
    small = Dense(2, 2)
    big.extra = nnx.Ref(jnp.ones(1), "params")
    nnx.save(path, big)
    before = jax.tree.leaves(small)
    with pytest.raises(
        nnx.LoadError,
        match=r"unexpected.*'extra'; 'w' is float32\[2,3\] in the file and float32\[2,2\]",
    ):
        nnx.load_state(path, into=small)
    assert all(map(jnp.array_equal, before, jax.tree.leaves(small)))
    report = nnx.load_state(path, into=small, strict=False)
    assert report.mismatched == {
        ("w",): ("float32[2,3]", "float32[2,2]"),
        ("b",): ("float32[3]", "float32[2]"),
    }
    assert report.loaded == (("calls",),) and report.unexpected == (("extra",),)


def test_load_state_needs_no_classes_and_reads_plain_arrays(path):
    def local():
        class Gone(nnx.Module):
            def __init__(self):
                self.w = nnx.Ref(jnp.ones(2), "params")
                self.fn = doubled

        return Gone()

    nnx.save(path, local())

    class Other(nnx.Module):
        def __init__(self):
            self.w = nnx.Ref(jnp.zeros(2), "params")

    other = Other()
    assert repr(nnx.load_state(path, into=other)) == "LoadReport(1 loaded)"
    assert (other.w.value == 1).all()
    holder = Holder([np.zeros(2), jnp.zeros(3)])
    nnx.save(path, nnx.get_partition(Holder([np.ones(2), jnp.ones(3)]), ...))
    nnx.load_state(path, into=holder)
    assert holder.x[0].sum() == 2 and holder.x[1].sum() == 3 and isinstance(holder.x[0], np.ndarray)


def test_load_state_reads_the_files_of_others(tmp_path):
    from safetensors.numpy import save_file

    weights = {
        "w": np.full((2, 2), 3.0, np.float32),
        "b": np.ones(2, np.float32),
        "calls": np.int32(4),
    }
    np.savez(tmp_path / "a.npz", **weights)
    save_file({k: np.asarray(v) for k, v in weights.items()}, tmp_path / "a.safetensors")
    for name in ("a.npz", "a.safetensors"):
        model = Dense()
        nnx.load_state(tmp_path / name, into=model)
        assert (model.w == 3).all() and model.calls == 4
        with pytest.raises(
            nnx.LoadError, match=r"holds arrays \('.*no structure from nnx.save.*load_state"
        ):
            nnx.load(tmp_path / name)


def test_load_state_keeps_shardings(path):
    mesh = jax.make_mesh((2,), ("d",), devices=jax.devices()[:2])
    sharding = jax.sharding.NamedSharding(mesh, PartitionSpec("d"))
    model = Dense()
    nnx.save(path, model)
    model.w = jax.device_put(jnp.zeros((2, 2)), sharding)
    nnx.load_state(path, into=model)
    assert model.w.sharding == sharding and jnp.array_equal(model.w, Dense().w)
    nnx.save(path, model)
    assert jnp.array_equal(nnx.load(path).w, model.w)


def test_plain_arrays_of_a_whole_model_are_read_too(path):
    class Table(nnx.Module):
        def __init__(self):
            self.table = jnp.ones(3)
            self.r = nnx.Ref(jnp.ones(2), "params")

    a, b = Table(), Table()
    a.table = a.table * 2
    nnx.save(path, a)
    assert len(nnx.load_state(path, into=b).loaded) == 2 and (b.table == 2).all()
    nnx.save(path, a["params"])
    with pytest.raises(nnx.LoadError, match="missing in the file: 'table'"):
        nnx.load_state(path, into=b)


def test_a_counter_that_began_as_a_number(path):
    count = nnx.Ref(0, "counters")
    nnx.jit(lambda r: setattr(r, "value", r.value + 3))(count)
    nnx.save(path, {"count": count})
    fresh = nnx.Ref(0, "counters")
    nnx.load_state(path, into={"count": fresh})
    assert fresh.value == 3
    with pytest.raises(nnx.LoadError, match=r"'count' is int32\[\] in the file and float32\[\]"):
        nnx.load_state(path, into={"count": nnx.Ref(0.0)})


def test_files_of_others_in_any_order_of_bytes(tmp_path):
    w = np.arange(4, dtype=">f4").reshape(2, 2)
    np.savez(tmp_path / "a.npz", w=w.T, b=np.ones(2, np.float32), calls=np.int32(0))
    model = Dense()
    nnx.load_state(tmp_path / "a.npz", into=model)
    assert np.array_equal(model.w, w.T)
    np.savez_compressed(tmp_path / "c.npz", w=w)
    with pytest.raises(nnx.LoadError, match="is compressed .*again with np.savez"):
        nnx.load_state(tmp_path / "c.npz", into=model)


def test_every_bit_of_an_array_is_checked(path):
    nnx.save(path, {"w": nnx.Ref(jnp.arange(50.0), "params")})
    data = bytearray(path.read_bytes())
    at = data.index(np.arange(50, dtype=np.float32).tobytes())
    for n in (at, at + 77, at + 199):
        changed = bytearray(data)
        changed[n] ^= 1
        path.write_bytes(changed)
        with pytest.raises(nnx.LoadError, match="checksum|CRC"):
            nnx.load(path)


def test_what_our_layers_hold_can_be_saved(tmp_path):
    with nnx.scope(0):
        layers = [
            nnx.RNN(nnx.LSTMCell(2, 3), state_axes={"params": nnx.CARRY}),
            nnx.Remat(nnx.Linear(2, 2), policy=jax.checkpoint_policies.dots_saveable),
            nnx.WeightNorm(nnx.Linear(2, 2)),
            nnx.MultiHeadAttention(2, 4, rotary=nnx.RotaryEmbedding(2)),
        ]
    back = trip(tmp_path / "m.npz", layers)
    assert nnx.split(back)[0] is nnx.split(layers)[0]


@pytest.mark.parametrize("name", ["model.npz", "model.safetensors"])
def test_a_folder_that_is_missing_is_named(tmp_path, name):
    folder = tmp_path / "runs" / "one"
    message = rf"the folder to save in does not exist; make it with os\.makedirs: '{folder}'$"
    with pytest.raises(FileNotFoundError, match=message):
        nnx.save(folder / name, nnx.Linear.init(0)(2, 2))
    assert list(tmp_path.iterdir()) == []


def test_keys_with_dots_that_read_the_same(tmp_path):
    class Model(nnx.Module):
        def __init__(self, x, turned=False):
            parts = [("b.c", nnx.Ref(jnp.full(2, x))), ("b", {"c": nnx.Ref(jnp.full(2, 10 * x))})]
            self.of = dict(parts[::-1] if turned else parts)

    for turned in (False, True):
        path, model = tmp_path / "m.npz", Model(5.0, turned)
        nnx.save(path, Model(1.0))
        report = nnx.load_state(path, into=model)
        assert len(report.loaded) == 2
        assert model.of["b.c"].value[0] == 1 and model.of["b"]["c"].value[0] == 10


def test_a_step_may_have_made_numpys_double_precision_single(tmp_path):
    class Model(nnx.Module):
        w: jax.Array = nnx.param()

        def __init__(self, w):
            self.w = w

    path = tmp_path / "m.npz"
    nnx.save(path, Model(jnp.full(2, 3.0)))
    model = Model(np.ones(2))
    nnx.load_state(path, into=model)
    assert model.w.tolist() == [3.0, 3.0]
    nnx.save(path, Model(np.ones(2)))
    with pytest.raises(
        nnx.LoadError, match="is float64.2. in the file and float32.2. in the model"
    ):
        nnx.load_state(path, into=Model(jnp.ones(2)))


def test_load_state_in_a_transformation(tmp_path):
    path, model = tmp_path / "m.npz", nnx.Linear.init(0)(2, 2)
    nnx.save(path, model)
    message = "'kernel' is a tracer: nnx.load_state was called inside a transformation.*outside"

    def step(model):
        nnx.load_state(path, into=model)
        return jnp.zeros(())

    for call in (nnx.jit(step), jax.jit(step), nnx.grad(step)):
        with pytest.raises(nnx.LoadError, match=message):
            call(model)
    with pytest.raises(nnx.LoadError, match=message):
        nnx.jit(lambda: step(model))()


@pytest.mark.parametrize("kind", ["npz", "safetensors"])
def test_arrays_that_were_donated_and_names_as_long_as_may_be(tmp_path, kind):
    model = nnx.Linear.init(0)(2, 2)
    path = tmp_path / ("m" * (254 - len(kind)) + f".{kind}")
    nnx.save(path, model)
    assert nnx.load(path).kernel.tolist() == model.kernel.tolist()
    before = path.read_bytes()
    model.kernel.delete()
    with pytest.raises(nnx.SaveError, match="'kernel' is a deleted array: .* donated"):
        nnx.save(path, model)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_state_is_read_to_where_a_model_of_shapes_says(tmp_path):
    model = nnx.Linear.init(0)(4, 8)
    nnx.save(tmp_path / "m.npz", model)
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    columns = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "x"))
    shapes = nnx.eval_shape(lambda: nnx.Linear.init(0)(4, 8))
    shapes.kernel = jax.ShapeDtypeStruct((4, 8), jnp.float32, sharding=columns)
    nnx.load_state(tmp_path / "m.npz", into=shapes)
    assert shapes.kernel.sharding == columns
    assert jnp.array_equal(shapes.kernel, model.kernel)


@pytest.mark.parametrize("name", ["model.npz", "run/"])
def test_the_class_to_load_may_be_given(tmp_path, name):
    path = str(tmp_path / name)
    nnx.save(path, nnx.Linear.init(0)(2, 3))
    assert type(nnx.load(path, nnx.Linear)) is nnx.Linear
    assert nnx.load(path, kind=nnx.Module, only=None).kernel.shape == (2, 3)
    with pytest.raises(nnx.LoadError, match=r"cannot be loaded: it holds a Linear, not a Conv\."):
        nnx.load(path, nnx.Conv)
