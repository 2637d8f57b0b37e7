"""Convert a teacher to a hybrid, heal it on books and recall documents, and measure what that cost.

    python examples/heal_books.py --teacher books-llama-22m --keep 2,5,8,11 --out runs/a \
        --data corpora/books/train.txt.xz --heldout corpora/books/heldout.txt --cache runs/cache

Beside the healed hybrid stand the teacher, the hybrid before healing, and a training-free window of 64 tokens plus one
sink in the same layers. Then every swapped layer of the healed model is zeroed, and replaced by that window, alone: a
layer that does work raises the divergence both times. OUT/results.json holds everything.

`--set key=value` changes arguments of the new mixers, `--set init.NAME=value` the start of new parameters, and
`--heal key=value` any setting of `heal`, so that recipes can be compared.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from zoo.architectures.core.mixer import Mixer
from zoo.architectures.core.modeling import ZooForCausalLM
from zoo.conversion.core.convert import RECORD, convert
from zoo.conversion.core.heal import heal
from zoo.evals.core.runner import evaluate
from zoo.loading import from_pretrained, tokenizer

WINDOW = "attention(window=64,sinks=1)"
ALIGN_SHARE = 0.1
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


# ---- models ---------------------------------------------------------------------------------------------------------
def load(folder: str | Path) -> Any:
    """bf16 on a GPU, as stored; fp32 on a CPU, where bf16 is slow."""
    options = {} if DEVICE == "cuda" else {"dtype": torch.float32}
    return from_pretrained(folder, **options).to(DEVICE).eval()


def assignments(entries: list[str]) -> dict[str, Any]:
    """`["rope=null", "conv=0"]` as a dictionary; values are JSON where they can be."""
    return {key: parsed(value) for key, _, value in (entry.partition("=") for entry in entries)}


def parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def vary(folder: Path, changes: dict[str, Any]) -> None:
    """Rewrite a fresh conversion with other mixer arguments and starting values, outside what `convert` verifies."""
    before, record = from_pretrained(folder), json.loads((folder / RECORD).read_text())
    config = before.config
    for swap in record["swaps"]:
        args = config.layers[swap["layer"]]["mixer_args"]
        args.update({key: value for key, value in changes.items() if not key.startswith("init.")})
    after = ZooForCausalLM(type(config).from_dict(config.to_dict()))
    old, new = before.state_dict(), dict(after.named_parameters())
    record["new"] = [name for name in new if name in record["new"] or name not in old]
    with torch.no_grad():
        for name, parameter in new.items():
            parameter.data = start(name, parameter, old, before.dtype)
            value = next((v for k, v in changes.items() if k.startswith("init.") and name.endswith(k[5:])), None)
            if value is not None:
                parameter.fill_(value)
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    after.save_pretrained(folder)
    (folder / RECORD).write_text(json.dumps(record, indent=2))
    (folder / "verification.json").unlink(missing_ok=True)


def start(name: str, parameter: nn.Parameter, old: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    """The converted tensor where it still fits, else an identity convolution, a norm of ones, or a random start."""
    if name in old and old[name].shape == parameter.shape:
        return old[name]
    fresh = parameter.data
    if ".convs." in name:
        fresh = torch.zeros_like(fresh)
        fresh[:, -1] = 1.0
    elif name.endswith("o_norm"):
        fresh = torch.ones_like(fresh)
    return fresh if getattr(parameter, "_zoo_fp32", False) else fresh.to(dtype)


# ---- measuring ------------------------------------------------------------------------------------------------------
def measure(model: Any, teacher: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Perplexity, needle, key-value lists and divergence of one model, flat."""
    words = tokenizer(args.teacher)
    options: dict[str, Any] = {name: {"length": args.length} for name in ("perplexity", "fidelity")}
    options["fidelity"]["windows"], options["key_value"] = args.windows, {"form": args.form}
    tasks = ["perplexity", "needle", "key_value", "fidelity"]
    shared: dict[str, Any] = {"data": args.heldout, "lengths": args.lengths, "samples": args.samples}
    found = evaluate(model, words, tasks=tasks, teacher=teacher, options=options, progress=False, **shared)
    scores = {f"needle_{n}": found["needle"].row("accuracy", length=n) for n in args.lengths}
    scores["key_value_30"] = found["key_value"].row("accuracy", pairs=30)
    flat = {name: [row.value, row.stderr] for name, row in scores.items()}
    flat["perplexity"] = found["perplexity"].value("perplexity")
    flat["kl"], flat["top1"] = found["fidelity"].value("kl"), found["fidelity"].value("top1_agreement")
    return flat


