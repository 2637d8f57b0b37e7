"""Pretrain a small Llama on books and synthetic recall documents: the recipe behind the bundled `books-llama-4m`.

    python examples/pretrain.py --text train.txt.xz --cache cache --prepare-only      # tokenizer and tokens, CPU
    python examples/pretrain.py --cache cache --out out --preset 4m --minutes 4.5     # train, one GPU
    python examples/pretrain.py --text books.txt --cache cache --out out --preset tiny --steps 20   # a minute on a CPU

The text holds documents separated by `<|endoftext|>`. Training logs one JSON object per line to OUT/log.jsonl, measures
needle recall on keys it never trains on, and leaves OUT/ as a directory that `from_pretrained` reads.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pretrain_data import END, Array, prepare, recall_pool
from torch.nn import functional as F
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from zoo.conversion.core import recall
from zoo.evals.core import words

HELD_OUT = 400_000  # tokens at the end of the corpus, never trained on: filler and perplexity of the checks

# Eight layers, so that a 3:1 hybrid keeps two; heads of 64, because only the slow part of a rotary head can match
# content far back, and heads of 32 leave too few such dimensions. 3.96M and 5.97M parameters, embedding included.
PRESETS: dict[str, dict[str, int]] = {
    "tiny": {"hidden": 64, "layers": 2, "heads": 2, "kv_heads": 1, "head_dim": 32, "mlp": 128},
    "4m": {"hidden": 192, "layers": 8, "heads": 4, "kv_heads": 2, "head_dim": 64, "mlp": 432},
    "6m": {"hidden": 256, "layers": 8, "heads": 4, "kv_heads": 2, "head_dim": 64, "mlp": 544},
}


# ---- rows -----------------------------------------------------------------------------------------------------------
class Rows:
    """Batches of rows [B, L + 1] drawn on the device: books first, then recall documents, then repeated spans."""

    def __init__(self, args: argparse.Namespace, books: Array, pools: tuple[Array, Array], device: str) -> None:
        self.args, self.device = args, device
        on_device = [torch.from_numpy(pool.astype(np.int32)).to(device) for pool in (books, *pools)]
        self.books, self.recall, self.repeat = on_device
        self.span = torch.arange(args.length + 1, device=device)

    def counts(self, progress: float) -> tuple[int, int, int]:
        """Rows per source: repeated spans only help recall to appear, and the second half needs them and lists less."""
        batch, late = self.args.batch, progress > 0.5
        repeat = max(1, round(batch * (0.03 if late else self.args.repeat)))
        documents = max(1, round(batch * self.args.recall * (0.75 if late else 1)))
        return batch - documents - repeat, documents, repeat

    def draw(self, counts: tuple[int, int, int]) -> torch.Tensor:
        starts = torch.randint(len(self.books) - len(self.span) + 1, (counts[0], 1), device=self.device)
        rows = [self.books[starts + self.span]]
        for pool, n in ((self.recall, counts[1]), (self.repeat, counts[2])):
            rows.append(pool[torch.randint(len(pool), (n,), device=self.device)])
        return torch.cat(rows).long()


# ---- model ----------------------------------------------------------------------------------------------------------
def causal_attention(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: None, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """Flash attention under torch.compile; transformers' own sdpa path builds a mask while it is being traced."""
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=kwargs["scaling"], enable_gqa=True)
    return out.transpose(1, 2).contiguous(), None


def build(args: argparse.Namespace, vocab: int) -> LlamaForCausalLM:
    shape = {name: getattr(args, name) or value for name, value in PRESETS[args.preset].items()}
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=shape["hidden"],
        intermediate_size=shape["mlp"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv_heads"],
        head_dim=shape["head_dim"],
        max_position_embeddings=max(4096, args.length),
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": args.rope_theta},
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
    )
    AttentionInterface.register("causal", causal_attention)
    config._attn_implementation = "causal"
    return LlamaForCausalLM(config)


def optimizer_of(model: LlamaForCausalLM, args: argparse.Namespace, device: str) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=device == "cuda")


def autocast(device: str) -> torch.autocast:
    return torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda")


def row_losses(model: torch.nn.Module, rows: torch.Tensor) -> torch.Tensor:
    """Mean next-token loss of each row: [B, L + 1] -> [B]."""
    logits = model(input_ids=rows[:, :-1], use_cache=False).logits
    losses = F.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten(), reduction="none")
    return losses.view(len(rows), -1).mean(1)


