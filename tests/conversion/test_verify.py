"""Verification finds the known ways of getting a conversion wrong, each broken here on purpose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from zoo import registry
from zoo.architectures.core import operations
from zoo.architectures.core.plan import AttentionSpec, MixerPlan
from zoo.conversion.core import verify as checks
from zoo.conversion.core.convert import convert
from zoo.conversion.sources import llama
from zoo.errors import ZooError

GatedDeltaNet = registry.get("mixers", "gated_delta_net", "MODULE")
from_attention = GatedDeltaNet.from_attention


def repeat_rows(tensors: Sequence[Tensor], *, group: int, head_dim: int) -> Tensor:
    return tensors[0].repeat_interleave(group, dim=0)


def tile_heads(tensors: Sequence[Tensor], *, group: int, head_dim: int) -> Tensor:
    return torch.cat([tensors[0]] * group)


def half_heads(tensors: Sequence[Tensor], *, group: int, head_dim: int) -> Tensor:
    return tensors[0].unflatten(0, (-1, head_dim // 2)).repeat_interleave(group, dim=0).flatten(0, 1)


def fails(source: Path, out: Path, check: str) -> None:
    with pytest.raises(ZooError, match=f"verification '{check}' failed") as caught:
        convert(source, out, mixer="gated_delta_net", keep=[1], fresh_process=False)
    assert "\n" not in str(caught.value)
    assert not out.exists() and list(out.parent.glob(f".{out.name}*")) == []


def plan_with(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    def changed(spec: AttentionSpec, heads: tuple[int, ...] | None = None) -> MixerPlan:
        return change(from_attention(spec, heads))

    monkeypatch.setattr(GatedDeltaNet, "from_attention", changed)


@pytest.mark.parametrize("wrong", [repeat_rows, tile_heads, half_heads])
def test_a_wrong_head_order_is_found(
    wrong: Any, hard_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(operations.OPERATIONS, "expand_heads", wrong)
    fails(hard_llama, tmp_path / "out", "expansion")


@pytest.mark.parametrize("name", ["q", "k", "v", "o"])
def test_a_bias_dropped_on_the_way_into_the_mixer_is_found(
    name: str, hard_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def drop(plan: MixerPlan) -> MixerPlan:
        rows = tuple(row for row in plan.rows if row.target != f"{name}_proj.bias")
        return replace(plan, args={**plan.args, f"{name}_bias": False}, rows=rows)

    plan_with(monkeypatch, drop)
    fails(hard_llama, tmp_path / "out", "expansion")


def test_a_dropped_qk_norm_is_found(normed_attention: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def drop(plan: MixerPlan) -> MixerPlan:
        rows = tuple(row for row in plan.rows if "_norm" not in row.target)
        return replace(plan, args={**plan.args, "qk_norm": None}, rows=rows)

    plan_with(monkeypatch, drop)
    fails(normed_attention, tmp_path / "out", "expansion")


def test_dropped_rope_is_found(hard_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan_with(monkeypatch, lambda plan: replace(plan, args={**plan.args, "rope": None}))
    fails(hard_llama, tmp_path / "out", "expansion")


def test_a_source_that_reads_the_heads_wrong_is_found(
    make_llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = llama.decoder

    def wrong(config: dict[str, Any]) -> Any:
        # twice the width and half the heads: every shape still fits
        halved = {name: config[name] // 2 for name in ("num_attention_heads", "num_key_value_heads")}
        return right({**config, **halved, "head_dim": 2 * config["head_dim"]})

    monkeypatch.setattr(llama, "decoder", wrong)
    fails(make_llama(), tmp_path / "out", "identity")


def test_a_source_that_drops_biases_or_head_dim_does_not_even_plan(
    hard_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = llama.decoder
    for wrong in ({"attention_bias": False}, {"head_dim": None}):
        monkeypatch.setattr(llama, "decoder", lambda config, wrong=wrong: right({**config, **wrong}))
        with pytest.raises(ZooError, match=r"unexpected|has shape"):
            convert(hard_llama, tmp_path / "out", mixer="gated_delta_net", fresh_process=False)


def test_a_source_with_another_eps_is_found(hard_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = llama.decoder
    monkeypatch.setattr(llama, "decoder", lambda config: right({**config, "rms_norm_eps": 1e-3}))
    fails(hard_llama, tmp_path / "out", "identity")


def test_a_changed_tensor_is_found(hard_llama: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    from zoo.conversion.core.verification import verify

    convert(hard_llama, tmp_path / "out", mixer="gated_delta_net", keep=[1], fresh_process=False)
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    for name in ("model.norm.weight", "model.layers.0.mixer.A_log", "model.layers.2.mixer.k_proj.weight"):
        changed = {**tensors, name: tensors[name] + 1e-3}
        save_file(changed, file)
        found = verify(tmp_path / "out", fresh_process=False)
        assert list(found) == ["tensors"] and not found["tensors"]["passed"] and found["tensors"]["wrong"] == [name]


def test_a_window_one_too_short_is_found(hard_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from zoo.architectures.mixers import attention as module

    real = module.attention
    monkeypatch.setattr(module, "attention", lambda *a, window=None, **k: real(*a, window=window and window - 1, **k))
    with pytest.raises(ZooError, match="verification 'window' failed"):
        convert(hard_llama, tmp_path / "out", mixer="attention(window=8)", fresh_process=False)
    assert not (tmp_path / "out").exists()


def test_a_model_too_large_to_run_is_checked_layer_by_layer(
    hard_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "RUN_LIMIT", 10)
    report = convert(hard_llama, tmp_path / "out", layout="gated_delta_net,attention(window=8),attention")
    assert report.ok and report.checks["expansion"]["passed"] and report.checks["window"]["passed"]
    for name in ("identity", "reload"):
        assert report.checks[name]["passed"] is None and "parameters" in report.checks[name]["reason"]
    monkeypatch.setitem(operations.OPERATIONS, "expand_heads", tile_heads)
    fails(hard_llama, tmp_path / "bad", "expansion")


def test_error_is_infinite_where_numbers_are_not() -> None:
    x = torch.randn(3, 3)
    assert checks.error(x, x) == 0
    assert checks.error(x, torch.full_like(x, float("nan"))) == float("inf")
    assert checks.error(x, torch.zeros_like(x)) > 1
    assert checks.error(torch.zeros(3), torch.ones(3)) > 1
