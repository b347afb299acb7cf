import numpy as np
import pytest

import refx
from refx import All, Any, Not, OfType, PathContains, Ref, to_predicate

W, S, N = Ref(1.0, "params"), Ref(2, "stats"), Ref(3.0)


@pytest.mark.parametrize(
    "filter, expected",
    [
        ("params", [W]),
        (("params", "stats"), [W, S]),
        ((), []),
        (..., [W, S, N]),
        (None, []),
        (lambda path, ref: path[-1] == "s", [S]),
        (All(..., Not("params")), [S, N]),
        (All(), [W, S, N]),
        (Any(), []),
        (Any("stats", PathContains("w")), [W, S]),
        (PathContains("bn"), [S, N]),
        (PathContains("b*"), [W, S, N]),
        (PathContains("bn.s"), [S]),
        (PathContains("b*.[ws]"), [W, S]),
        (PathContains("b.s"), []),
        (PathContains("bn.s.more"), []),
        (OfType(int), [S]),
        (OfType((int, float)), [W, S, N]),
        (OfType(int | float), [W, S, N]),
        (Not(("params", "stats")), [N]),
    ],
)
def test_what_filters_select(filter, expected):
    predicate = to_predicate(filter)
    refs = {("b", "w"): W, ("bn", "s"): S, ("bn", "n"): N}
    assert [r for path, r in refs.items() if predicate(path, r)] == expected


def test_any_hashable_is_a_collection():
    label = ("a", 1)
    assert to_predicate(All(7))(("x",), Ref(0, 7))
    assert not to_predicate(7)(("x",), Ref(0, label))


@pytest.mark.parametrize("bad", [["params"], {"params": 1}])
def test_what_is_not_a_filter_is_an_error(bad):
    with pytest.raises(refx.FilterError, match=r"is not a filter.*use a tuple"):
        to_predicate(bad)


def test_a_class_is_not_a_filter():
    with pytest.raises(refx.FilterError, match=r"int is a class.*OfType\(int\)"):
        to_predicate(int)
    with pytest.raises(refx.FilterError, match="one component of a path"):
        PathContains(3)
    with pytest.raises(
        refx.FilterError, match="OfType takes a class, or a tuple of classes.*'int'"
    ):
        OfType("int")


def test_combinators_compare_and_print():
    assert All("a", Not("b")) == All("a", Not("b")) != Any("a", Not("b"))
    assert hash(PathContains("x")) == hash(PathContains("x"))
    assert repr(All("a", Not(OfType(int)))) == "All('a', Not(OfType(int)))"


def test_a_dotted_part_is_consecutive_or_one_key():
    path = ("net", "blocks", "0", "kernel")
    assert PathContains("blocks.0")(path, None) and PathContains("net.*.0")(path, None)
    assert not PathContains("blocks.kernel")(path, None)
    assert PathContains("a.b")(("a.b", "w"), None)


@pytest.mark.parametrize(
    "filters",
    [
        (..., "params"),
        (..., ...),
        (All(), "params"),
        (Not(None), "params"),
        (("stats", ...), "params"),
        ("params", "params", ...),
        (("params", "stats"), "stats", ...),
        (PathContains("w"), PathContains("w"), ...),
        ("params", All("params", PathContains("w")), ...),
        ("params", Any("params", All("params", OfType(int))), ...),
        ("params", Not("params"), "stats"),
    ],
)
def test_a_filter_that_earlier_ones_leave_nothing_to_is_an_error(filters):
    tree = {"w": Ref(1.0, "params"), "s": Ref(2, "stats")}
    with pytest.raises(refx.FilterError, match="can never select anything") as error:
        refx.split(tree, *filters)
    assert len(str(error.value).splitlines()) <= 4


@pytest.mark.parametrize(
    "filters",
    [
        ("params", ...),
        ("params", Not("params"), ...),
        (None, None, ...),
        (All("params", PathContains("w")), "params", ...),
        (PathContains("w"), PathContains("s"), ...),
        (lambda path, ref: path == ("w",), lambda path, ref: path == ("s",), ...),
    ],
)
def test_filters_that_may_find_nothing_left_are_not_an_error(filters):
    tree = {"w": Ref(1.0, "params"), "s": Ref(2, "stats")}
    _, *parts = refx.split(tree, *filters)
    assert sum(map(len, parts)) == 2


def test_the_message_says_what_takes_everything():
    with pytest.raises(refx.FilterError, match=r"'params'.*take everything. Put \.\.\. last"):
        refx.split({"w": W}, ..., "params")
    with pytest.raises(refx.FilterError, match="take everything that it selects. Leave it out"):
        refx.split({"w": W}, "params", "params", ...)


def test_filters_see_the_parts_of_the_paths_of_a_partition():
    parts = {("block", "kernel"): 1, ("block", "bias"): 2, ("head", "kernel"): 3, (): 4}
    partition = refx.Partition({p: np.float32(x) + np.zeros(1) for p, x in parts.items()})
    kernels = refx.get_partition(partition, PathContains("kernel"))
    assert list(kernels) == [("block", "kernel"), ("head", "kernel")]
    assert list(refx.get_partition(partition, refx.PathMatches("*.kernel"))) == list(kernels)
    assert list(refx.get_partition([partition], refx.PathMatches("0.block.*"))) == [
        ("0", "block", "kernel"),
        ("0", "block", "bias"),
    ]
    dagdef, found, rest = refx.split(partition, PathContains("block"), ...)
    assert list(found) == [("block", "kernel"), ("block", "bias")]
    again = refx.merge(dagdef, found, rest)
    assert list(again.items()) == list(partition.items())


def test_a_partition_has_no_collections():
    partition = refx.Partition({"w": np.zeros(2)})
    for filter in ("params", All("params", PathContains("w")), ("params", "stats")):
        with pytest.raises(refx.FilterError, match=r"Partition have no collection.*PathContains"):
            refx.get_partition(partition, filter)
