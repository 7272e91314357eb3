"""What a benchmark reads off the choices that only a GPU can settle."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from fused_kd.tuning import AFFECTS, Alternative, alternatives


@dataclass(frozen=True)
class Example:
    fast: bool = field(default=True, metadata={"others": (False,), "affects": ("row", "step")})
    tile: int = field(default=128, metadata={"others": (64, 256), "affects": ("row",)})


def test_alternatives_are_the_other_values_of_the_fields_concerned():
    assert alternatives("step", Example) == [Alternative("fast", True, False)]
    assert [found.value for found in alternatives("row", Example)] == [False, 64, 256]


def test_the_library_s_own_fields_can_be_compared():
    for affects in AFFECTS:
        assert alternatives(affects)


@pytest.mark.parametrize(
    "metadata",
    [{}, {"others": (False,)}, {"others": (True,), "affects": ("row",)}, {"others": (False,), "affects": ("rows",)}],
)
def test_a_field_without_alternatives_or_with_unknown_effects_is_an_error(metadata):
    @dataclass(frozen=True)
    class Wrong:
        choice: bool = field(default=True, metadata=metadata)

    with pytest.raises(ValueError, match=r"Wrong\.choice"):
        alternatives("row", Wrong)


def test_unknown_effects_are_an_error():
    with pytest.raises(ValueError, match="affects"):
        alternatives("rows")
