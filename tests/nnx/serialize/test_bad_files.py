"""Files that are damaged, foreign, newer or hostile: each gives one clear error, and nothing is loaded."""

import copy
import io
import json
import os
import random
import sys
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import nnx
from tests.models import Dense, Net


class Small(nnx.Module):
    w: jax.Array = nnx.param()

    def __init__(self):
        self.w = jnp.arange(3.0)
        self.setting = (1, "two", jax.nn.relu)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """The bytes of a small file of each kind."""
    folder = tmp_path_factory.mktemp("good")
    found = {}
    for kind in ("npz", "safetensors"):
        nnx.save(folder / f"m.{kind}", Small())
        found[kind] = (folder / f"m.{kind}").read_bytes()
    return found


def fails(path, data):
    """Loading these bytes is a LoadError that names the file; returns its message."""
    path.write_bytes(data)
    with pytest.raises(nnx.LoadError) as error:
        nnx.load(path)
    text = str(error.value)
    assert text.startswith(f"{path} cannot be loaded: ") and "\n" not in text, text
    return text


def test_cut_short_at_every_byte(good, tmp_path):
    tried = 0
    for kind, data in good.items():
        for n in range(len(data)):
            fails(tmp_path / f"m.{kind}", data[:n])
            tried += 1
    assert tried == sum(map(len, good.values())) > 1300


def same_or_error(path, data):
    """The file is refused or, if the byte had no meaning, gives the model itself."""
    path.write_bytes(data)
    try:
        model = nnx.load(path)
    except nnx.LoadError as error:
        assert str(error).startswith(f"{path} ")
        return False
    assert type(model) is Small and model.w.shape == (3,) and model.w.dtype == jnp.float32
    return True


def test_every_byte_changed(good, tmp_path):
    rng = random.Random(0)
    refused = 0
    data = good["npz"]
    for n in range(len(data)):
        changed = bytearray(data)
        changed[n] ^= rng.randrange(1, 256)
        path = tmp_path / "m.npz"
        if same_or_error(path, bytes(changed)):
            # The container checks its contents, so what was read is what was written.
            model = nnx.load(path)
            assert (model.w == jnp.arange(3.0)).all() and model.setting == Small().setting
        else:
            refused += 1
    assert refused > len(data) // 2


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_bytes_flipped_swapped_and_repeated(good, tmp_path, data):
    kind = data.draw(st.sampled_from(sorted(good)))
    raw = bytearray(good[kind])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw) - 1))
        way = data.draw(st.sampled_from(["flip", "cut", "double", "insert"]))
        end = min(len(raw), at + data.draw(st.integers(1, 30)))
        if way == "flip":
            raw[at] ^= data.draw(st.integers(1, 255))
        elif way == "cut":
            del raw[at:end]
        elif way == "double":
            raw[at:at] = raw[at:end]
        else:
            raw[at:at] = data.draw(st.binary(min_size=1, max_size=9))
        raw = raw or bytearray(b"x")
    path = tmp_path / f"m.{kind}"
    path.write_bytes(bytes(raw))
    try:
        nnx.load(path)
    except nnx.LoadError as error:
        assert str(error).startswith(f"{path} ")
    report_or_error(path)


def report_or_error(path):
    model = Small()
    try:
        nnx.load_state(path, into=model, strict=False)
    except nnx.LoadError:
        assert (model.w == jnp.arange(3.0)).all()


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.binary(max_size=200))
def test_random_bytes(tmp_path, data):
    for kind in ("npz", "safetensors"):
        fails(tmp_path / f"m.{kind}", data)


@pytest.mark.parametrize(
    "make",
    [
        lambda: b"",
        lambda: b"PK\x05\x06" + b"\0" * 18,
        lambda: b"\x80\x04\x95pickle",
        lambda: b'{"json": true}',
        lambda: _bytes(lambda f: np.save(f, np.ones(3))),
    ],
)
def test_other_formats(tmp_path, make):
    fails(tmp_path / "m.npz", make())
    fails(tmp_path / "m.safetensors", make())


