"""A few hundred random programs in the suite; `python -m tests.laws` runs any number."""

import pytest

from tests.laws.machine import LAWS, run_one

# The number of programs of each law. Programs that compile nothing are a thousand times cheaper.
COUNTS = {1: 150, 2: 150, 3: 30, 4: 20, 5: 30, 6: 30, 7: 20, 8: 12, 9: 30}
PART = 10


@pytest.mark.parametrize(
    ("law", "first"),
    [(law, first) for law in LAWS for first in range(0, COUNTS[law], PART)],
)
def test_law(law, first):
    for seed in range(first, min(first + PART, COUNTS[law])):
        found = run_one(law, seed, seconds=5)
        assert not found.wrong, (
            f"law {law}, seed {seed}: {found.kind}\n{found.program}\n--- {found.detail}"
        )
