"""Files that claim more than they hold: refused or loaded, with work and memory in proportion to their size."""

import io
import json
import struct
import tracemalloc
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest

import nnx
from tests.nnx.serialize import fuzz


@pytest.fixture(autouse=True)
def traced():
    tracemalloc.start()
    yield
    tracemalloc.stop()


def file(root, objects=(), leaves=(), classes=None, arrays=None):
    """An `.npz` of this structure."""
    structure = {
        "format": "nnx",
        "version": 1,
        "root": root,
        "objects": list(objects),
        "leaves": list(leaves),
        "classes": classes or {},
    }
    members = {}
    for name, array in (arrays or {}).items():
        buffer = io.BytesIO()
        np.lib.format.write_array(buffer, array, (1, 0))
        members[f"{name}.npy"] = buffer.getvalue()
    return fuzz.packed("npz", json.dumps(structure), members)


def text(data, old, new):
    """The file with another text as its structure."""
    whole, parts = fuzz.unpacked("npz", data)
    return fuzz.packed("npz", whole.replace(old, new), parts)


N = 1000
BIG = np.zeros(100_000, np.uint8)
MENTION = {"array": "x", "shape": [len(BIG)], "dtype": "uint8"}
MERSENNE = 2**61 - 1


def mentions(change):
    codes = [{**MENTION, **change(i)} for i in range(N)]
    leaves = [[[str(i)], code] for i, code in enumerate(codes)]
    return file({"tuple": codes}, leaves=leaves, arrays={"x": BIG})


def lists(*, deep, wide):
    """Lists, each of which holds the next one a few times."""
    return [{"list": [{"object": i + 1}] * wide} for i in range(deep)] + [{"list": []}]


