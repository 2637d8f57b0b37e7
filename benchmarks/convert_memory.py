"""Peak anonymous memory of a conversion: a random Llama of some GB in shards, converted in a process that is watched.

    python benchmarks/convert_memory.py --gigabytes 4 --shard 500MB --folder SCRATCH

Mapped shards are not counted: `RssAnon` of /proc is what the process could not give back (Linux only). The scratch
folder takes about twice the size and is emptied at the end.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from zoo.architectures.core.shards import Spec, write_json, write_tensors

WIDTH, HEADS, KV_HEADS, HEAD_DIM, INNER, VOCABULARY = 2048, 32, 8, 64, 5632, 32000
CONVERT = (
    "import sys, zoo; zoo.convert(sys.argv[1], sys.argv[2], mixer=sys.argv[3], keep=[0], max_shard_size=sys.argv[4])"
)


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
    while sum(spec.nbytes for spec in made.values()) < gigabytes * 1e9:
        made |= {f"model.layers.{depth}.{name}": Spec(s, torch.bfloat16) for name, s in layer_shapes().items()}
        depth += 1
    return made, depth


def write_source(folder: Path, gigabytes: float, shard: str) -> int:
    """A random Llama with a tokenizer; returns the bytes of its weights."""
    tensors, depth = specs(gigabytes)

    def make(name: str) -> Tensor:
        return torch.randn(tensors[name].shape, dtype=torch.bfloat16) * 0.02

    folder.mkdir(parents=True)
    write_tensors(folder, tensors, make, shard)
    write_json(folder / "config.json", config(depth))
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
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


def watch(command: list[str]) -> tuple[int, int, float]:
    """Run a command; its exit status, peak RssAnon in bytes, and seconds."""
    start, peak = time.monotonic(), 0
    with subprocess.Popen(command) as process:
        status = Path(f"/proc/{process.pid}/status")
        while process.poll() is None:
            peak = max(peak, anonymous(status))
            time.sleep(0.005)
    return process.returncode, peak, time.monotonic() - start


def anonymous(status: Path) -> int:
    try:
        lines = status.read_text().splitlines()
    except OSError:  # it has just ended
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--shard", default="500MB")
    parser.add_argument("--mixer", default="gated_delta_net")
    parser.add_argument("--limit", type=float, default=1.2, help="GB of anonymous memory")
    parser.add_argument("--folder", default=None, help="scratch folder (default: the system's)")
    options = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        size = write_source(scratch / "source", options.gigabytes, options.shard)
        paths = [str(scratch / "source"), str(scratch / "out")]
        code, peak, seconds = watch([sys.executable, "-c", CONVERT, *paths, options.mixer, options.shard])
    finally:
        shutil.rmtree(scratch)
    print(f"converted {size / 1e9:.2f} GB in {seconds:.0f} s; peak RssAnon {peak / 1e9:.3f} GB")
    if code or peak > options.limit * 1e9:
        sys.exit(f"failed: exit status {code}, limit {options.limit} GB")


if __name__ == "__main__":
    main()
