"""xLSTM: transformers' logits, projections fused or not, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import assert_near, assert_published, ids_of, logits, make_reference, tolerance
from safetensors.torch import load_file, save_file

import zoo
from zoo.architectures import xlstm
from zoo.errors import ZooError

SIZES: dict[str, Any] = dict(model_type="xlstm", vocab_size=101, hidden_size=64, num_hidden_layers=2, num_heads=4)
CONFIGS: dict[str, dict[str, Any]] = {
    "usual": {**SIZES, "embedding_dim": 64, "num_blocks": 2},
    "odd": {
        **SIZES,
        "hidden_size": 60,
        "embedding_dim": 60,
        "num_blocks": 3,
        "num_hidden_layers": 3,
        "num_heads": 3,
        "qk_dim_factor": 0.75,
        "v_dim_factor": 1.3,
        "ffn_proj_factor": 1.9,
        "ffn_round_up_to_multiple_of": 7,
        "gate_soft_cap": 4.0,
        "output_logit_soft_cap": 3.0,
        "norm_eps": 1e-3,
        "chunk_size": 32,
    },
}


@pytest.mark.parametrize("name", CONFIGS)
def test_it_is_transformers(name: str, tmp_path: Path) -> None:
    model = assert_published(CONFIGS[name], tmp_path)
    assert model.config.architecture == "xlstm"
    layers = model.config.decoder_config.layers
    assert [layer.mixer for layer in layers] == ["mlstm"] * CONFIGS[name]["num_blocks"]


def test_fused_projections_are_the_same_model(tmp_path: Path) -> None:
    reference = make_reference(CONFIGS["usual"])
    ids = ids_of(reference)
    expected = logits(reference, ids)
    reference.save_pretrained(tmp_path / "fused")
    weights = load_file(tmp_path / "fused/model.safetensors")
    parts = {
        "mlstm_layer.qkv_opreact.weight": [f"mlstm_layer.{n}.weight" for n in ("q", "k", "v", "ogate_preact")],
        "mlstm_layer.ifgate_preact.weight": [f"mlstm_layer.{n}gate_preact.weight" for n in "if"],
        "mlstm_layer.ifgate_preact.bias": [f"mlstm_layer.{n}gate_preact.bias" for n in "if"],
        "ffn.proj_up_gate_z.weight": ["ffn.proj_up_gate.weight", "ffn.proj_up.weight"],
    }
    for block in (f"backbone.blocks.{index}." for index in range(2)):
        for fused, names in parts.items():
            weights[block + fused] = torch.cat([weights.pop(block + name) for name in names])
    save_file(weights, tmp_path / "fused/model.safetensors", {"format": "pt"})
    file = tmp_path / "fused/config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "weight_mode": "fused"}))
    model = zoo.from_pretrained(tmp_path / "fused")
    assert_near(logits(model, ids), expected, tolerance(reference, ids, expected), "fused")


@pytest.mark.parametrize(
    ("field", "value"),
    [("use_bias", True), ("eps", 1e-5), ("inference_state_dtype", "bfloat16"), ("embedding_dim", 32)],
)
def test_what_we_do_not_compute_is_refused(field: str, value: object) -> None:
    with pytest.raises(ZooError, match=field):
        xlstm.decoder({**CONFIGS["usual"], field: value})


def test_scalar_memory_has_no_published_form() -> None:
    with pytest.raises(ZooError, match="xlstm cannot express"):
        xlstm.published(xlstm.layout(**xlstm.PRESETS["slstm_tiny"]), {})
