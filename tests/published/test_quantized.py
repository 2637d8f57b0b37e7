"""Quantised checkpoints against transformers' own expansions, whole and tensor by tensor."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import assert_near, ids_of, logits, make_reference
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GptOssForCausalLM, Mxfp4Config
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import zoo
from zoo.architectures.core.checkpoint import Checkpoint
from zoo.architectures.core.quantized import expand_fp8, expand_mxfp4
from zoo.errors import ZooError

GPT_OSS: dict[str, Any] = dict(
    model_type="gpt_oss",
    vocab_size=101,
    hidden_size=64,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    sliding_window=9,
    num_local_experts=4,
    num_experts_per_tok=2,
    max_position_embeddings=256,
)
LLAMA: dict[str, Any] = dict(
    model_type="llama",
    vocab_size=101,
    hidden_size=64,
    intermediate_size=80,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
)
BLOCK = (16, 24)  # neither divides the sizes above
VALUES = (0.0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6)  # of E2M1


def random_mxfp4(experts: int, rows: int, columns: int, low: int = 119, high: int = 123) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(experts * rows + columns)
    blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), generator=generator, dtype=torch.uint8)
    return blocks, torch.randint(low, high, blocks.shape[:3], generator=generator, dtype=torch.uint8)


def rewrite(folder: Path, tensors: dict[str, Tensor], quantization: dict[str, Any]) -> Path:
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    return folder


def mxfp4_checkpoint(folder: Path) -> Path:
    make_reference(GPT_OSS).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = random_mxfp4(experts, outputs, inputs)
    return rewrite(folder, tensors, {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]})


def fp8_of(weight: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """`weight` in FP8, and its factors by blocks."""
    grid = [
        torch.stack([block.abs().max() / 448 for block in part.split(columns, 1)]) for part in weight.split(rows, 0)
    ]
    scales = torch.stack(grid)
    spread = scales.repeat_interleave(rows, 0)[: weight.shape[0]].repeat_interleave(columns, 1)[:, : weight.shape[1]]
    return (weight / spread).to(torch.float8_e4m3fn), scales


def fp8_checkpoint(
    folder: Path, per_tensor: bool = False, block: tuple[int, int] = BLOCK
) -> tuple[Path, dict[str, Tensor]]:
    """A Llama in FP8, and what its weights are when expanded."""
    make_reference(LLAMA).save_pretrained(folder)
    tensors, expanded = load_file(folder / "model.safetensors"), {}
    for name in [name for name in tensors if "_proj" in name]:
        weight = tensors[name]
        low, scales = fp8_of(weight, *(weight.shape if per_tensor else block))
        spread = scales.repeat_interleave(block[0], 0)[: weight.shape[0]]
        spread = scales if per_tensor else spread.repeat_interleave(block[1], 1)[:, : weight.shape[1]]
        tensors[name], expanded[name] = low, low.float() * spread
        tensors[f"{name}_scale" if per_tensor else f"{name}_scale_inv"] = scales[0, 0] if per_tensor else scales
        if per_tensor:
            tensors[name.replace("weight", "input_scale")] = torch.tensor(0.5)
    quantization = {"quant_method": "fp8", "weight_block_size": None if per_tensor else list(block)}
    return rewrite(folder, tensors, quantization), expanded


@pytest.mark.parametrize(("low", "high"), [(119, 123), (0, 255)])
def test_mxfp4_expands_as_in_transformers(low: int, high: int) -> None:
    blocks, scales = random_mxfp4(3, 10, 96, low, high)
    found = expand_mxfp4(blocks, scales, torch.bfloat16)
    expected = convert_moe_packed_tensors(blocks, scales)
    assert found.shape == (3, 96, 10) and torch.equal(found, expected)
    pair, power = int(blocks[0, 0, 0, 0]), 2.0 ** (int(scales[0, 0, 0]) - 127)
    assert found[0, :2, 0].tolist() == [VALUES[pair & 15] * power, VALUES[pair >> 4] * power], "the low half is first"


def test_a_model_in_mxfp4_is_transformers_model(tmp_path: Path) -> None:
    folder = mxfp4_checkpoint(tmp_path / "mxfp4")
    theirs = GptOssForCausalLM.from_pretrained(
        folder, attn_implementation="eager", quantization_config=Mxfp4Config(dequantize=True)
    ).float()
    ours = zoo.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    ids = ids_of(theirs, 60)
    assert_near(logits(ours, ids), logits(theirs, ids), 2e-5, "MXFP4")
    assert not hasattr(ours.config, "quantization_config")
    zoo.save(ours, tmp_path / "back", format="published")
    again = GptOssForCausalLM.from_pretrained(tmp_path / "back", attn_implementation="eager")
    assert_near(logits(again, ids), logits(theirs, ids), 2e-5, "saved expanded")


def test_fp8_expands_as_in_transformers() -> None:
    weight = torch.randn(3, 64, 96).to(torch.float8_e4m3fn)
    scales = torch.rand(3, 4, 3) + 0.5
    expected = Fp8Dequantize(None)._dequantize_one(weight, scales, torch.bfloat16)
    assert torch.equal(expand_fp8(weight, scales, (16, 32), torch.bfloat16), expected)
    one = Fp8Dequantize(None)._dequantize_one(weight, scales[0, :1, :1], torch.bfloat16)
    assert torch.equal(expand_fp8(weight, scales[0, 0, 0], None, torch.bfloat16), one)


@pytest.mark.parametrize("per_tensor", [False, True])
def test_a_model_in_fp8_is_the_expanded_model(tmp_path: Path, per_tensor: bool) -> None:
    folder, expanded = fp8_checkpoint(tmp_path / "fp8", per_tensor)
    reference = make_reference(LLAMA)
    reference.load_state_dict(expanded, strict=False)
    ours = zoo.from_pretrained(folder, attn_implementation="eager")
    assert ours.dtype == torch.float32
    ids = ids_of(reference, 40)
    assert_near(logits(ours, ids), logits(reference, ids), 2e-5, "FP8")


def test_conversion_reads_quantised_checkpoints(tmp_path: Path) -> None:
    folder, expanded = fp8_checkpoint(tmp_path / "fp8", block=(8, 16))  # transformers, the teacher, wants whole blocks
    zoo.tokenizer("books-llama-4m").save_pretrained(folder)
    report = zoo.convert(folder, tmp_path / "out", mixer="gla", keep=[0], fresh_process=False)
    assert report.ok, report.checks
    found = load_file(tmp_path / "out" / "model.safetensors")
    for ours, theirs in (("0.channel", "0.mlp"), ("1.channel", "1.mlp")):
        name = "model.layers.{}.up_proj.weight"
        assert torch.equal(found[name.format(ours)], expanded[name.format(theirs)])


def test_no_expanded_tensor_is_kept(tmp_path: Path) -> None:
    folder, _ = fp8_checkpoint(tmp_path / "fp8")
    checkpoint = Checkpoint(folder)
    name = "model.layers.0.mlp.up_proj.weight"
    assert checkpoint.tensors[name].dtype == torch.float32 and not any("scale" in name for name in checkpoint.tensors)
    tensor = checkpoint.get(name)
    seen = weakref.ref(tensor)
    del tensor
    assert seen() is None


def lose_scale(tensors: dict[str, Tensor]) -> None:
    del tensors["model.layers.0.mlp.up_proj.weight_scale_inv"]


def cut_scale(tensors: dict[str, Tensor]) -> None:
    name = "model.layers.0.mlp.up_proj.weight_scale_inv"
    tensors[name] = tensors[name][:-1].contiguous()


@pytest.mark.parametrize(
    ("change", "quantization", "words"),
    [
        (None, {"quant_method": "gptq"}, "'gptq'.*mxfp4, fp8"),
        (lose_scale, {"quant_method": "fp8"}, "up_proj.weight' in FP8 has 0 scales"),
        (cut_scale, {"quant_method": "fp8", "weight_block_size": [16, 24]}, "up_proj.weight' of shape"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(
    tmp_path: Path, change: Any, quantization: dict[str, Any], words: str
) -> None:
    folder, _ = fp8_checkpoint(tmp_path / "fp8")
    tensors = load_file(folder / "model.safetensors")
    if change is not None:
        change(tensors)
    rewrite(folder, tensors, quantization)
    with pytest.raises(ZooError, match=words) as caught:
        zoo.from_pretrained(folder)
    assert str(folder) in str(caught.value)
