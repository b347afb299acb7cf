"""Names of other libraries lead to ours."""

import re

import pytest

import nnx
from nnx._hints import NNX


@pytest.mark.parametrize("name", NNX)
def test_a_name_from_elsewhere_says_what_to_use(name):
    with pytest.raises(
        AttributeError, match=f"^module 'nnx' has no attribute '{name}'; use "
    ) as info:
        getattr(nnx, name)
    assert NNX[name] in str(info.value)
    for path in re.findall(r"nnx\.([\w.]*\w)", NNX[name]):
        found = nnx
        for part in path.split("."):
            found = getattr(found, part)


def test_other_names_are_missing_as_ever():
    with pytest.raises(AttributeError, match=r"^module 'nnx' has no attribute 'Linaer'$") as info:
        nnx.Linaer  # noqa: B018
    assert (info.value.name, info.value.obj) == ("Linaer", nnx)
    assert not hasattr(nnx, "no_such_thing")
    with pytest.raises(ImportError, match="cannot import name 'Param'"):
        from nnx import Param  # noqa: F401
