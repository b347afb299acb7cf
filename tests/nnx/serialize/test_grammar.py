"""The rules for files, one at a time: `save` refuses what breaks a rule, and so does `load`."""

import enum
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nnx
from nnx.serialize import decode, encode, grammar
from tests.nnx.serialize import fuzz


class Small(nnx.Module):
    w: jax.Array = nnx.param()
    rate: float = nnx.static(default=0.5)

    def __init__(self):
        self.w = jnp.arange(3.0)
        self.setting = (1, "two", jax.nn.relu)

    def encode(self, x):
        return x

    @property
    def width(self):
        return 3


@pytest.fixture(scope="module")
def good():
    file = fuzz.Named(b"", "npz")
    nnx.save(file, Small())
    return fuzz.unpacked("npz", file.getvalue())


def load(good, change):
    text, parts = good
    structure = json.loads(text)
    change(structure)
    return nnx.load(fuzz.Named(fuzz.packed("npz", json.dumps(structure), parts), "npz"))


def attributes(structure):
    return next(x["module"] for x in structure["objects"] if "module" in x)["attributes"]


def test_every_kind_is_written_and_read():
    assert grammar.KINDS.keys() == decode._KINDS.keys()
    written = {kind for kind, _ in encode._KINDS.values()}
    assert written <= grammar.KINDS.keys()
    for allowed in grammar.CONTEXTS.values():
        assert allowed <= grammar._ALL


def test_the_file_itself_is_accepted(good):
    assert load(good, lambda s: None).setting == Small().setting


# ---- attributes

IMPOSSIBLE = [
    *("train", "eval", "apply", "init", "make_rng", "get_flag", "_fields", "_defaults", "_dict"),
    *(
        "_book",
        "_frame",
        "_revision",
        "__class__",
        "__dict__",
        "__init__",
        "__call__",
        "__doc__",
    ),
    *("__orig_class__", "__setattr__", "__anything__", "", "a.b", ".", "width", "_set_mode"),
]


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_attributes_that_no_program_could_set(good, name):
    message = "should be the name of an attribute|has the attribute"
    with pytest.raises(nnx.LoadError, match=f"damaged: .*{message}"):
        load(good, lambda s: attributes(s).append([name, 3]))
    with pytest.raises(nnx.LoadError, match=f"damaged: .*{message}"):
        load(good, lambda s: attributes(s).append([name, {"named": "jax.nn.relu"}]))
    model = Small()
    vars(model)[name] = 3
    message = f"has the attribute {name!r}, which .* another name|The tree cannot be saved"
    with pytest.raises(nnx.SaveError, match=message):
        nnx.save(fuzz.Named(b"", "npz"), model)


def test_attributes_that_a_program_can_set(good):
    for name in ("encode", "layer 1", "0", "_private", "é", "path", "params"):
        model = Small()
        setattr(model, name, 3)
        file = fuzz.Named(b"", "npz")
        nnx.save(file, model)
        file.seek(0)
        assert vars(nnx.load(file))[name] == 3
        assert vars(load(good, lambda s, name=name: attributes(s).append([name, 3])))[name] == 3


class Own(nnx.Module):
    train: bool = True  # pyright: ignore[reportAssignmentType]

    def __init__(self):
        self.train = False  # pyright: ignore[reportAttributeAccessIssue]


def test_a_class_may_declare_what_every_module_has():
    file = fuzz.Named(b"", "npz")
    nnx.save(file, Own())
    file.seek(0)
    assert nnx.load(file).train is False


def _twice(structure):
    attributes(structure).append(attributes(structure)[0])


def _static_ref(structure):
    own = dict(attributes(structure))
    attributes(structure)[:] = [["w", own["w"]], ["rate", own["w"]], ["setting", 1]]


def _metadata(*pairs):
    def change(structure):
        ref = next(x["ref"] for x in structure["objects"] if "ref" in x)
        ref["metadata"] = [list(pair) for pair in pairs]

    return change


def _set(*keys, value):
    def change(structure):
        at = structure
        for key in keys[:-1]:
            at = at[key]
        at[keys[-1]] = value

    return change


