"""Labels, grids and scores of the token tasks against a second computation, a published list or a case by hand."""

from __future__ import annotations

import math
import random
from itertools import permutations
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TokenSolver

from zoo.evals import mad, mqar, state_tracking
from zoo.evals.core import labelled, mad_rows, requests
from zoo.evals.core.auto_encoder import AutoEncoder, places
from zoo.evals.core.records import Record


def test_a_key_of_two_tokens_needs_both() -> None:
    ids, labels = mqar.row(90, 9, 0, 0, vocab_size=64, form="compositional")
    listed_ = [tuple(ids[i : i + 3]) for i in range(0, 27, 3)]
    first, second, values = (len({entry[i] for entry in listed_}) for i in range(3))
    assert (first, second, values) == (3, 3, 9) and len({entry[:2] for entry in listed_}) == 9
    asked = {tuple(ids[p - 1 : p + 1]): label for p, label in enumerate(labels) if label >= 0}
    assert asked == {entry[:2]: entry[2] for entry in listed_}


def test_half_of_the_keys_are_forgotten() -> None:
    for i in range(20):
        ids, labels = mqar.row(64, 8, i, 0, vocab_size=18, form="forgetting")
        first, again = (dict(zip(part[::2], part[1::2], strict=True)) for part in (ids[:16], ids[16:24]))
        assert len(first) == 8 and len(again) == 4 and all(first[key] != value for key, value in again.items())
        asked = {ids[p]: label for p, label in enumerate(labels) if label >= 0}
        assert asked == first | again


def test_grids_are_the_published_ones() -> None:
    zoology = [(64, 4), (128, 8), (256, 16), (512, 64)]
    based = [(64, 4), (64, 8), (64, 16), (128, 32), (256, 64), (512, 128), (1024, 256)]
    trained = [(64, 4), (128, 8), (256, 16), (256, 32), (256, 64)]
    model = TokenSolver(lambda ids, hidden: 0, 9000)
    for name, grid, noise in ((None, zoology, False), ("based", based, True), ("based-train", trained, True)):
        with requests.counting() as asked:
            result = mqar.evaluate(model, grid=name, samples=1)
        assert [(row.at["length"], row.at["pairs"]) for row in result.rows] == grid
        assert [(len(r.ids), len(r.positions)) for r in asked] == grid  # type: ignore[attr-defined]
        assert (result.options["noise"], result.options["vocab_size"]) == (noise, 8192)
        for request, (_, pairs) in zip(asked, grid, strict=True):
            assert all(
                1 <= key < 4096 <= value for key, value in zip(*[iter(request.ids[: 2 * pairs])] * 2, strict=True)
            )
            assert (request.ids[2 * pairs + 1 :: 2].count(0) < 3) == noise  # between queries stands filler


def test_slots_are_drawn_as_by_numpy() -> None:
    """Zoology draws with `numpy.random.choice(replace=False, p=...)`; a draw here has the same distribution."""
    slots, n = 28, 2500
    weights = np.arange(1, slots + 1) ** (0.01 - 1)
    rng = np.random.default_rng(0)
    theirs = np.array([rng.choice(slots, 4, replace=False, p=weights / weights.sum()) for _ in range(n)])
    ours = np.array([mqar._slots(random.Random(i), slots, 4, 0.01) for i in range(n)])
    for place in range(4):  # in the order in which they are drawn, since key i gets the i-th
        a, b = (np.bincount(drawn[:, place], minlength=slots) for drawn in (theirs, ours))
        assert ((a - b) ** 2 / (a + b)).sum() < 55.5  # chi-square of 27 degrees of freedom, 0.1%


def test_states_are_where_the_things_have_moved() -> None:
    for i in range(10):
        bits, states = state_tracking.row("parity", 50, i, 0)
        assert states == [sum(bits[: t + 1]) % 2 for t in range(50)]
        tokens, states = state_tracking.row("s5", 50, i, 0)
        named = list(permutations(range(5)))
        places = list(range(5))
        for token, state in zip(tokens, states, strict=True):
            places = [named[token][place] for place in places]
            assert named[state] == tuple(places)


def test_macro_accuracy_of_a_case_worked_by_hand() -> None:
    # 1: two of three, 2: one of two, 3: one of one, 0: predicted and never right, 4: neither
    found = [Record("0", {}, output=[1, 1, 0], answers=[1, 1, 1]), Record("1", {}, output=[2, 1, 3], answers=[2, 2, 3])]
    row = labelled.macro_accuracy(found, {"task": "x"})
    assert row.value == pytest.approx((2 / 3 + 1 / 2 + 1 + 0) / 4) and row.n == 2
    # a resample has both rows, or (a quarter each) one of them twice: 1/3 and 1/2 then
    known = [(0.25, (2 / 3 + 0) / 2), (0.5, row.value), (0.25, (1 / 2 + 0 + 1) / 3)]
    mean = sum(p * value for p, value in known)
    error = math.sqrt(sum(p * (value - mean) ** 2 for p, value in known))
    assert (
        row.stderr == pytest.approx(error, rel=0.1) and row.ci95 is not None and row.ci95[0] < row.value < row.ci95[1]
    )


class Reader(TokenSolver):
    """Reads a row back, as an auto-encoder does, as far as its window reaches."""

    reads_rows_back = True

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> Any:
        ids = input_ids if self.window is None else input_ids.clone()
        ids[:, : ids.shape[1] - (self.window or ids.shape[1])] = self.config.vocab_size - 1
        return SimpleNamespace(logits=torch.nn.functional.one_hot(ids, self.config.vocab_size).float())


def test_compression_is_read_back_from_one_state(llama: Any) -> None:
    for window, share in ((None, 1.0), (11, 10 / 31)):  # one of the last eleven only says that the row ends
        result = mad.evaluate(Reader(lambda ids, hidden: 0, 17, window), samples=6)
        assert result.value("accuracy", task="compression") == pytest.approx(share)
    result = mad.evaluate(AutoEncoder(llama), samples=40)
    n, p = 40 * 31, 1 / 258  # random weights
    assert abs(result.value("accuracy") * n - n * p) < 2.6 * math.sqrt(n * p) + 0.5
    model = AutoEncoder(llama).eval()
    with torch.no_grad():
        first, second = torch.randint(0, 250, (2, 1, 9))
        state = llama.base_model(torch.cat([first, second], 1)).last_hidden_state
        assert not torch.equal(model(first).logits[:, 0], model(first).logits[:, 1])  # it knows the place
        joined = model(torch.cat([first, second], 1)).logits
        alone = model.decoder(state[:, -1:] + places(18, state))
    torch.testing.assert_close(joined, alone)


def test_the_memory_is_the_same_in_every_process() -> None:
    assert mad_rows.memory(16) == (12, 14, 13, 8, 10, 11, 9)
