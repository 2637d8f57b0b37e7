"""Parametrises tests over the registries.

A test asks for `case` (any model of `zoo_models`), `mixer` (a registered name) or `preset` ("architecture/preset").
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from zoo import registry
from zoo.architectures.core.modeling import ZooForCausalLM

sys.path.insert(0, str(Path(__file__).parent))  # zoo_models, which pytest's importlib mode does not find by itself

from zoo_models import CASES, make, presets


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for name, values in (
        ("case", CASES),
        ("mixer", registry.names("mixers")),
        ("preset", presets()),
    ):
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, values)


@pytest.fixture
def model(case: str) -> ZooForCausalLM:
    """The case's model with stirred weights, in fp32 and eval mode."""
    return make(case)