CHANGES = [
    (_twice, "a Small has a key twice"),
    (_static_ref, "damaged: StructureError: Attribute 'rate' is a Ref|is static"),
    (_metadata(("a", 1), ("a", 2)), "the metadata of a Ref has a key twice"),
    (_metadata(("value", 1)), "'value' should be the name of metadata"),
    (_metadata(("a", {"object": 0})), "kind 'object module' is not allowed"),
    (_metadata(("a", {"list": []})), "kind 'list' is not allowed"),
    (lambda s: s.update(note=1), "it has a 'note', which is not part of the format"),
    (lambda s: s.pop("leaves"), "has no 'leaves'"),
    (lambda s: s["objects"].append({"list": []}), "nothing before its object 2 refers to it"),
    (lambda s: s["objects"].append({"list": [{"object": 2}]}), "nothing before its object 2 refers to it"),
    (lambda s: s["classes"].update(other={}), "its classes are not those of its objects"),
    (lambda s: s["leaves"].append([["x"], 1]), "1 is not allowed here"),
    (lambda s: s.update(leaves="ab"), "'ab' should be a list"),
    (lambda s: attributes(s).append("ab"), "'ab' should be a list"),
    (lambda s: attributes(s).append(["a", {"tuple": "ab"}]), "'ab' should be a list"),
    (lambda s: attributes(s).append(["a", {"range": "123"}]), "'123' should be a list"),
    (lambda s: attributes(s).append(["a", {"dict": [["x", 1]]}]), "kind 'dict' is not allowed"),
    (lambda s: attributes(s).append(["a", {"complex": [1, 2.0]}]), "1 is not allowed here"),
    (lambda s: attributes(s).append(["a", {"range": [0, 1, 0]}]), "ValueError"),
    (lambda s: attributes(s).append(["a", {"range": [0, 1, True]}]), "True should be an integer"),
    (lambda s: attributes(s).append(["a", {"frozenset": ["x", "x"]}]), "a frozenset has a key twice"),
    (lambda s: attributes(s).append(["a", {"frozenset": [1, True]}]), "a frozenset has a key twice"),
    (lambda s: attributes(s).append(["a", {"ordered": [[1, 2], [1.0, 2]]}]), "has a key twice"),
    (lambda s: attributes(s).append(["a", {"bytes": "AB=="}]), "is not valid base64"),
    (lambda s: attributes(s).append(["a", {"dtype": "f4"}]), "the dtype 'f4' is not spelled as save spells it"),
    (lambda s: attributes(s).append(["a", {"dtype": "i4,f4"}]), "is not spelled as save spells it|no attribute"),
    (lambda s: attributes(s).append(["a", {"scalar": ["int32", "AAAAAAAAAAA="]}]), "has 8 bytes"),
    (lambda s: attributes(s).append(["a", {"ellipsis": 1}]), "1 should be null"),
    (lambda s: attributes(s).append(["a", {"float": "Infinity"}]), "should be nan, inf or -inf"),
    (
        lambda s: attributes(s).append(["a", {"partial": [{"named": "jax.nn.relu"}, [], [["k", 1], ["k", 2]]]}]),
        "a partial has a key twice",
    ),
    (
        lambda s: attributes(s).append(["a", {"partial": [{"named": "jax.nn.relu"}, [{"object": 0}], []]}]),
        "StructureError",
    ),
    (lambda s: attributes(s).append(["a", {"partition": [[["x"], 1], [["x"], 2]]}]), "has a key twice"),
    (lambda s: attributes(s).append(["a", {"method": [3, "encode"]}]), "3 is not allowed here"),
    (lambda s: attributes(s).append(["a", {"method": [{"object": 1}, "encode"]}]), "'object ref' is not allowed"),
    (
        lambda s: attributes(s).append(["a", {"array": "w", "shape": [3], "dtype": "float32"}]),
        "its list of arrays is not that of the tree",
    ),
]  # fmt: skip


@pytest.mark.parametrize("change, message", CHANGES)
def test_a_rule_that_is_broken(good, change, message):
    with pytest.raises(nnx.LoadError, match=message):
        load(good, change)


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("0.5", "NaN", "it has the number NaN"),
        ("0.5", "-Infinity", "it has the number -Infinity"),
        ("0.5", "1e999", "it has the number 1e999"),
        ("0.5", "0." + "5" * 50, "it has the number 0.5555"),
        ("0.5", "9" * 1002, "it has an integer of 1002 digits"),
        ('"version"', '"version":1,"version"', "a name is given twice among"),
        ('"path"', '"path":["w"],"path"', "a name is given twice among"),
    ],
)
def test_json_that_says_what_json_leaves_open(good, old, new, message):
    text, parts = good
    changed = text.replace(old, new, 1)
    assert changed != text
    for kind in ("npz", "safetensors"):
        if kind == "safetensors":
            parts = {"header": {}, "data": b""}
        with pytest.raises(nnx.LoadError, match=message):
            nnx.load(fuzz.Named(fuzz.packed(kind, changed, parts), kind))


