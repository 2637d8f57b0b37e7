"""State bytes are those of the real cache; speeds and peaks are measured on both models."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from zoo.errors import ZooError
from zoo.evals import efficiency
from zoo.evals.core import memory


def cache_bytes(model: Any, length: int) -> int:
    with torch.no_grad():
        cache = model(torch.randint(258, (1, length)), use_cache=True).past_key_values
    return sum(part.numel() * part.element_size() for layer in cache.layers for part in (layer.keys, layer.values))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [1, 100])
def test_state_bytes_equal_the_cache_of_a_llama(make_llama: Any, dtype: torch.dtype, length: int) -> None:
    model = make_llama(head_dim=12).to(dtype)
    assert memory.state_bytes(model, length) == cache_bytes(model, length)


@pytest.mark.parametrize("length", [5, 15, 16, 40])
def test_state_bytes_equal_the_cache_of_a_sliding_window(length: int) -> None:
    config = MistralConfig(
        vocab_size=258, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=16,
    )  # fmt: skip
    model = MistralForCausalLM(config).eval()
    assert memory.state_bytes(model, length) == cache_bytes(model, length)


def test_a_model_may_account_for_itself(llama: Any) -> None:
    model = SimpleNamespace(state_bytes=lambda length: 7 * length)
    assert memory.state_bytes(model, 3) == 21
    with pytest.raises(ZooError, match="mamba"):
        memory.kv_cache_bytes(SimpleNamespace(model_type="mamba"), 3, 2)
    odd = SimpleNamespace(**{**llama.config.to_dict(), "layer_types": ["linear_attention"] * 2})
    with pytest.raises(ZooError, match="linear_attention"):
        memory.kv_cache_bytes(odd, 3, 2)


def test_both_models_are_measured(llama: Any, make_llama: Any) -> None:
    small = make_llama(num_hidden_layers=1)
    result = efficiency.evaluate(small, teacher=llama, lengths=[64, 128], repeats=3, new_tokens=4)
    for of in ({}, {"of": "teacher"}):
        for length in (64, 128):
            for kind in ("prefill", "decode"):
                row = next(
                    r
                    for r in result.select(f"{kind}_tokens_per_second", length=length)
                    if dict(r.at) == {"length": length, **of}
                )
                assert row.value > 0 and row.n == 3
    ours, theirs = (result.series[f"state_bytes/{of}"]["y"] for of in ("model", "teacher"))
    assert [2 * value for value in ours] == theirs
    assert result.value("state_bytes", length=1048576, of="teacher") == theirs[-1] == 2 * 2 * 2 * 8 * 4 * 1048576


def test_warm_up_does_not_count_and_the_median_does(monkeypatch: Any, llama: Any) -> None:
    times = iter([(9.0, 9.0)] * 3 + [(1.0, 0.5), (2.0, 1.0), (50.0, 50.0)])
    monkeypatch.setattr(efficiency, "_run", lambda *_: next(times))
    result = efficiency.evaluate(llama, lengths=[100], repeats=3, new_tokens=10)
    assert result.value("prefill_tokens_per_second") == 100 / 2.0
    assert result.value("decode_tokens_per_second") == 10 / 1.0


def test_peak_counts_what_a_run_allocates() -> None:
    size = 64 * 2**20
    peak = memory.peak_bytes(torch.device("cpu"), lambda: torch.ones(size // 4).sum())
    assert size * 0.9 < peak < size * 2


def test_bad_input_is_one_line(llama: Any) -> None:
    with pytest.raises(ZooError, match="beyond the model's 2048"):
        efficiency.evaluate(llama, lengths=[4096])
    with pytest.raises(ZooError, match="repeats was 0"):
        efficiency.evaluate(llama, lengths=[64], repeats=0)