def schedule(progress: float, step: int, cut: float, warmup: int = 100) -> float:
    """Factor on the learning rate: warm-up, constant up to `cut`, then linear down to 2%."""
    decay = 1.0 if progress < cut else 1 - 0.98 * min(1.0, (progress - cut) / (1 - cut))
    return min(1.0, (step + 1) / warmup) * decay


# ---- checks ---------------------------------------------------------------------------------------------------------
class Checks:
    """Needle and key-value accuracy with unseen keys, and the loss on books that are never trained on."""

    def __init__(self, args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast, held: Array, device: str) -> None:
        self.device, self.tokenizer = device, tokenizer
        self.filler, self.keys = recall.sentences(tokenizer.decode(held.tolist())), words.keys()
        rows = held[: len(held) // (args.length + 1) * (args.length + 1)].reshape(-1, args.length + 1)
        self.books = torch.from_numpy(rows[:64].astype(np.int64)).to(device)
        self.lengths = [n for n in (256, 512, 1024, 1900) if n <= args.length]

    def probes(self, n: int, seed: int = 7) -> dict[str, list[recall.Probe]]:
        rng = random.Random(seed)
        found = {}
        for length in self.lengths:
            make = (recall.needle_probe(rng, self.filler, self.keys, self.tokenizer, length) for _ in range(n))
            found[f"needle_{length}"] = list(make)
        pairs = 30 if self.lengths[-1:] >= [1024] else 4
        found[f"key_value_{pairs}"] = [recall.key_value_probe(rng, self.keys, self.tokenizer, pairs) for _ in range(n)]
        return found

    @torch.no_grad()
    def measure(self, model: LlamaForCausalLM, probes: dict[str, list[recall.Probe]]) -> dict[str, float]:
        def predict(rows: Array) -> Array:
            ids = torch.from_numpy(rows).to(self.device).split(16)
            return torch.cat([model(part, use_cache=False).logits.argmax(-1) for part in ids]).cpu().numpy()

        with autocast(self.device):
            loss = torch.cat([row_losses(model, part) for part in self.books.split(8)]).mean().item()
            scores = {name: recall.answer_accuracy(predict, found) for name, found in probes.items()}
        return {"books_nll": round(loss, 4), "books_ppl": round(math.exp(loss), 2), **scores}


# ---- training -------------------------------------------------------------------------------------------------------
def say(out: Path, **entry: Any) -> None:
    line = json.dumps({k: round(v, 5) if isinstance(v, float) else v for k, v in entry.items()})
    print(line, flush=True)
    with (out / "log.jsonl").open("a") as log:
        log.write(line + "\n")


def save_state(path: Path, model: LlamaForCausalLM, optimizer: torch.optim.AdamW, step: int, seconds: float) -> None:
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "seconds": seconds}
    torch.save(state, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)


