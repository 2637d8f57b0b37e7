"""Checks of a conversion, each exact or bounded, with their numbers: what `verification.json` holds.

B batch, T tokens, D hidden size, H query heads, K head dimension.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo import registry
from zoo.architectures.core.checkpoint import Checkpoint
from zoo.architectures.core.config import Layer
from zoo.architectures.core.layout import overridden
from zoo.architectures.core.mixer import Context, Mixer
from zoo.architectures.core.mixing import softmax_weights
from zoo.architectures.core.rope import RotaryTable
from zoo.architectures.core.shards import tensor_bytes
from zoo.conversion.core import models
from zoo.conversion.core.planner import Plan, attention_spec
from zoo.errors import ZooError

TOLERANCE = 1e-5
RUN_LIMIT = 100_000_000  # parameters; a larger model is checked layer by layer
LENGTH = 64
TRAINED = "the model was trained since its conversion: its projections are no longer the source's"
Check = dict[str, Any]


def run_checks(plan: Plan, folder: Path, *, fresh_process: bool = True) -> dict[str, Check]:
    """Every check of the tensors in `folder` against the plan's source.

    Returns:
        By name: `passed` (None when skipped, with the `reason`), what was measured and the tolerance.

    Raises:
        ZooError: one failed; the message names it and its numbers.
    """
    checks: dict[str, Check] = {}
    for name, check in ladder(plan, folder, fresh_process=fresh_process):
        if check["passed"] is False:
            shown = {key: value for key, value in check.items() if key not in ("passed", "sha256")}
            raise ZooError(f"verification {name!r} failed ({shown}); nothing was kept: please report it")
        checks[name] = check
    return checks


def ladder(
    plan: Plan, folder: Path, *, fresh_process: bool = True, trained: bool = False
) -> Iterator[tuple[str, Check]]:
    """The checks one by one; wrong tensors end it, as nothing else can be told of them.

    Args:
        trained: `folder` was trained since its conversion, so that its values are no longer the plan's.
    """
    large = too_large(plan)
    ids, out = models.sample_ids(plan, LENGTH), Checkpoint(folder)
    found = tensors(plan, out, trained=trained)
    yield "tensors", found
    if not found["passed"]:
        return
    yield "identity", skipped(large) if large else identity(plan, ids)
    if trained:
        yield "expansion", skipped(TRAINED)
        yield "window", skipped(TRAINED)
    else:
        hidden = models.mixer_inputs(plan, ids, whole=large is None)
        yield "expansion", expansion(plan, out, hidden)
        yield "window", window(plan, out, hidden, whole=large is None)
    if large or not fresh_process:
        yield "reload", skipped(large or "not asked for")
    else:
        yield "reload", reload(plan, folder, ids, trained=trained)
    yield "tokenizer", tokenizer(plan, folder)


def too_large(plan: Plan) -> str | None:
    """Why a model is not run whole, if it is not."""
    if plan.parameters <= RUN_LIMIT:
        return None
    return f"{plan.parameters} parameters are more than the {RUN_LIMIT} that are run whole; see the single layers"


def tensors(plan: Plan, out: Checkpoint, *, trained: bool = False) -> Check:
    """All tensors have the planned shape and dtype; unless trained, untouched ones have the source's hash, and all
    others the planned value."""
    wrong = sorted(set(plan.by_target) ^ set(out.tensors))
    hashes: dict[str, str] = {}
    for row in plan.rows if not wrong else ():
        found = out.get(row.target)
        if (tuple(found.shape), found.dtype) != (row.shape, row.dtype):
            wrong.append(row.target)
        elif row.copied:
            digest = sha256(found)
            if digest == sha256(plan.source.checkpoint.get(row.sources[0])):
                hashes[row.target] = digest
            elif not trained:
                wrong.append(row.target)
        elif not trained and not torch.equal(found, plan.tensor(row.target)):
            wrong.append(row.target)
    counts = {"tensors": len(plan.rows), "untouched": len(hashes)}
    return {"passed": not wrong, "wrong": wrong[:10], **counts, "sha256": hashes}


def identity(plan: Plan, ids: Tensor) -> Check:
    """With no layer swapped, our decoder gives the logits of transformers' own class, in fp32."""
    if plan.source.format == "zoo":
        return skipped("the source is a zoo checkpoint: transformers has no class of its own for it")
    capped = any(layer.mixer_args.get("softcap") is not None for layer in plan.source.decoder.layers)
    # transformers' other attentions leave a soft cap out
    theirs = models.transformers_logits(plan.source.checkpoint.path, ids, eager=capped)
    return compare(theirs, models.logits(models.unswapped(plan), ids))