def test_a_folder_and_nothing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing.npz"):
        nnx.load(tmp_path / "nothing.npz")
    with pytest.raises(IsADirectoryError):
        nnx.load(tmp_path)


def _bytes(write):
    file = io.BytesIO()
    write(file)
    return file.getvalue()


# ---- complete files with other contents


def parts(data):
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        members = {name: file.read(name) for name in file.namelist()}
    return json.loads(members.pop("nnx.json")), members


def packed(structure, members, **options):
    def write(f):
        with zipfile.ZipFile(f, "w", **options) as file:
            file.writestr("nnx.json", json.dumps(structure))
            for name, content in members.items():
                file.writestr(name, content)

    return _bytes(write)


def changed(good, change):
    structure, members = parts(good["npz"])
    result = change(structure, members)
    return packed(result or structure, members)


def _set(*keys, value):
    def change(structure, members):
        at = structure
        for key in keys[:-1]:
            at = at[key]
        at[keys[-1]] = value

    return change


def _everywhere(name, value):
    """Change the structure's description of an array, at each of its mentions."""

    def changed(code):
        if isinstance(code, list):
            return [changed(x) for x in code]
        if isinstance(code, dict):
            return value if code.get("array") == name else {k: changed(v) for k, v in code.items()}
        return code

    return lambda structure, members: changed(structure)


NAME = "tests.nnx.serialize.test_bad_files.Small"


@pytest.mark.parametrize(
    "change, message",
    [
        (_set("version", value=2), r"version is 2, but this nnx only reads .* up to 1\. Install a newer nnx"),
        (_set("version", value="1"), "version is '1', which never existed"),
        (_set("format", value="zip"), "not one that nnx.save wrote"),
        (lambda s, m: [1], "not one that nnx.save wrote"),
        (_set("objects", value=None), "has no objects"),
        (_set("root", value={"object": 99}), "damaged: object 99 does not exist"),
        (_set("root", value={"object": True}), "damaged: object True does not exist"),
        (_set("root", value={"object": -1}), "damaged: object -1 does not exist"),
        (_set("root", value={"exec": "1"}), "no kind of value named 'exec'"),
        (_set("root", value={"tuple": [1], "list": []}), "damaged: a value is"),
        (_set("root", value={"float": "1.0"}), "damaged"),
        (_set("root", value={"bytes": "%%"}), "damaged"),
        (_set("root", value={"dtype": "object"}), "damaged: the dtype 'object'"),
        (_set("root", value={"scalar": ["float32", ""]}), "damaged"),
        (_set("root", value={"named": "os.system"}), "names 'os.system', .* not registered.*saveable"),
        (_set("root", value={"named": "builtins.eval"}), "names 'builtins.eval'"),
        (_set("root", value={"named": "jax.numpy.save"}), "names 'jax.numpy.save'"),
        (_set("root", value={"named": "nnx.load"}), "names 'nnx.load'"),
        (_set("root", value={"class": "antigravity.Thing"}), "'antigravity.Thing', a module class .* not imported"),
        (_set("root", value={"namedtuple": ["builtins.tuple", []]}), "'builtins.tuple'"),
        (_set("root", value={"enum": ["jax.lax.Precision", "MEDIUM"]}), "no longer has the member 'MEDIUM'"),
        (_set("root", value={"saved": ["subprocess.Popen", {"tuple": []}]}), "'subprocess.Popen', a class that is not registered"),
        (_set("root", value={"method": [{"object": 0}, "__init_subclass__"]}), "no longer has the method '__init_subclass__'"),
        (_set("root", value={"partial": [3, [], []]}), "a partial does not hold a function"),
        (_set("root", value={"array": "gone", "shape": [], "dtype": "int32"}), "array 'gone' is missing"),
        (_set("root", value={"array": "w", "shape": [4], "dtype": "float32"}), "describes its array 'w' in two ways"),
        (_everywhere("w", {"array": "w", "shape": [4], "dtype": "float32"}), r"'w' is float32\[3\], but should be float32\[4\]"),
        (_everywhere("w", {"array": "w", "shape": [3], "dtype": "int32"}), r"'w' is float32\[3\], but should be int32"),
        (_everywhere("w", {"array": "w", "shape": [3], "key": "nothing"}), "damaged"),
        (_set("objects", 0, value={"module": {"class": "no.such.Class", "attributes": []}}), "'no.such.Class', a module class that this program has not imported"),
        (_set("classes", NAME, value={"w": "static"}), f"class {NAME!r} has changed.*'w' was static and is now ref 'params'"),
        (_set("classes", NAME, value={"w": "ref 'params'", "v": "static"}), "'v' is gone.*load_state"),
        (_set("classes", NAME, value={}), "'w' is new"),
        (_set("objects", 0, "module", "attributes", value=[["w", 3.0]]), "the field 'w' of a Small does not hold a Ref"),
        (_set("objects", 0, "module", "attributes", value=[[1, 3.0]]), "1 should be the name of an attribute"),
        (_set("objects", 1, value={"ref": {"path": [], "collection": {"list": []}, "metadata": [], "value": 1}}), "damaged"),
        (_set("objects", 1, "ref", "value", value={"object": 0}), "the kind 'object module' is not allowed here"),
        (_set("objects", 1, value={"set": []}), "object 1 is a 'set'"),
        (_set("objects", 0, value={"dict": [["a", 1], ["a", 2]]}), "damaged"),
    ],
)  # fmt: skip
def test_a_structure_that_is_not_ours(good, tmp_path, change, message):
    import re

    # JAX imports something when it makes its first array.
    (tmp_path / "m.npz").write_bytes(good["npz"])
    nnx.load(tmp_path / "m.npz")
    loaded = set(sys.modules)
    text = fails(tmp_path / "m.npz", changed(good, change))
    assert re.search(message, text), text
    # Python looks its codecs up when it first decodes a name in the archive.
    assert {name for name in sys.modules if not name.startswith("encodings.")} <= loaded


