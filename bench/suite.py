"""The measurements, on pytest-benchmark: ``pytest bench/suite.py``, a row a benchmark.

``python -m bench run`` starts each case here in a process of its own. Run by hand, pytest-benchmark's own options and
tables apply; memory then is that of a process which has run other cases before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from .measure import Calls, seconds_of
from .plans import cpu_plan
from .store import json_safe
from .worker import Case, row

# Inputs are made once for the variants of a case.
_kept: dict[tuple, Any] = {}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    texts = metafunc.config.getoption("--case")
    cases = [Case.from_json(text) for text in texts] if texts else cpu_plan()
    params = [(case, variant) for case in cases for variant in case.variants]
    ids = [f"{case.shape.name}-{case.implementation}-{variant}".replace(" ", "_") for case, variant in params]
    metafunc.parametrize(("case", "variant"), params, ids=ids)


def test_step(case: Case, variant, benchmark, sink: Callable[[dict], None]) -> None:
    """Forward and backward; the floor and the other calls take turns with it, timed in its set-up."""

    def sampler(calls: Calls, rounds: int, before: Callable[[], None]) -> dict[str, list[float]]:
        others = {name: call for name, call in calls.items() if name != "step"}
        samples: dict[str, list[float]] = {name: [] for name in others}

        def setup() -> None:
            for name, call in others.items():
                before()
                samples[name].append(seconds_of(call))
            before()

        benchmark.pedantic(calls["step"], setup=setup, rounds=rounds, iterations=1)
        return samples | {"step": list(benchmark.stats.stats.data)}

    if (reason := case.missing()) is not None:
        sink(case.row(variant, status="missing", reason=reason))
        pytest.skip(reason)
    key = (case.shape, case.implementation, variant.teacher)
    found, inputs = row(case, variant, sampler, _kept.get(key))
    _kept.clear()
    _kept[key] = inputs
    sink(found)
    benchmark.extra_info.update(json_safe(found))
    if found["status"] != "ok":
        pytest.skip(f"{found['status']}: {found['reason']}")