def expansion(plan: Plan, out: Checkpoint, hidden: Mapping[int, list[Tensor]]) -> Check:
    """Each swapped layer, run as softmax over its own transferred q, k, v, equals the source's attention."""
    layers: dict[str, float] = {}
    for index, swap in plan.swaps.items():
        if swap.mixer == "attention":
            continue
        teacher = layer_mixer(plan, index, plan.source.get, plan.source.decoder.layers[index])
        student = layer_mixer(plan, index, partial(_transferred, plan, out), _with_positions(plan, index))
        project = output_projection(plan, index, out)
        with torch.no_grad():
            errors = [
                error(teacher(x, ctx), project(softmax_attention(plan, index, student.expanded_qkv(x, ctx), ctx)))
                for x, ctx in with_context(plan, hidden[index])
            ]
        layers[str(index)] = max(errors)
    return bounded(layers) if layers else skipped("no layer was given a mixer other than attention")


def _with_positions(plan: Plan, index: int) -> Layer:
    """A swapped layer; where the user took the source's RoPE and qk-norm away, it has them, to be compared."""
    layer, spec = plan.config.decoder_config.layers[index], attention_spec(plan.source.decoder, index)

    def taken(given: Mapping[str, Any]) -> dict[str, Any]:
        here = {name: getattr(spec, name) for name in ("rope", "qk_norm") if name in given}
        here |= {"temperature": None} if "temperature" in given else {}
        return here | {name: taken(value) for name, value in given.items() if isinstance(value, Mapping)}

    return replace(layer, mixer_args=overridden(layer.mixer_args, taken(plan.swaps[index].args)))


def _transferred(plan: Plan, out: Checkpoint, name: str) -> Tensor:
    """The tensor `name` of the output, or, of a norm that the user took away, of the source."""
    return out.get(name) if name in out.tensors else plan.source.get(name)


def window(plan: Plan, out: Checkpoint, hidden: Mapping[int, list[Tensor]], *, whole: bool) -> Check:
    """A windowed layer equals the source's attention up to the window's length; so does a model of nothing else."""
    layers: dict[str, float] = {}
    lengths = [LENGTH]
    for index, swap in plan.swaps.items():
        if swap.mixer != "attention":
            continue
        target = plan.config.decoder_config.layers[index]
        lengths.append(target.mixer_args.get("window") or LENGTH)
        teacher = layer_mixer(plan, index, plan.source.get, plan.source.decoder.layers[index])
        student = layer_mixer(plan, index, out.get, target)
        inputs = [x[:, : lengths[-1]] for x in hidden[index]]
        with torch.no_grad():
            layers[str(index)] = max(error(teacher(x, ctx), student(x, ctx)) for x, ctx in with_context(plan, inputs))
    if not layers:
        return skipped("no layer was given a window")
    if whole and len(layers) == len(plan.swaps):
        ids, wide = models.sample_ids(plan, min(lengths)), torch.float64
        expected = models.logits(models.unswapped(plan, wide), ids)
        layers["logits"] = error(expected, models.logits(models.swapped(plan, wide), ids))
    return bounded(layers)


def reload(plan: Plan, folder: Path, ids: Tensor, *, trained: bool = False) -> Check:
    """Loaded in a fresh process, the directory gives the logits of the plan's tensors (of its own) in this one."""
    model = models.load(folder) if trained else models.swapped(plan)
    return compare(models.logits(model, ids), models.fresh_logits(folder, ids))