def test_nesting_without_end(tmp_path):
    text = '{"tuple":[' * 100_000 + "]}" * 100_000

    def write(f):
        with zipfile.ZipFile(f, "w") as file:
            file.writestr("nnx.json", text)

    fails(tmp_path / "m.npz", _bytes(write))


def test_bombs(good, tmp_path):
    structure, members = parts(good["npz"])
    text = fails(tmp_path / "m.npz", packed(structure, members, compression=zipfile.ZIP_DEFLATED))
    assert "is compressed or encrypted" in text
    header = _bytes(
        lambda f: np.lib.format.write_array_header_1_0(
            f, {"descr": "<f4", "fortran_order": False, "shape": (1 << 40,)}
        )
    )
    text = fails(tmp_path / "m.npz", packed(structure, {"w.npy": header}))
    assert "'w' is float32[1099511627776]" in text
    _set(
        "objects", 1, "ref", "value", value={"array": "w", "shape": [1 << 40], "dtype": "float32"}
    )(structure, members)
    assert "shorter than its shape" in fails(
        tmp_path / "m.npz", packed(structure, {"w.npy": header})
    )
    longer = members["w.npy"] + b"\0" * 4
    structure, _ = parts(good["npz"])
    assert "longer than its shape" in fails(
        tmp_path / "m.npz", packed(structure, {"w.npy": longer})
    )
    objects = _bytes(
        lambda f: np.save(f, np.array([1, "a", None], dtype=object), allow_pickle=True)
    )
    assert "Python objects" in fails(tmp_path / "m.npz", packed(structure, {"w.npy": objects}))


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_parts_of_one_name(good, tmp_path):
    structure, members = parts(good["npz"])

    def write(f):
        with zipfile.ZipFile(f, "w") as file:
            for name, content in [
                ("nnx.json", json.dumps(structure)),
                *members.items(),
                *members.items(),
            ]:
                file.writestr(name, content)

    assert "two of its parts have the same name" in fails(tmp_path / "m.npz", _bytes(write))


