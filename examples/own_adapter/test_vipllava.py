"""Every promise of the adapter, tried on a tiny model of the family: `pytest test_vipllava.py`."""

import pytest

from pivot_plugin.testing import Check, conformance, zoo


@pytest.mark.parametrize("check", conformance(*zoo.build("vipllava")), ids=str)
def test_vipllava(check: Check) -> None:
    check.raise_on_failure()