def train(args: argparse.Namespace, model: LlamaForCausalLM, rows: Rows, checks: Checks, device: str) -> None:
    out, optimizer = Path(args.out), optimizer_of(model, args, device)
    step, before, probes = 0, 0.0, checks.probes(args.probes)
    if args.resume:
        state = torch.load(out / "state.pt", map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, before = state["step"], state["seconds"]
    losses_of = torch.compile(row_losses, dynamic=False) if args.compile else row_losses
    began, logged = time.monotonic(), (time.monotonic(), step)
    while True:
        seconds = before + time.monotonic() - began
        progress = max(step / args.steps if args.steps else 0, seconds / 60 / args.minutes if args.minutes else 0)
        if progress >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = args.lr * schedule(progress, step, args.cut)
        counts = rows.counts(progress)
        with autocast(device):
            losses = losses_of(model, rows.draw(counts))
        losses.mean().backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if step % args.log_every == 0:
            parts = [part.mean().item() for part in losses.detach().split(counts)]  # waits for the device
            speed = (step - logged[1]) * args.batch * args.length / (time.monotonic() - logged[0])
            say(out, step=step, progress=progress, lr=optimizer.param_groups[0]["lr"], tokens_per_s=round(speed),
                books=parts[0], recall=parts[1], repeat=parts[2], norm=norm.item())  # fmt: skip
            logged = (time.monotonic(), step)
        if step % args.check_every == 0:
            say(out, step=step, **checks.measure(model, probes))
            save_state(out / "state.pt", model, optimizer, step, before + time.monotonic() - began)
            logged = (time.monotonic(), step)
    save_state(out / "state.pt", model, optimizer, step, before + time.monotonic() - began)
    say(out, step=step, tokens=step * args.batch * args.length, seconds=before + time.monotonic() - began)


def finish(args: argparse.Namespace, model: LlamaForCausalLM, checks: Checks, device: str) -> None:
    """Saves in bf16, reads the files back, measures and samples what was read."""
    out = Path(args.out)
    model.to(torch.bfloat16).save_pretrained(out)
    checks.tokenizer.model_max_length = model.config.max_position_embeddings
    checks.tokenizer.save_pretrained(out)
    saved = LlamaForCausalLM.from_pretrained(out).to(device).eval()
    results = checks.measure(saved, checks.probes(args.final_probes, seed=8))
    say(out, parameters=saved.num_parameters(), **results)
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    for start in ("The old man looked at the", "It was a dark night, and", END):
        ids = checks.tokenizer(start, return_tensors="pt").input_ids.to(device)
        text = saved.generate(ids, do_sample=True, temperature=0.8, top_k=50, max_new_tokens=80)
        print("|", checks.tokenizer.decode(text[0], skip_special_tokens=True).replace("\n", "\n| "), flush=True)


def parser() -> argparse.ArgumentParser:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = cli.add_argument
    add("--text", help="text or .xz; needed once, while CACHE is empty")
    add("--cache", default="cache", help="tokenizer and tokens.bin or tokens.bin.xz")
    add("--out", default="out")
    add("--prepare-only", action="store_true", help="write CACHE and stop")
    add("--keep", type=float, default=1.0, help="fraction of the text to use")
    add("--vocab", type=int, default=4096)
    add("--preset", choices=PRESETS, default="4m")
    for name in PRESETS["4m"]:
        add(f"--{name.replace('_', '-')}", type=int, help="instead of the preset's")
    add("--rope-theta", type=float, default=100_000.0)
    add("--length", type=int, default=2048, help="tokens per row")
    add("--batch", type=int, default=32, help="rows per step")
    add("--lr", type=float, default=3e-3)
    add("--cut", type=float, default=0.6, help="where the learning rate starts to fall, as a fraction of the run")
    add("--steps", type=int, default=0)
    add("--minutes", type=float, default=0.0, help="wall-clock budget; the schedule follows it")
    add("--recall", type=float, default=0.375, help="share of recall documents, a quarter less in the second half")
    add("--repeat", type=float, default=0.125, help="share of repeated spans in the first half")
    add("--pool", type=float, default=80.0, help="million tokens of recall rows to generate")
    add("--workers", type=int, default=os.cpu_count() or 1)
    add("--probes", type=int, default=64, help="probes per length of a check")
    add("--final-probes", type=int, default=200)
    add("--log-every", type=int, default=100)
    add("--check-every", type=int, default=500)
    add("--seed", type=int, default=0)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--compile", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available())
    add("--resume", action="store_true", help="go on from OUT/state.pt")
    return cli


def main() -> None:
    args, began = parser().parse_args(), time.monotonic()
    tokenizer, tokens = prepare(args)
    print(f"{len(tokens):,} tokens, vocabulary {len(tokenizer)}, {time.monotonic() - began:.0f} s", flush=True)
    if args.prepare_only:
        return
    if not (args.steps or args.minutes):
        raise SystemExit("give --steps, --minutes or both: the run has no end otherwise")
    Path(args.out).mkdir(parents=True, exist_ok=True)
    held = min(HELD_OUT, len(tokens) // 10)
    books = tokens[:-held]
    pools = recall_pool(args, tokenizer, books)  # forks, so before the device is touched
    print(f"{pools[0].size:,} tokens of recall rows, {time.monotonic() - began:.0f} s", flush=True)
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    model = build(args, len(tokenizer)).to(args.device)
    print(f"{model.num_parameters():,} parameters, {time.monotonic() - began:.0f} s", flush=True)
    checks = Checks(args, tokenizer, tokens[-held:], args.device)
    train(args, model, Rows(args, books, pools, args.device), checks, args.device)
    finish(args, model, checks, args.device)
    print(f"done in {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
