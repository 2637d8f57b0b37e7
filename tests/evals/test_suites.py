"""Suites name registered tasks with options that these have."""

from __future__ import annotations

import inspect

import pytest

from zoo import registry
from zoo.evals.core.suites import SUITES, split


@pytest.mark.parametrize("name", SUITES)
def test_every_suite_runs(name: str) -> None:
    for task, options in SUITES[name].items():
        takes = inspect.signature(registry.load("evals", task).evaluate).parameters
        assert set(options) <= set(takes), task


def test_what_lacks_its_needs_is_left_out() -> None:
    ready, lacks = split({"needle": {}, "fidelity": {}, "key_value": {}}, {"data"})
    assert set(ready) == {"needle", "key_value"} and lacks == {"fidelity": "teacher"}