BOMBS = {
    "a key that the format does not know": (
        mentions(lambda i: {"note": i}),
        "it has a 'note', which is not part of the format",
    ),
    "an array in every dtype": (
        mentions(lambda i: {"dtype": ["uint8", "int4", "float8_e4m3fn", "float8_e5m2"][i % 4]}),
        "it describes its array 'x' in two ways",
    ),
    "an array of two libraries": (
        mentions(lambda i: {"numpy": True} if i % 2 else {}),
        "it describes its array 'x' in two ways",
    ),
    "numbers of one hash": (
        file({"ordered": [[i * MERSENNE, i] for i in range(N)]}),
        "an OrderedDict has more than 64 keys with the same hash",
    ),
    "tuples of one hash": (
        file({"ordered": [[{"tuple": [i * MERSENNE]}, i] for i in range(N)]}),
        "more than 64 keys with the same hash",
    ),
    "a set of one hash": (
        file({"frozenset": [i * MERSENNE for i in range(N)]}),
        "more than 64 keys with the same hash",
    ),
    "complex numbers of one hash": (
        file({"frozenset": [{"complex": [1000003.0 * i, -1.0 * i]} for i in range(N)]}),
        "more than 64 keys with the same hash",
    ),
    "lists in lists in a partial": (
        file({"partial": [{"named": "jax.nn.relu"}, [{"object": 0}], []]}, lists(deep=50, wide=2)),
        "its lists hold each other many times over",
    ),
    "a list in itself in a partial": (
        file({"Partial": [{"named": "jax.nn.relu"}, [{"object": 0}], []]}, [{"list": [{"object": 0}]}]),
        "its lists hold each other many times over",
    ),
    "lists in lists in a Partition": (
        file({"partition": [[["a"], {"object": 0}]]}, lists(deep=50, wide=2)),
        "its lists hold each other many times over",
    ),
    "a class that is not there, many times": (
        file(
            {"object": 0},
            [{"list": [{"object": i + 1} for i in range(N)]}]
            + [{"module": {"class": f"no.Class{i}", "attributes": []}} for i in range(N)],
            classes={f"no.Class{i}": {} for i in range(N)},
        ),
        "module classes that this program has not imported",
    ),
    "a name of many parts": (
        file({"tuple": [{"named": "a." * 450 + str(i)} for i in range(300)]}),
        "a function or class that is not registered",
    ),
    "a long name": (file({"named": "a." * 100_000}), "should be a name"),
    "a long number": (text(file(0), '"root": 0', f'"root": {"9" * 200_000}'), "integer of 200000 digits"),
    "a number that is none": (text(file(0), '"root": 0', '"root": 1e999'), "it has the number 1e999"),
    "a name twice": (text(file(0), '"root": 0', '"root": 0, "root": 0'), "a name is given twice among"),
    "a path to nowhere": (
        file({"object": 0}, [{"ref": {"path": ["a"] * 50_000, "collection": None, "metadata": [], "value": 1}}]),
        "is not that of its Ref",
    ),
    "a dtype of many parts": (file({"dtype": "i4," * 300 + "i4"}), "dtype|has another name"),
    "a flag of many names": (
        file({"enum": ["jax.lax.Precision", "HIGH|" * 190 + "HIGH"]}),
        "no longer has the member",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb(name):
    data, message = BOMBS[name]
    with pytest.raises(nnx.LoadError, match=message):
        nnx.load(fuzz.Named(data, "npz"))
    accepted, _ = fuzz.check("npz", data)
    assert not accepted


LARGE = {
    "lists in lists": file({"object": 0}, lists(deep=N, wide=2)),
    "many empty lists": file(
        {"object": 0},
        [{"list": [{"object": i + 1} for i in range(N)]}, *({"list": []} for _ in range(N))],
    ),
    "many mentions of one array": mentions(lambda i: {}),
    "many numbers": file({"tuple": list(range(N))}),
    "many keys": file({"ordered": [[i, None] for i in range(N)]}),
    "minus one and minus two": file({"ordered": [[-1, None], [-2, None]]}),
    "a range without end": file({"range": [0, 10**300, 1]}),
}  # fmt: skip


@pytest.mark.parametrize("name", LARGE)
def test_a_large_file_is_loaded(name):
    accepted, _ = fuzz.check("npz", LARGE[name])
    assert accepted


def test_partials_in_partials_are_refused_or_loaded_alike():
    code = {"named": "jax.nn.relu"}
    for _ in range(90):
        code = {"partial": [code, list(range(300)), []]}
    # Python merges them into one partial, so no file from `save` has them.
    _, cost = fuzz.measured(lambda: nnx.load(fuzz.Named(file(code), "npz")))
    assert cost.memory < fuzz.BYTES + fuzz.BYTES_EACH * len(file(code))


def test_one_array_is_one_array():
    found = nnx.load(fuzz.Named(LARGE["many mentions of one array"], "npz"))
    assert len(found) == N and all(x is found[0] for x in found)


def test_names_that_load_state_does_not_know_take_no_search_each():
    paths = [[[f"a.{i}", "9" * 30], 1.0] for i in range(N)]
    refs = [{"ref": {"path": p, "collection": None, "metadata": [], "value": v}} for p, v in paths]
    data = file({"object": 0}, [{"list": [{"object": i + 1} for i in range(N)]}, *refs])
    model = nnx.Sequential(*(nnx.Linear.init(0)(1, 1) for _ in range(5)))
    report, cost = fuzz.measured(
        lambda: nnx.load_state(fuzz.Named(data, "npz"), into=model, strict=False)
    )
    assert len(report.unexpected) == N
    assert cost.calls < fuzz.CALLS + fuzz.CALLS_EACH * len(data)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_bombs_of_the_container():
    def archived(write, deflate=zipfile.ZIP_STORED):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", deflate) as archive:
            write(archive)
        return buffer.getvalue()

    zeros = b"\0" * 5_000_000
    compressed = archived(lambda a: a.writestr("nnx.json", zeros), zipfile.ZIP_DEFLATED)
    repeated = archived(lambda a: [a.writestr("x.npy", b"") for _ in range(N)])
    many = archived(lambda a: [a.writestr(f"{i}.npy", b"") for i in range(N)])
    # Every entry of the directory claims that its part is where the first one is.
    overlapping = bytearray(many)
    at = many.find(b"PK\1\2")
    while at >= 0:
        overlapping[at + 42 : at + 46] = b"\0" * 4
        at = many.find(b"PK\1\2", at + 1)
    for data in (compressed, repeated, many, bytes(overlapping)):
        accepted, _ = fuzz.check("npz", data)
        assert not accepted

    def tensors(header, rest=b""):
        text = json.dumps(header).encode() if not isinstance(header, bytes) else header
        return struct.pack("<Q", len(text)) + text + rest

    one = {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]}
    none = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
    hostile = {
        "overlap, or have gaps": tensors({"a": one, "b": one}, b"\0" * 8),
        "as large as the file": tensors({"a": one}, b"\0" * 9),
        "ends too early|as large as the file": tensors({"a": one}, b"\0" * 7),
        "not as large as its shape": tensors({"a": {**one, "shape": [2**62, 8]}}, b"\0" * 8),
        "a name is given twice": tensors(
            b'{"a": %s, "a": %s}' % ((json.dumps(none).encode(),) * 2)
        ),
        "larger than the file": struct.pack("<Q", 2**63) + b"{}",
        "which NumPy does not have": tensors({"a": {**one, "dtype": "F4"}}, b"\0" * 8),
        "holds arrays .*more": tensors({str(i): none for i in range(N)}),
        "the number NaN": tensors(b'{"a": NaN}'),
    }
    for message, data in hostile.items():
        with pytest.raises(nnx.LoadError, match=message):
            nnx.load(fuzz.Named(data, "safetensors"))
        fuzz.check("safetensors", data)


def test_every_value_may_be_as_deep_as_the_grammar_says_and_no_deeper(tmp_path):
    def nested(n):
        value = 1
        for _ in range(n):
            value = (value,)
        return value

    path = tmp_path / "m.npz"
    nnx.save(path, nested(101))
    assert nnx.load(path) == nested(101)
    for n in (102, 300, 5000):
        with pytest.raises(nnx.SaveError, match="nested more than 100 levels deep|cannot be saved"):
            nnx.save(path, nested(n))
    assert nnx.load(path) == nested(101)
    code = 1
    for _ in range(300):
        code = {"tuple": [code]}
    with pytest.raises(nnx.LoadError, match="nested more than 100 levels deep"):
        nnx.load(fuzz.Named(file(code), "npz"))
    # Objects with an identity have no limit, so a list is the way out.
    value = [jnp.ones(1)]
    for _ in range(300):
        value = [(value,)]
    nnx.save(path, value)
    assert len(nnx.load(path)) == 1


def test_the_fuzzer_finds_no_fault():
    tracemalloc.stop()
    found = fuzz.run(150, seed=0)
    assert 5 < found["accepted"] < 75
    tracemalloc.start()
