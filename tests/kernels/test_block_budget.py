"""Budgets of blocks, and what the choice of blocks refuses."""

from __future__ import annotations

import math

import pytest
import torch
from select_calls import inputs

from zoo.kernels.block_sparse_attention.budget import BudgetSchedule
from zoo.kernels.block_sparse_attention.select import select_blocks


def test_budgets():
    n, weights = torch.tensor([0, 1, 7, 100]), torch.ones(4, 100)
    assert BudgetSchedule(fixed=5).counts(n, weights).tolist() == [0, 1, 5, 5]
    assert BudgetSchedule(fraction=0.1, least=2).counts(n, weights).tolist() == [0, 1, 2, 10]
    assert BudgetSchedule(alpha=2.0, exponent=0.5, most=12).counts(n, weights).tolist() == [0, 1, 6, 12]
    mass = torch.tensor([[0.5, 0.25, 0.25, 0.0]])
    found = [int(BudgetSchedule(mass=x).counts(torch.tensor([4]), mass)) for x in (0.4, 0.5, 0.6, 0.75, 1.0)]
    assert found == [1, 1, 2, 2, 3]
    assert BudgetSchedule(fraction=0.1).width(95) == 10 and BudgetSchedule(mass=0.5, most=3).width(95) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "it must have one of"),
        ({"fixed": 1, "mass": 0.5}, "budget has fixed, mass"),
        ({"fixed": 0}, "fixed is 0"),
        ({"fixed": 1.5}, "fixed is 1.5"),
        ({"fraction": 0.0}, "fraction is 0.0"),
        ({"mass": 1.1}, "mass is 1.1"),
        ({"alpha": math.nan}, "alpha is nan"),
        ({"alpha": 1.0, "exponent": 2.0}, "exponent is 2.0"),
        ({"fixed": 1, "least": 3, "most": 2}, "most is 2"),
    ],
    ids=str,
)
def test_bad_budgets_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        BudgetSchedule(**options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budget": "all"}, "budget is 'all'"),
        ({"budget": 0}, "fixed is 0"),
        ({"score": "max"}, "score is 'max'"),
        ({"heads": "all"}, "heads is 'all'"),
        ({"block": 0}, "block is 0"),
        ({"local": -1}, "local is -1"),
        ({"sink": 1.5}, "sink is 1.5"),
        ({"causal": None}, "causal is None"),
        ({"score": "bounds", "scale": -1.0}, "scale is -1.0"),
        ({"score": "antidiagonal", "stride": 3}, "stride is 3; it must divide"),
        ({"q": torch.randn(2, 5, 3, 6).double()}, "q has 3 heads"),
        ({"k": torch.randn(2, 5, 2, 6)}, "k has dtype"),
        ({"starts": torch.zeros(1, dtype=torch.int64)}, "starts has shape"),
        ({"pooled": torch.zeros(2, 1, 2, 7).double()}, "pooled has shape"),
    ],
    ids=lambda x: x if isinstance(x, str) else None,
)
def test_bad_arguments_are_named(change, message):
    arguments = inputs(5) | {"budget": 2, "query_block": 16, "block": 16} | change
    with pytest.raises(ValueError, match=message):
        select_blocks(**arguments)