def test_no_pickle_is_read(good, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "evil"),)

    array = np.empty(3, object)
    array[0] = Evil()
    structure, members = parts(good["npz"])
    evil = _bytes(lambda f: np.save(f, array, allow_pickle=True))
    fails(tmp_path / "m.npz", packed(structure, members | {"w.npy": evil}))
    assert not (tmp_path / "evil").exists()


# ---- structures that were changed at random


@pytest.fixture(scope="module")
def rich(tmp_path_factory):
    path = tmp_path_factory.mktemp("rich") / "m.npz"
    net = Net()
    net.extra = [
        (1, 2.5, {"k": jax.nn.relu}),
        {"a": slice(1, 2)},
        jax.lax.Precision.HIGH,
        net.blocks,
    ]
    net.method = net.blocks[0].__call__
    nnx.save(path, (net, net["params"], nnx.RngStream(0)))
    return parts(path.read_bytes())


def places(code, found, at=()):
    found.append(at)
    items = (
        code.items()
        if isinstance(code, dict)
        else enumerate(code)
        if isinstance(code, list)
        else ()
    )
    for key, value in items:
        places(value, found, (*at, key))
    return found


replacements = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 40),
    st.floats(),
    st.sampled_from(
        ["", "w", "numpy.float32", "tests.models.Dense", "jax.nn.relu", "threefry2x32"]
    ),
    st.sampled_from(
        ["object", "tuple", "named", "ref", "module", "method", "partial", "array"]
    ).flatmap(
        lambda kind: st.recursive(
            st.integers(-1, 30) | st.text(max_size=3) | st.none(),
            lambda inner: st.lists(inner, max_size=3) | st.builds(lambda v: {kind: v}, inner),
            max_leaves=5,
        )
    ),
)


@settings(max_examples=600, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_structures_changed_at_random(rich, tmp_path, data):
    structure, members = copy.deepcopy(rich)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.sampled_from(places(structure, [])[1:]))
        holder = structure
        for key in at[:-1]:
            holder = holder[key]
        holder[at[-1]] = data.draw(replacements)
    path = tmp_path / "m.npz"
    path.write_bytes(packed(structure, members))
    try:
        nnx.load(path)
    except nnx.LoadError as error:
        assert str(error).startswith(f"{path} cannot be loaded: ")
    model = Dense()
    try:
        nnx.load_state(path, into=model, strict=False)
    except nnx.LoadError:
        assert jnp.array_equal(model.w, Dense().w)


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_a_bit_of_the_header_of_safetensors(tmp_path, data):
    path = tmp_path / "m.safetensors"
    model = nnx.BatchNorm(2)
    nnx.save(path, model)
    whole = bytearray(path.read_bytes())
    size = 8 + int.from_bytes(whole[:8], "little")
    at = data.draw(st.integers(0, size - 1))
    whole[at] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(whole)
    try:
        back = nnx.load(path)
    except nnx.LoadError as error:
        assert str(error).startswith(f"{path} cannot be loaded: ")
    else:
        assert nnx.split(back)[0] is nnx.split(model)[0]


@pytest.mark.parametrize("part", [b"nnx.json", b"nnx.crc32", b"batch_stats", b"0.99"])
def test_the_structure_in_safetensors_has_a_checksum(tmp_path, part):
    path = tmp_path / "m.safetensors"
    nnx.save(path, nnx.BatchNorm(2))
    whole = bytearray(path.read_bytes())
    whole[whole.index(part) + 2] ^= 1
    path.write_bytes(whole)
    message = "the checksum of its structure is wrong"
    with pytest.raises(nnx.LoadError, match=message):
        nnx.load(path)
    with pytest.raises(nnx.LoadError, match=message):
        nnx.load_state(path, into=nnx.BatchNorm(2), strict=False)