def tokenizer(plan: Plan, folder: Path) -> Check:
    """The carried tokenizer encodes as the source's does."""
    texts = [models.SAMPLE_TEXT, " 12345\n\tÄé漢 <s>"]
    ours, theirs = models.encode(folder, texts), models.encode(plan.source.checkpoint.path, texts)
    return {"passed": ours == theirs, "tokens": sum(map(len, ours))}


def layer_mixer(plan: Plan, index: int, get: Any, layer: Layer) -> Mixer:
    """The mixer of one layer alone, in fp64, so that rounding neither hides nor fakes a difference."""
    prefix = f"model.layers.{index}.mixer."
    cls = registry.get("mixers", str(layer.mixer), "MODULE")
    with torch.device("meta"):
        mixer: Mixer = cls(plan.config.decoder_config, cls.parse(layer.mixer_args))
    state = {name: get(prefix + name).double() for name in mixer.state_dict()}
    mixer.load_state_dict(state, assign=True)
    mixer.eval()
    return mixer


def with_context(plan: Plan, inputs: list[Tensor]) -> Iterator[tuple[Tensor, Context]]:
    """Each `x [B, T, D]` with the context of an uncached, unpadded forward."""
    decoder = plan.source.decoder
    for x in (each.double() for each in inputs):
        positions = torch.arange(x.shape[1]).expand(x.shape[:2])
        tables = {name: RotaryTable(rope, decoder.max_position_embeddings) for name, rope in decoder.ropes.items()}
        ropes = {name: table(positions) for name, table in tables.items()}
        yield x, Context(phase="train", positions=positions, ropes=ropes)


def output_projection(plan: Plan, index: int, out: Checkpoint) -> Any:
    """The student's parameters that the source's `o_proj` became, as a function of heads `[B, T, H * K]`."""
    prefix = f"model.layers.{index}.mixer."
    origin = {row.origin: row.target for row in plan.rows if row.target.startswith(prefix) and row.origin}
    weight = out.get(origin[prefix + "o_proj.weight"]).double()
    bias = origin.get(prefix + "o_proj.bias")
    return lambda heads: F.linear(heads, weight, None if bias is None else out.get(bias).double())


def softmax_attention(plan: Plan, index: int, qkv: tuple[Tensor, Tensor, Tensor], ctx: Context) -> Tensor:
    """The source layer's softmax over q, k, v `[B, T, H, K]`, written out: `[B, T, H * K]`."""
    q, k, v = (x.transpose(1, 2) for x in qkv)
    args = registry.get("mixers", "attention", "MODULE").parse(plan.source.decoder.layers[index].mixer_args)
    return (softmax_weights(args, q, k, ctx.positions[0]) @ v).transpose(1, 2).flatten(2)


def error(expected: Tensor, found: Tensor) -> float:
    """Largest difference, in standard deviations of `expected`; infinite where something is not a number."""
    if expected.shape != found.shape or not bool(found.isfinite().all()):
        return float("inf")
    difference = (expected.double() - found.double()).abs().max()
    return float(difference / expected.double().std().clamp(min=torch.finfo(torch.float32).tiny))


def compare(expected: Tensor, found: Tensor) -> Check:
    """A check of two tensors that must agree to the tolerance."""
    worst = error(expected, found)
    return {"passed": worst <= TOLERANCE, "worst": worst, "tolerance": TOLERANCE, "equal": torch.equal(expected, found)}


def bounded(values: Mapping[str, float], tolerance: float = TOLERANCE) -> Check:
    """A check of several errors, each of which must be within the tolerance."""
    worst = max(values.values())
    return {"passed": worst <= tolerance, "worst": worst, "tolerance": tolerance, "layers": dict(values)}


def skipped(reason: str) -> Check:
    """A check that was not run, and why."""
    return {"passed": None, "reason": reason}


def sha256(tensor: Tensor) -> str:
    """Hash of a tensor's bytes."""
    return hashlib.sha256(tensor_bytes(tensor)).hexdigest()
