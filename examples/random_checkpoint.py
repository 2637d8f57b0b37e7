"""A random Llama of any size in shards, to try conversions on: it costs disk and no download.

    python examples/random_checkpoint.py big --gigabytes 16 --shard 2GB
    zoo convert ./big hybrid --mixer gated_delta_net --keep 0

It is written one tensor at a time, so its size is not limited by memory.
"""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from zoo.architectures.core.shards import Spec, atomic_directory, write_json, write_tensors

WIDTH, HEADS, KV_HEADS, HEAD_DIM, INNER, VOCABULARY = 2048, 32, 8, 64, 5632, 32000


def layer_shapes() -> dict[str, tuple[int, ...]]:
    kv = KV_HEADS * HEAD_DIM
    return {
        "self_attn.q_proj.weight": (HEADS * HEAD_DIM, WIDTH),
        "self_attn.k_proj.weight": (kv, WIDTH),
        "self_attn.v_proj.weight": (kv, WIDTH),
        "self_attn.o_proj.weight": (WIDTH, HEADS * HEAD_DIM),
        "mlp.gate_proj.weight": (INNER, WIDTH),
        "mlp.up_proj.weight": (INNER, WIDTH),
        "mlp.down_proj.weight": (WIDTH, INNER),
        "input_layernorm.weight": (WIDTH,),
        "post_attention_layernorm.weight": (WIDTH,),
    }


def specs(gigabytes: float) -> tuple[dict[str, Spec], int]:
    """Every tensor of a Llama of at least that size in bf16, and its number of layers."""
    made = {"model.embed_tokens.weight": Spec((VOCABULARY, WIDTH), torch.bfloat16)}
    made["lm_head.weight"] = made["model.embed_tokens.weight"]
    made["model.norm.weight"] = Spec((WIDTH,), torch.bfloat16)
    depth = 0
    while depth == 0 or sum(spec.nbytes for spec in made.values()) < gigabytes * 1e9:
        made |= {f"model.layers.{depth}.{name}": Spec(s, torch.bfloat16) for name, s in layer_shapes().items()}
        depth += 1
    return made, depth


def write_checkpoint(folder: Path, gigabytes: float, shard: str) -> int:
    """Write it to `folder`, with a tokenizer of one word; the bytes of its weights."""
    tensors, depth = specs(gigabytes)

    def make(name: str) -> Tensor:
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") >> 1
        generator = torch.Generator().manual_seed(seed)
        shape = tensors[name].shape
        return torch.randn(shape, dtype=torch.bfloat16, generator=generator) * 0.02 + (len(shape) == 1)

    with atomic_directory(folder) as partial:
        write_tensors(partial, tensors, make, shard)
        write_json(partial / "config.json", config(depth))
        tokenizer = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(partial)
    return sum(spec.nbytes for spec in tensors.values())


def config(depth: int) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": depth,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out", type=Path)
    parser.add_argument("--gigabytes", type=float, default=16.0)
    parser.add_argument("--shard", default="2GB")
    options = parser.parse_args()
    size = write_checkpoint(options.out, options.gigabytes, options.shard)
    print(f"wrote {options.out}: {size / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