def divergence(model: Any, teacher: Any, args: argparse.Namespace) -> float:
    """KL to the teacher on the first held-out windows, in nats per token."""
    text = args.out / "excerpt.txt"
    if not text.exists():  # the same windows as in `measure`, without reading the whole text for each layer
        whole = Path(args.heldout).read_text(encoding="utf-8")
        text.write_text(whole[: 8 * args.windows * args.length], encoding="utf-8")
    options = {"fidelity": {"length": args.length, "windows": args.windows}}
    words = tokenizer(args.teacher)
    shared: dict[str, Any] = {"tasks": ["fidelity"], "options": options, "progress": False}
    found = evaluate(model, words, teacher=teacher, data=text, **shared)
    return float(found["fidelity"].value("kl"))


class Nothing(Mixer):
    """A mixer that adds nothing to the residual stream."""

    def forward(self, x: Tensor, ctx: Any, cache: Any = None) -> Tensor:
        return torch.zeros_like(x)


@contextmanager
def replaced(block: Any, mixer: nn.Module) -> Iterator[None]:
    """`block` with another mixer."""
    own, block.mixer = block.mixer, mixer
    try:
        yield
    finally:
        block.mixer = own


def dead_branches(healed: Any, window: Any, teacher: Any, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """By swapped layer, the divergence with its mixer zeroed and with the window in its place."""
    found: dict[str, dict[str, float]] = {"none": {"kl": divergence(healed, teacher, args)}}
    for index, (block, other) in enumerate(zip(healed.model.layers, window.model.layers, strict=True)):
        if index in args.keep:
            continue
        found[str(index)] = {}
        for name, mixer in (("zeroed", Nothing()), ("window", other.mixer)):
            with replaced(block, mixer):
                found[str(index)][name] = divergence(healed, teacher, args)
    return found


# ---- the run --------------------------------------------------------------------------------------------------------
def prepare(args: argparse.Namespace) -> tuple[Path, Path]:
    """The hybrid before healing, and the training-free window, as directories."""
    swapped, window = args.out / "swapped", args.out / "window"
    convert(args.teacher, swapped, mixer=args.mixer, keep=args.keep, fresh_process=False)
    convert(args.teacher, window, mixer=WINDOW, keep=args.keep, fresh_process=False)
    if args.set:
        vary(swapped, assignments(args.set))
    return swapped, window


def train(args: argparse.Namespace, swapped: Path) -> tuple[dict[str, Any], float]:
    """Heals; returns the report and the seconds from start to end."""
    began, align = time.monotonic(), int(args.tokens * ALIGN_SHARE)
    settings = {"align_tokens": align, "distill_tokens": args.tokens - align, **assignments(args.heal)}
    settings = {"cache": args.cache, "seed": args.seed, **settings}
    shares = {"recall": args.recall, "lists": args.lists}
    data = ",".join([args.data, *(f"{name}={share}" for name, share in shares.items() if share)])
    report = heal(args.teacher, swapped, args.out / "healed", data=data, **settings)
    return report.to_dict(), time.monotonic() - began


def reference(args: argparse.Namespace, teacher: Any) -> dict[str, Any]:
    """The teacher's scores, measured once per cache."""
    fields = (str(args.teacher), args.heldout, args.length, args.lengths, args.samples, args.windows, args.form)
    asked = json.dumps(fields)
    file = (args.cache or args.out) / "teacher.json"
    if file.exists() and (kept := json.loads(file.read_text()))["asked"] == asked:
        return dict(kept["scores"])
    scores = measure(teacher, teacher, args)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"asked": asked, "scores": scores}))
    return scores


