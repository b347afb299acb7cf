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
def test_what_is_no_filter_is_an_error(bad):
    with pytest.raises(refx.FilterError, match=r"is not a filter.*write a tuple"):
        to_predicate(bad)


def test_a_class_is_no_filter():
    with pytest.raises(refx.FilterError, match=r"int is a class.*OfType\(int\)"):
        to_predicate(int)
    with pytest.raises(refx.FilterError, match="one component of a path"):
        PathContains(3)


def test_combinators_compare_and_print():
    assert All("a", Not("b")) == All("a", Not("b")) != Any("a", Not("b"))
    assert hash(PathContains("x")) == hash(PathContains("x"))
    assert repr(All("a", Not(OfType(int)))) == "All('a', Not(OfType(int)))"


def test_a_dotted_part_is_consecutive_or_one_key():
    path = ("net", "blocks", "0", "kernel")
    assert PathContains("blocks.0")(path, None) and PathContains("net.*.0")(path, None)
    assert not PathContains("blocks.kernel")(path, None)
    assert PathContains("a.b")(("a.b", "w"), None)
