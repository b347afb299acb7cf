"""Any number of hostile files: `python -m tests.nnx.serialize.fuzz --files 50000 --seed 1`.

Each file is a file from `save` with a change: in its JSON (parts replaced, moved, repeated, nested, renamed), in
its text, or in its container (cut, flipped, repeated, with other sizes, compressed). Loading it must raise a
LoadError that names the file, or return a tree that `save` would describe exactly as the file does. `load` and
`load_state` must take work and memory in proportion to its size.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import copy
import functools
import gc
import io
import json
import random
import struct
import sys
import time
import tracemalloc
import zipfile
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import nnx
from nnx.serialize.encode import encode
from tests.models import Dense, Net

# The bytes of memory, and the function calls, that each byte of a file may cost beyond an empty file.
BYTES_EACH, BYTES = 100, 1_000_000
CALLS_EACH, CALLS = 20, 20_000


class Named(io.BytesIO):
    """A file in memory with a name, which determines its container."""

    def __init__(self, data: bytes, kind: str):
        super().__init__(data)
        self.name = f"fuzz.{kind}"


class Point(NamedTuple):
    x: Any
    y: Any


class Everything(nnx.Module):
    """An attribute of every kind that a file has."""

    w: jax.Array = nnx.param()
    rate: float = nnx.static(default=0.5)

    def __init__(self):
        self.w = jnp.arange(3.0)
        self.tied = nnx.get_ref(self, "w")
        self.texts = ("a", b"bytes", None, True, -3, 1.5, float("inf"), 2 + 3j, ...)
        self.keys = {
            1: "a",
            (2, "b"): [nnx.Ref({"a": [jnp.ones(2), 3]}, ("x", 1), axes=("in", None))],
        }
        self.more = [slice(1, None, 2), range(3), frozenset({1, "a"}), np.dtype("bfloat16")]
        self.more += [np.float32(1.5), jax.lax.Precision.HIGHEST, Point(1, (2,)), Dense, jnp.tanh]
        self.more += [jax.sharding.PartitionSpec("a", None), collections.OrderedDict(z=1, a=2)]
        self.more += [nnx.PathContains("bn*"), functools.partial(jax.nn.softmax, axis=-1)]
        self.more.append(jax.tree_util.Partial(jax.nn.relu, np.ones(2)))
        self.key = nnx.Ref(jax.random.key(0), "rngs")
        self.table = jnp.full((2, 2), 2, jnp.bfloat16)
        self.net = Net()
        self.method = self.net.blocks[1].__call__
        self.me = self

    def __call__(self, x):
        return self.net(x)


@functools.cache
def seeds() -> list[tuple[str, bytes]]:
    """The files to change: small ones, and one with everything."""
    model = Dense()
    state = optax.adam(1e-3).init(model["params"])
    trees = [
        Everything(),
        model,
        Net()["params"],
        nnx.Partition({("buffer",): {"x": [jnp.ones(2), (jnp.zeros(1),)]}}),
        (model, {"state": nnx.Ref(state, "opt_state")}, nnx.RngStream(0)),
        [[[nnx.Ref(1.0)]], 2.5, {"a": np.arange(3)}],
    ]
    found = []
    for tree in trees:
        for kind in ("npz", "safetensors"):
            file = Named(b"", kind)
            nnx.save(file, tree)
            found.append((kind, file.getvalue()))
    return found


# ---- the two containers, taken apart and put together with correct checksums


def unpacked(kind: str, data: bytes) -> tuple[str, dict[str, Any]]:
    if kind == "npz":
        with zipfile.ZipFile(io.BytesIO(data)) as file:
            members = {name: file.read(name) for name in file.namelist()}
        return members.pop("nnx.json").decode(), members
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    return header["__metadata__"]["nnx.json"], {"header": header, "data": data[8 + length :]}


def packed(kind: str, text: str, parts: dict[str, Any]) -> bytes:
    if kind == "npz":
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr(zipfile.ZipInfo("nnx.json"), text)
            for name, content in parts.items():
                archive.writestr(zipfile.ZipInfo(name), content)
        return file.getvalue()
    encoded = text.encode("utf-8", "surrogatepass")
    metadata = {"nnx.json": text, "nnx.crc32": str(zlib.crc32(encoded))}
    header = json.dumps({**parts["header"], "__metadata__": metadata}).encode()
    return struct.pack("<Q", len(header)) + header + parts["data"]


# ---- changes of the structure

LITERALS = [
    *(None, True, False, 0, 1, -1, 7, 2**31, 2**63, 10**30, 0.0, -0.0, 1e-300, 1.0, "", "w", "a.b"),
    *(
        "train",
        "apply",
        "init",
        "__class__",
        "__init__",
        "_dict",
        "_fields",
        "_book",
        "__call__",
    ),
    *(
        "rate",
        "net",
        "x",
        "nan",
        "float32",
        "<U3",
        "|V4",
        "object",
        "int4",
        "threefry2x32",
        "jax.jit",
    ),
    *(
        "builtins.tuple",
        "builtins.int",
        "jax.nn.relu",
        "jax.numpy.save",
        "tests.models.Dense",
        "é\0",
    ),
    *(
        "\ud800",
        "nnx.Linear",
        "nnx.load",
        "params",
        "numpy.float32",
        "x" * 2000,
        "a." * 400,
        "AAA=",
    ),
    *([], {}, [[]], ["a"], [0, 0], {"object": 0}, {"object": 1}, {"tuple": []}, {"list": []}),
    *({"dict": []}, {"ellipsis": None}, {"float": "nan"}, {"named": "jax.nn.relu"}),
]
KINDS = [
    *("object", "tuple", "list", "dict", "ordered", "spec", "frozenset", "namedtuple", "complex"),
    *("bytes", "slice", "range", "dtype", "scalar", "enum", "partition", "partial", "Partial"),
    *("method", "class", "named", "saved", "ref", "module", "float", "array", "numpy", "key"),
]


def places(code: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [at]
    items = code.items() if isinstance(code, dict) else ()
    for key, value in enumerate(code) if isinstance(code, list) else items:
        found += places(value, (*at, key))
    return found


def get(code: Any, at: tuple[Any, ...]) -> Any:
    for key in at:
        code = code[key]
    return code


def change_structure(rng: random.Random, structure: Any) -> None:
    """Change a structure in one place."""
    all_places = places(structure)[1:]
    at = rng.choice(all_places)
    holder, key = get(structure, at[:-1]), at[-1]
    old = holder[key]
    other = copy.deepcopy(get(structure, rng.choice(all_places)))
    way = rng.randrange(12)
    if way == 0:
        holder[key] = copy.deepcopy(rng.choice(LITERALS))
    elif way == 1:
        holder[key] = other
    elif way == 2 and isinstance(holder, list):
        del holder[key]
    elif way == 2:
        del holder[key]
    elif way == 3 and isinstance(holder, list):
        holder.insert(rng.randrange(len(holder) + 1), copy.deepcopy(rng.choice([old, other])))
    elif way == 4 and isinstance(holder, list):
        rng.shuffle(holder)
    elif way == 5 and isinstance(holder, dict):
        holder[rng.choice([*KINDS, "", "extra"])] = holder.pop(key)
    elif way == 6 and isinstance(holder, dict):
        holder[rng.choice([*KINDS, "extra"])] = other
    elif way == 7:
        holder[key] = {rng.choice(KINDS): old}
    elif way == 8:
        holder[key] = str(old) if isinstance(old, list) else [old]
    elif way == 9:
        for _ in range(rng.choice([2, 99, 101, 400])):
            old = {"tuple": [old]}
        holder[key] = old
    elif way == 10 and isinstance(old, int | float):
        holder[key] = rng.choice([old + 1, -old, bool(old), float(old), old * 2**61])
    else:
        holder[key] = rng.choice(["", "\u0130", old, None]) if isinstance(old, str) else old


WORDS = [
    "NaN",
    "Infinity",
    "-Infinity",
    "1e999",
    "-1e999",
    "9" * 2000,
    "1" * 5000,
    "-0",
    "1E5",
    "0.1e-5",
]


def change_text(rng: random.Random, text: str) -> str:
    """Change JSON in ways that `json.dumps` cannot: invalid numbers, duplicate names, noise."""
    way = rng.randrange(4)
    at = rng.randrange(len(text))
    if way == 0:
        numbers = [i for i, c in enumerate(text) if c.isdigit() and not text[i - 1].isalnum()]
        at = rng.choice(numbers) if numbers else at
        end = at
        while end < len(text) and text[end] in "0123456789.":
            end += 1
        return text[:at] + rng.choice(WORDS) + text[end:]
    if way == 1:
        starts = [i for i, c in enumerate(text) if c == "{" and text[i + 1] == '"']
        at = rng.choice(starts) + 1
        end = text.find(",", at) if rng.random() < 0.5 else text.find("}", at)
        return text[:at] + text[at:end] + "," + text[at:]
    if way == 2:
        return text[:at] + rng.choice('[]{},:"\\ue') + text[at + rng.randrange(2) :]
    end = min(len(text), at + rng.randrange(40))
    return text[:at] + text[at:end] * rng.choice([0, 2, 50]) + text[end:]


# ---- changes of the container


def change_bytes(rng: random.Random, data: bytes) -> bytes:
    raw = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        at = rng.randrange(len(raw))
        end = min(len(raw), at + rng.randrange(1, 40))
        way = rng.randrange(6)
        if way == 0:
            raw[at] ^= 1 << rng.randrange(8)
        elif way == 1:
            raw[at:end] = rng.randbytes(end - at)
        elif way == 2:
            del raw[at:end]
        elif way == 3:
            raw[at:at] = raw[at:end] * rng.choice([1, 1, 300])
        elif way == 4:
            size = rng.choice([2, 4, 8])
            number = rng.choice([0, 1, 255, 2**15, 2**16 - 1, 2**31, 2**32 - 1, 2**63]) % 2 ** (
                8 * size
            )
            raw[at : at + size] = number.to_bytes(size, "little")
        else:
            del raw[at:]
        raw = raw or bytearray(b"x")
    return bytes(raw)


def change_parts(rng: random.Random, kind: str, text: str, parts: dict[str, Any]) -> bytes:
    parts = copy.deepcopy(parts)
    if kind == "safetensors":
        header = parts["header"]
        names = [name for name in header if name != "__metadata__"]
        if not names:
            return packed(kind, text, parts)
        facts = header[rng.choice(names)]
        way = rng.randrange(5)
        if way == 0:
            facts["data_offsets"] = header[rng.choice(names)]["data_offsets"]
        elif way == 1:
            i = rng.randrange(2)
            facts["data_offsets"][i] = rng.choice([0, -1, 4, 2**40, 1.5, True, "0", 10**25])
        elif way == 2:
            facts["shape"] = rng.choice(
                [[], [0], [2**40], [-1], [2**62, 4], [1] * 70, "3", [True], [1.0]]
            )
        elif way == 3:
            facts["dtype"] = rng.choice(
                ["F64", "U8", "BF16", "F4", "I2", "", None, "F8_E5M2", "C64"]
            )
        else:
            header[rng.choice(["extra", "nnx.json", ""])] = facts
        return packed(kind, text, parts)
    file = io.BytesIO()
    way = rng.randrange(5)
    deflate = zipfile.ZIP_DEFLATED if way == 0 else zipfile.ZIP_STORED
    with zipfile.ZipFile(file, "w", deflate) as archive:
        archive.writestr("nnx.json", text)
        for name, content in parts.items():
            if way == 1 and rng.random() < 0.5:
                continue
            if way == 2:
                shape = rng.choice(
                    ["(1099511627776,)", "(-1, -3)", "(True,)", "(3, 0)", "()", "(3.0,)"]
                )
                start, end = content.find(b"(") + 1, content.find(b")")
                content = content[: start - 1] + shape.encode() + content[end + 1 :]
            if way == 3:
                types = ["<f8", "|O", "|V4", "<U0", "|b1", ">f4", "(2,)<f4", "<M8[s]"]
                content = content.replace(b"<f4", rng.choice(types).encode(), 1)
            archive.writestr(name, content + b"\0" * rng.choice([0, 0, 3]))
        if way == 4:
            archive.writestr(rng.choice(["extra.npy", "extra", "nnx.JSON", "../x.npy"]), b"0" * 300)
    return file.getvalue()


def hostile(rng: random.Random) -> tuple[str, bytes, bytes | None]:
    """A kind, a file, and if known, the file to which it must be equivalent if it is accepted."""
    kind, data = rng.choice(seeds())
    way = rng.random()
    if way < 0.25:
        return kind, change_bytes(rng, data), data
    text, parts = unpacked(kind, data)
    if way < 0.4:
        return kind, change_parts(rng, kind, text, parts), None
    if way < 0.55:
        return kind, packed(kind, change_text(rng, text), parts), None
    structure = json.loads(text)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        # By now, the structure may be nested too deep to copy.
        with contextlib.suppress(RecursionError):
            change_structure(rng, structure)
            text = json.dumps(structure)
    return kind, packed(kind, text, parts), None


# ---- what must hold


class Fault(AssertionError):
    """A file did something that no file may do."""


class Cost(NamedTuple):
    """The cost of loading a file."""

    seconds: float
    memory: int
    calls: int


def measured(function: Any) -> tuple[Any, Cost]:
    """The result of a call (or its LoadError), and its cost."""
    calls = 0

    def count(frame: Any, event: str, arg: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    tracemalloc.reset_peak()
    before, start = tracemalloc.get_traced_memory()[0], time.process_time()
    sys.setprofile(count)
    try:
        result = function()
    except nnx.LoadError as error:
        result = error
    finally:
        sys.setprofile(None)
    memory = tracemalloc.get_traced_memory()[1] - before
    return result, Cost(time.process_time() - start, memory, calls)


def content(tree: Any) -> tuple[Any, Any]:
    """The description of a tree by `save`: the structure with arrays by number, and their bits."""
    encoded = encode(tree)
    numbers: dict[str, int] = {}
    structure = _by_number(_in_order(encoded.structure), numbers)
    return structure, [_bits(encoded.arrays[name]) for name in numbers]


def _in_order(structure: Any) -> Any:
    """The structure with its objects in the order of the first mention."""
    new: dict[int, int] = {}
    order: list[int] = []

    def renumbered(code: Any) -> Any:
        if isinstance(code, list):
            return [renumbered(x) for x in code]
        if not isinstance(code, dict):
            return code
        if code.keys() == {"object"}:
            number = code["object"]
            if number not in new:
                new[number] = len(new)
                order.append(number)
            return {"object": new[number]}
        return {k: renumbered(v) for k, v in code.items()}

    root = renumbered(structure["root"])
    objects = [renumbered(structure["objects"][number]) for number in order]
    return structure | {"root": root, "objects": objects}


def _by_number(code: Any, numbers: dict[str, int]) -> Any:
    if isinstance(code, list):
        return [_by_number(x, numbers) for x in code]
    if not isinstance(code, dict):
        # 1 is not 1.0, nor True, and NaN is NaN.
        return type(code).__name__, repr(code)
    made = {k: _by_number(v, numbers) for k, v in code.items() if k != "array"}
    if "array" in code:
        made["array"] = numbers.setdefault(code["array"], len(numbers))
    return made


def _bits(x: Any) -> Any:
    x = jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    return np.asarray(x).tobytes()


@functools.cache
def fresh() -> Any:
    """The model into which `load_state` reads, as it is before."""
    return content(Dense())


def structure_in(kind: str, data: bytes) -> Any:
    structure = json.loads(unpacked(kind, data)[0])
    structure.pop("sums", None)
    return _by_number(_in_order(structure), {})


def difference(a: Any, b: Any, at: str = "") -> str:
    """The first difference of two structures, or None."""
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        pairs = [(str(k), a[k], b[k]) for k in a]
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        pairs = [(str(i), x, y) for i, (x, y) in enumerate(zip(a, b, strict=True))]
    else:
        return "" if a == b else f"at {at}: {a!r:.200} and {b!r:.200}"
    return next((found for k, x, y in pairs if (found := difference(x, y, f"{at}.{k}"))), "")


def check(kind: str, data: bytes, same_as: bytes | None = None) -> tuple[bool, Cost]:
    """Load a file in both ways. Return whether it was accepted, and the greater cost.

    Raises:
      Fault: a rule was broken; the message says which.
    """
    size = len(data)
    loaded, cost = measured(lambda: nnx.load(Named(data, kind)))
    model = Dense()
    state, other = measured(lambda: nnx.load_state(Named(data, kind), into=model, strict=False))
    cost = Cost(*map(max, cost, other))
    if cost.memory > BYTES + BYTES_EACH * size:
        raise Fault(f"{cost.memory} bytes of memory for a file of {size}")
    if cost.calls > CALLS + CALLS_EACH * size:
        raise Fault(f"{cost.calls} calls for a file of {size}")
    for error in (loaded, state):
        if isinstance(error, nnx.LoadError):
            text = str(error)
            if not text.startswith(f"fuzz.{kind} ") or "\n" in text or len(text) > 5000:
                raise Fault(f"the message {text!r}")
    if isinstance(state, nnx.LoadError) and content(model) != fresh():
        raise Fault("load_state failed and changed the model")
    if isinstance(loaded, nnx.LoadError):
        return False, cost
    if isinstance(state, nnx.LoadError):
        raise Fault(f"load accepts what load_state does not: {state}")
    now = content(loaded)
    if same_as is not None and now != content(nnx.load(Named(same_as, kind))):
        raise Fault("another tree than that of the file that was changed")
    if same_as is None:
        said = difference(now[0], structure_in(kind, data))
        if said:
            raise Fault(f"save says something else of the tree than the file: {said}")
    return True, cost


def run(files: int, seed: int, report: Any = None, fault: Any = None) -> dict[str, Any]:
    """Try this many files and return the outcomes. `fault` gets the text of each fault; without it, faults are raised."""
    worst = Cost(0.0, 0, 0)
    accepted = 0
    tracemalloc.start()
    seeds(), fresh()
    try:
        for number in range(files):
            kind, data, same_as = hostile(random.Random(f"{seed} {number}"))
            try:
                done, cost = check(kind, data, same_as)
            except Exception as error:
                text = f"file {number} of seed {seed}: {type(error).__name__}: {error}"
                if fault is None:
                    raise Fault(text) from error
                fault(text)
                continue
            accepted += done
            worst = Cost(*map(max, worst, cost))
            if report is not None and (number + 1) % 1000 == 0:
                report(number + 1, accepted, worst)
            if number % 500 == 0:
                gc.collect()
    finally:
        tracemalloc.stop()
    return {"files": files, "accepted": accepted, "worst": worst}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep-on", action="store_true", help="list every fault, and go on")
    given = parser.parse_args()

    def report(done: int, accepted: int, worst: Cost) -> None:
        print(
            f"{done} files, {accepted} accepted; at most {worst.seconds:.2f} s, "
            f"{worst.memory / 1e6:.1f} MB, {worst.calls} calls",
            flush=True,
        )

    faults: list[str] = []
    found = run(given.files, given.seed, report, faults.append if given.keep_on else None)
    print(
        "\n".join(
            [*faults, f"{given.files} files, {found['accepted']} accepted, {len(faults)} faults"]
        )
    )


if __name__ == "__main__":
    main()