# ---- objects that save refuses, because they would not come back


class Flags(enum.Flag):
    A = 1
    B = 2
    C = 4


def saved(tree):
    file = fuzz.Named(b"", "npz")
    nnx.save(file, tree)
    file.seek(0)
    return nnx.load(file)


def test_flags_of_several_members():
    tree = [Flags.A, Flags.A | Flags.C, Flags.A | Flags.B | Flags.C]
    assert saved(tree) == tree


class Deep(nnx.Module):
    def __init__(self, x):
        self.x = x


def _renamed():
    model = Small()
    model.other = types.MethodType(lambda self: 0, model)
    return model


REFUSED = [
    (lambda: Deep(Flags(0)), "a Flags"),
    (lambda: nnx.Ref(1.0, other=nnx.Ref(2.0)), "holds a Ref in a key, in metadata or"),
    (lambda: nnx.Ref(1.0, other=(1, Deep(2))), "holds a Deep in a key, in metadata or"),
    (lambda: {Deep(1): 2}, "holds a Deep in a key, in metadata or"),
    (lambda: [{(nnx.Ref(1.0), 2): 2}], "holds a Ref in a key, in metadata or"),
    (lambda: Deep(10**1100), "'x' is an integer of more than 1000 digits"),
    (lambda: Deep("\ud83d\ude00"), "'x' is a text that is not valid Unicode"),
    (lambda: Deep({"\ud83d\ude00": 1}), "is a text that is not valid Unicode"),
    (lambda: Deep(np.dtype([("a", "f4")])), "'x' has a dtype with fields"),
    (lambda: Deep(np.zeros(2, [("a", "f4")])[0]), "'x' has a dtype with fields"),
    (lambda: Deep(np.dtype("O")), "'x' has a dtype with fields or of Python objects"),
    (lambda: Deep({i * (2**61 - 1): 1 for i in range(70)}), "'x' cannot be saved: it has more than 64"),
    (_renamed, "'other' is a method '<lambda>', but its class Small has no method"),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(REFUSED)))
def test_what_would_not_come_back(tmp_path, number):
    make, message = REFUSED[number]
    with pytest.raises(nnx.SaveError, match=message):
        nnx.save(tmp_path / "m.npz", make())
    assert not list(tmp_path.iterdir())


def test_numbers_and_texts_at_the_limits():
    texts = ["\ud800", "\udc00\ud800", "\U0001f600", "\0", "x" * 5000]
    numbers = [10**900, -(10**900), 1e308, 5e-324, -0.0, 2**64]
    back = saved([*texts, *numbers])
    assert back == [*texts, *numbers] and str(back[-2]) == "-0.0"
    keys = {-1: "a", -2: "b", **{i * (2**61 - 1): i for i in range(60)}}
    assert saved(keys) == keys
    assert saved({"a" * 2000: nnx.Ref(jnp.ones(1))})["a" * 2000].value == 1


def test_generic_modules_and_classes_made_in_functions():
    import typing

    T = typing.TypeVar("T")

    class Box(nnx.Module, typing.Generic[T]):
        def __init__(self):
            self.w = nnx.Ref(jnp.ones(2), "params")

    back = saved(Box[int]())
    assert type(back) is Box and nnx.split(back)[0] is nnx.split(Box())[0]


class Numbers:
    """A registered class that gets back another array than the one it gave."""

    def __init__(self, x):
        self.x = jnp.asarray(x)


jax.tree_util.register_pytree_node(Numbers, lambda n: ((n.x,), None), lambda _, c: Numbers(c[0]))
nnx.saveable(Numbers, save=lambda n: n.x.tolist(), load=lambda x: Numbers(x))


def test_a_class_that_makes_its_arrays_anew():
    assert saved([Numbers([1.0, 2.0])])[0].x.tolist() == [1.0, 2.0]


def test_a_mask_that_was_mapped_from_a_model_has_no_arrays_to_save():
    mask = jax.tree.map(lambda x: isinstance(x, int), [1, Deep(jnp.ones(2))])
    with pytest.raises(nnx.SaveError, match="'1.x' is a bool instead of an array"):
        nnx.save(fuzz.Named(b"", "npz"), [1, mask[1]])
