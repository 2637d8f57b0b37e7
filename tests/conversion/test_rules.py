"""Rules are reversible, and place every tensor exactly once."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from zoo.architectures.core.operations import OPERATIONS, Operation, initial, tensor_seed
from zoo.architectures.core.plan import Init
from zoo.architectures.core.rules import (
    Rule,
    add,
    alias,
    chain,
    concat,
    drop,
    interleave,
    inverse,
    rename,
    split,
    stack,
    steps,
    transpose,
    unweave,
    within,
)
from zoo.errors import ZooError


def run(rules: Sequence[Rule], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    made = steps(rules, tensors)
    result = {name: step.run(tensors.__getitem__) for name, step in made.items()}
    for name, tensor in result.items():
        assert (made[name].shape, made[name].dtype) == (tuple(tensor.shape), tensor.dtype), "planned without reading"
    return result


def assert_reversible(rules: Sequence[Rule], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    there = run(rules, tensors)
    back = run(inverse(rules), there)
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)
    return there


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    dim=st.integers(0, 1),
    dtype=st.sampled_from(["half", "float"]),
)
def test_split_and_concat_undo_each_other(sizes: list[int], dim: int, dtype: str) -> None:
    shape = [3, 3]
    shape[dim] = sum(sizes)
    whole = torch.randn(shape).to(getattr(torch, dtype))
    names = [f"p{i}" for i in range(len(sizes))]
    parts = assert_reversible([split("x", names, sizes, dim)], {"x": whole})
    assert [part.shape[dim] for part in parts.values()] == sizes
    joined = assert_reversible([concat(names, "y", sizes, dim)], parts)
    assert torch.equal(joined["y"], whole)


def test_equal_parts() -> None:
    parts = assert_reversible([split("x", ["a", "b", "c"])], {"x": torch.arange(12.0).view(6, 2)})
    assert parts["b"].tolist() == [[4, 5], [6, 7]]


def test_transpose_and_add_and_drop() -> None:
    x = torch.randn(2, 3, 4)
    assert assert_reversible([transpose("x", "y", (2, 0, 1))], {"x": x})["y"].shape == (4, 2, 3)
    ints = torch.arange(4.0)  # exact in fp32
    assert assert_reversible([add("x", "y", 1.0)], {"x": ints})["y"].tolist() == [1, 2, 3, 4]
    assert run([rename("x", "y"), drop("b.{i}")], {"x": x, "b.3": x}).keys() == {"y"}


def test_interleave_moves_rotary_pairs_together() -> None:
    rows = torch.arange(8.0).view(8, 1)  # two heads of 4
    halves = assert_reversible([interleave("x", "y", head_dim=4, to="half")], {"x": rows})["y"]
    assert halves.flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]  # pair (2i, 2i + 1) becomes (i, i + d/2)


def test_stack_of_experts_by_layer() -> None:
    tensors = {f"l.{i}.e.{e}.w": torch.randn(2, 3) for i in range(2) for e in range(3)}
    stacked = assert_reversible([stack("l.{i}.e.{e}.w", "l.{i}.w", 3)], tensors)
    assert stacked["l.1.w"].shape == (3, 2, 3)
    assert torch.equal(stacked["l.1.w"][2], tensors["l.1.e.2.w"])


def test_numbers_are_matched_whole_and_names_literally() -> None:
    made = run([rename("m.{i}.w", "n.{i}.w")], {"m.0.w": torch.ones(1), "m.12.w": torch.zeros(1)})
    assert made.keys() == {"n.0.w", "n.12.w"}
    with pytest.raises(ZooError, match="unexpected"):
        steps([rename("m.{i}.w", "n.{i}.w")], {"mx0.w": torch.ones(1)})


@pytest.mark.parametrize(
    ("rules", "names", "word"),
    [
        ([rename("a", "b")], ["a", "c"], "unexpected"),
        ([concat(["a", "c"], "b")], ["a"], "missing"),
        ([rename("a", "b"), rename("c", "b")], ["a", "c"], "both become"),
        ([rename("a", "b"), rename("a", "c")], ["a"], "two rules"),
        ([split("a", ["b", "c"], [9, 9])], ["a"], "does not fit"),
    ],
)
def test_a_tensor_without_one_place_is_an_error(rules: list[Rule], names: list[str], word: str) -> None:
    with pytest.raises(ZooError, match=word):
        steps(rules, {name: torch.ones(4) for name in names})


def test_expand_heads_gives_query_head_h_the_kv_head_h_over_group() -> None:
    kv = torch.arange(3.0)[:, None].repeat(1, 2).reshape(6, 1)  # KV heads 0, 1, 2 of head_dim 2
    expanded = Operation("expand_heads", {"group": 2, "head_dim": 2})([kv])
    assert expanded.view(6, 2)[:, 0].tolist() == [0, 0, 1, 1, 2, 2]
    chosen = Operation("select_heads", {"heads": (4, 0), "head_dim": 2})([expanded])
    assert chosen.view(2, 2)[:, 0].tolist() == [2, 0]
    columns = Operation("select_heads", {"heads": (4, 0), "head_dim": 2, "dim": 1})([expanded.T])
    assert torch.equal(columns, chosen.T)


def test_inits_depend_on_the_name_and_the_seed_alone() -> None:
    init = Init(target="w", shape=(4, 5), kind="normal", options={"std": 2.0})
    first = initial(init, "layers.0.w", 0)
    torch.randn(10)
    assert torch.equal(first, initial(init, "layers.0.w", 0))
    assert not torch.equal(first, initial(init, "layers.1.w", 0))
    assert not torch.equal(first, initial(init, "layers.0.w", 1))
    assert tensor_seed("w", 0) != tensor_seed("w", 1)


def test_init_kinds() -> None:
    def make(kind: str, shape: tuple[int, ...] = (3, 4), **options: object) -> Tensor:
        return initial(Init(target="w", shape=shape, kind=kind, options=options), "w", 0)

    assert make("identity_conv").tolist() == [[0, 0, 0, 1]] * 3
    assert make("constant", value=2.5).unique().tolist() == [2.5]
    assert make("linspace", (3,), low=0.0, high=1.0).tolist() == [0, 0.5, 1]
    assert make("values", (2, 2), values=[1, 2, 3, 4]).tolist() == [[1, 2], [3, 4]]
    drawn = make("log_uniform", (4000,), low=0.01, high=1.0).log()
    assert abs(drawn.mean() - math.log(0.1)) < 0.1 and drawn.min() >= math.log(0.01) and drawn.max() <= 0
    with pytest.raises(ZooError, match="linspace"):
        make("unknown")


def test_unknown_operations_are_refused() -> None:
    with pytest.raises(ZooError, match=next(iter(OPERATIONS))):
        Operation("rotate")


def test_gates_and_ups_of_experts_in_one_tensor() -> None:
    tensors = {f"l.{i}.e.{e}.{n}": torch.randn(2, 3) for i in range(2) for e in range(3) for n in ("gate", "up")}
    fused = assert_reversible([stack(["l.{i}.e.{e}.gate", "l.{i}.e.{e}.up"], "l.{i}.w", 3)], tensors)
    assert fused["l.1.w"].shape == (3, 4, 3)
    for e in range(3):
        assert torch.equal(fused["l.1.w"][e], torch.cat([tensors[f"l.1.e.{e}.gate"], tensors[f"l.1.e.{e}.up"]]))
    with pytest.raises(ZooError, match=r"l\.0\.e\.2\.up.*missing"):
        run(
            [stack(["l.{i}.e.{e}.gate", "l.{i}.e.{e}.up"], "l.{i}.w", 3)],
            {k: v for k, v in tensors.items() if k != "l.0.e.2.up"},
        )


def test_a_chain_of_rules_is_one_rule() -> None:
    fused = torch.randn(2, 3, 8)  # [experts, inputs, gates and ups in turn]
    ours = assert_reversible(
        [chain(transpose("x", "x", (0, 2, 1)), interleave("x", "y", head_dim=8, dim=1))], {"x": fused}
    )
    assert torch.equal(ours["y"][:, :4], fused[..., ::2].transpose(1, 2))
    assert torch.equal(ours["y"][:, 4:], fused[..., 1::2].transpose(1, 2))


def test_rows_sorted_by_group_become_tensors_of_their_own() -> None:
    fused = torch.arange(18.0)[:, None]  # three groups of one row of a, two of b and three of c
    ours = assert_reversible([unweave("w", ["a", "b", "c"], (1, 2, 3), groups=3)], {"w": fused})
    assert ours["a"][:, 0].tolist() == [0, 6, 12]
    assert ours["b"][:, 0].tolist() == [1, 2, 7, 8, 13, 14]


def test_a_name_may_mean_another_thing_in_another_layer() -> None:
    tensors = {"layers.0.norm": torch.zeros(2), "layers.1.norm": torch.ones(2)}
    rules = [
        *within([0], [rename("layers.{i}.norm", "layers.{i}.before")]),
        *within([1], [rename("layers.{i}.norm", "layers.{i}.after")]),
    ]
    ours = assert_reversible(rules, tensors)
    assert set(ours) == {"layers.0.before", "layers.1.after"}
    with pytest.raises(ZooError, match=r"layers\.2\.norm"):
        run(rules, {"layers.2.norm": torch.zeros(2)})


def test_an_alias_is_read_and_never_written() -> None:
    rules = [rename("new", "ours"), alias(rename("old", "ours"))]
    assert set(run(rules, {"old": torch.ones(2)})) == {"ours"}
    assert set(run(inverse(rules), {"ours": torch.ones(2)})) == {"new"}


def test_any_text_is_dropped_by_one_rule() -> None:
    rules = [rename("w", "w"), drop("vision.{any}")]
    tensors = {"w": torch.ones(2), "vision.a": torch.ones(1), "vision.layers.3.b": torch.ones(1)}
    assert set(run(rules, tensors)) == {"w"}
    with pytest.raises(ZooError, match="visionary"):
        run(rules, {**tensors, "visionary.a": torch.ones(1)})