def show(results: dict[str, Any]) -> None:
    """The models side by side, then the layers."""
    names = [name for name in results["models"]["teacher"] if name != "note"]
    table = Table("", *names)
    for model, scores in results["models"].items():
        cells = [f"{s[0]:.3f}" if isinstance(s, list) else f"{s:.4g}" for s in (scores[name] for name in names)]
        table.add_row(model, *cells)
    layers = Table("layer", "KL zeroed", "KL window", title=f"healed: KL {results['dead_branches']['none']['kl']:.4f}")
    for layer, kl in results["dead_branches"].items():
        if layer != "none":
            layers.add_row(layer, f"{kl['zeroed']:.4f}", f"{kl['window']:.4f}")
    console = Console(width=140)
    console.print(table)
    console.print(layers)


def write(folder: Path, results: dict[str, Any]) -> None:
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Everything, in order; OUT/results.json grows as results come."""
    args.out.mkdir(parents=True)
    swapped, window = prepare(args)
    report, seconds = train(args, swapped)
    print(f"healed in {seconds:.0f} s: {report['tokens']:,} tokens, {report['seconds']:.0f} s of training", flush=True)
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    results: dict[str, Any] = {"settings": settings, "heal": report, "heal_wall": seconds, "models": {}}
    teacher, models = load(args.teacher), results["models"]
    models["teacher"] = {**reference(args, teacher), "perplexity_ratio": 1.0}
    for name in ("healed", "swapped", "window"):
        models[name] = measure(load(args.out / name), teacher, args)
        models[name]["perplexity_ratio"] = models[name]["perplexity"] / models["teacher"]["perplexity"]
        write(args.out, results)
    results["dead_branches"] = dead_branches(load(args.out / "healed"), load(window), teacher, args)
    write(args.out, results)
    if not args.weights:
        for name in ("swapped", "window"):
            shutil.rmtree(args.out / name)
    return results


def integers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


def parser() -> argparse.ArgumentParser:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = cli.add_argument
    add("--teacher", required=True, help="registered name or directory of a softmax model")
    add("--keep", type=integers, default=[], help="layers that keep their attention: 2,5,8,11")
    add("--out", type=Path, required=True, help="directory to make")
    add("--data", required=True, help="text to heal on, .xz or plain")
    add("--heldout", required=True, help="text to measure on")
    add("--tokens", type=int, default=60_000_000, help="of both stages; a tenth goes to align")
    add("--recall", type=float, default=0.35, help="share of recall rows")
    add("--lists", type=float, default=0.0, help="share of rows of key-value lists alone")
    add("--mixer", default="gated_delta_net")
    add("--cache", type=Path, help="tokenised text and recall rows, shared between runs")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="argument of the new mixers, or init.NAME")
    add("--heal", action="append", default=[], metavar="KEY=VALUE", help="setting of heal: lr_new=1e-3, length=1024")
    add("--length", type=int, default=2048, help="tokens per window of perplexity and divergence")
    add("--windows", type=int, default=32, help="windows of divergence")
    add("--lengths", type=integers, default=[256, 512, 1024, 1900], help="of the needle")
    add("--samples", type=int, default=200, help="needles, and key-value lists")
    add("--form", default="repeat", help="of the key-value lists; books-llama-4m learned `list`")
    add("--seed", type=int, default=0)
    add("--weights", action="store_true", help="keep the unhealed models too")
    return cli


def main() -> None:
    show(run(parser().parse_args()))


if __name__ == "__main__":
    main()
