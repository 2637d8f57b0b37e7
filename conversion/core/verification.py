"""The whole verification of a converted model, before or after training: a JSON file and a page for people."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from zoo.architectures.core import formats
from zoo.architectures.core.checkpoint import Checkpoint, read_json
from zoo.architectures.core.hub import resolve
from zoo.architectures.core.load import tokenizer
from zoo.architectures.core.shards import atomic_file, write_json
from zoo.conversion.core import models
from zoo.conversion.core.calibrated import started
from zoo.conversion.core.convert import RECORD
from zoo.conversion.core.planner import Plan, Swap, build_plan
from zoo.conversion.core.texts import opening, read_text
from zoo.conversion.core.verify import LENGTH, Check, ladder, skipped, too_large
from zoo.conversion.core.verify_layers import branches, similarity
from zoo.conversion.core.verify_page import page
from zoo.conversion.core.verify_runs import decode, kernels, padding
from zoo.errors import ZooError

WINDOWS, TOKENS = 4, 256  # of the user's text


def verify(
    out: str | Path,
    source: str | Path | None = None,
    *,
    data: str | Path | None = None,
    report: str | Path | None = None,
    fresh_process: bool = True,
) -> dict[str, Check]:
    """Check a converted directory against its source, and measure what each of its new layers does.

    Args:
        out: a directory that `convert` or `heal` wrote.
        source: where its source lies now; by default as recorded.
        data: a text file (`.xz` too) to measure layers on; by default two sentences, which say little.
        report: a directory for `verification.json` and `verification.html`; None writes nothing.
        fresh_process: also load it in a new process and compare.

    Returns:
        By name: `passed` (None when it was not run, with the `reason`, or where numbers are only measured) and what was
        measured.

    Raises:
        ZooError: not a conversion, its source is gone, or unusable data. A check that fails is in the result.
    """
    folder = Path(out)
    plan = planned(folder, source)
    text = None if data is None else windows(plan, read_text(Path(data)))
    if report is not None and not Path(report).is_dir():
        raise ZooError(f"report was {report}; it must be a directory that exists")
    trained = (folder / "healing.json").is_file()
    checks = dict(ladder(plan, folder, fresh_process=fresh_process, trained=trained))
    if checks["tensors"]["passed"]:
        checks |= dict(_runs(plan, folder, text, trained))
    if report is not None:
        write(Path(report), folder.absolute().name, checks)
    return checks


def planned(folder: Path, source: str | Path | None = None) -> Plan:
    """The plan by which a directory was converted, from its record.

    Raises:
        ZooError: it has no record, or the source is gone.
    """
    if not (folder / RECORD).is_file():
        raise ZooError(f"{folder} has no {RECORD}; it must be a directory that convert wrote")
    record = read_json(folder / RECORD, "record")
    canonical = formats.read(resolve(source or record["source"]["name"], revision=record["source"]["revision"]))
    swaps = {swap["layer"]: Swap(swap["mixer"], swap["args"]) for swap in record["swaps"]}
    plan = build_plan(canonical, swaps, record["seed"], record.get("rope", "keep"))
    return started(plan, {int(layer): numbers for layer, numbers in record.get("measured", {}).items()})


def windows(plan: Plan, text: str) -> Tensor:
    """`[N, L + 1]` ids of a text's beginning."""
    names = tokenizer(plan.source.checkpoint.path)
    start, length = opening(names), min(TOKENS, plan.config.max_position_embeddings)
    wanted = length + 1 - len(start)
    ids = names(text[: 16 * WINDOWS * (length + 1)], add_special_tokens=False, verbose=False)["input_ids"]
    if len(ids) < wanted:
        raise ZooError(f"data has {len(ids)} tokens; it must have {wanted} or more")
    count = min(WINDOWS, len(ids) // wanted)
    return torch.tensor([start + ids[n * wanted : (n + 1) * wanted] for n in range(count)])


def _runs(plan: Plan, folder: Path, text: Tensor | None, trained: bool) -> Iterator[tuple[str, Check]]:
    """The checks that take a model that runs; of a large one its single layers."""
    large = too_large(plan)
    ids = models.sample_ids(plan, LENGTH)
    if not plan.swaps:
        for name in ("kernels", "decode", "padding", "similarity", "branches"):
            yield name, skipped("no layer was swapped")
        return
    yield "kernels", kernels(plan, Checkpoint(folder), models.mixer_inputs(plan, ids, whole=large is None))
    if large:
        for name in ("decode", "padding", "similarity", "branches"):
            yield name, skipped(large)
        return
    wide = models.load(folder, torch.float64)
    yield "decode", decode(plan, wide, ids)
    yield "padding", padding(wide, ids)
    teacher, model = models.unswapped(plan), models.load(folder)
    text = ids[:1] if text is None else text
    yield "similarity", similarity(plan, teacher, model, text[:, :-1], trained=trained)
    yield "branches", branches(plan, teacher, model, text, trained=trained)


def write(folder: Path, name: str, checks: dict[str, Check]) -> None:
    """`verification.json` and `verification.html`, in place of those of an earlier verification."""
    ok = all(check["passed"] is not False for check in checks.values())
    write_json(folder / "verification.json", {"ok": ok, "checks": checks})
    with atomic_file(folder / "verification.html") as partial:
        partial.write_text(page(name, checks), encoding="utf-8")
