"""The README card of a conversion: base model, its licence, what changed, what was verified."""

from __future__ import annotations

from collections import Counter
from importlib.resources import files
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from yaml import YAMLError

from zoo.architectures.core.hub import HUB_ID
from zoo.conversion.core.planner import HEAD_HYBRID, Plan

LICENCE_FIELDS = ("license", "license_name", "license_link")
TEXT = """
# {name}

Converted with hybrid-zoo from `{source}`: {layers}. Weights that have a place in
the new mixers were transferred; {new} of {total} tensors are new and start near a no-op. Without healing
(`zoo heal`), expect it to be worse than its source.

```python
import zoo

model, tokenizer = zoo.from_pretrained("{name}"), zoo.tokenizer("{name}")
```

## Plan

{plan}

Every tensor, with its source and operation, is in `zoo_conversion.json`.

## Verification

{checks}

Details are in `verification.json`.
"""


def write_card(plan: Plan, folder: Path, source: str, checks: dict[str, dict[str, Any]]) -> None:
    """Write `README.md`; a name that is no hub id is not put into the front matter as the base model."""
    inherited = base_card(plan.source.checkpoint.path, source)
    licence = {field: inherited[field] for field in LICENCE_FIELDS if inherited.get(field)}
    base = source if HUB_ID.fullmatch(source) and not Path(source).exists() else inherited.get("base_model")
    tags = ["hybrid-zoo", *sorted({swap.mixer for swap in plan.swaps.values()})]
    data = ModelCardData(
        base_model=base,
        language=inherited.get("language"),
        library_name="hybrid-zoo",
        pipeline_tag="text-generation",
        tags=tags,
        **{"license": "unknown", **licence},
    )
    shown = source if base == source else Path(source).name
    text = TEXT.format(
        name=folder.name.strip(".").partition(".")[0],
        source=shown,
        layers=_layers(plan),
        new=len(plan.new),
        total=len(plan.rows),
        plan=_plan_table(plan),
        checks=_check_table(checks),
    )
    ModelCard(f"---\n{data.to_yaml()}\n---\n{text}").save(folder / "README.md")


def base_card(path: Path, source: str) -> dict[str, Any]:
    """The front matter of the source's card: its own README, else the card of a released checkpoint; may be empty."""
    released = Path(str(files("zoo").joinpath("model_cards", f"{source}.md")))
    for file in (path / "README.md", released):
        if file.is_file():
            try:
                return ModelCard.load(file).data.to_dict()
            except (ValueError, YAMLError):
                return {}
    return {}


def _layers(plan: Plan) -> str:
    groups: dict[str, list[int]] = {}
    for index, layer in enumerate(plan.config.decoder_config.layers):
        kept = index not in plan.swaps
        groups.setdefault(f"{layer.mixer} kept" if kept else _described(plan, index), []).append(index)
    return "; ".join(f"{name} in layers {', '.join(map(str, layers))}" for name, layers in groups.items())


def _described(plan: Plan, index: int) -> str:
    """The mixer of a swapped layer, and the heads that stay softmax attention beside it."""
    layer = plan.config.decoder_config.layers[index]
    if layer.mixer != HEAD_HYBRID:
        return str(layer.mixer)
    heads = ", ".join(map(str, layer.mixer_args["kept"]))
    return f"{layer.mixer_args['mixer']} beside the softmax heads {heads}"


def _plan_table(plan: Plan) -> str:
    counts = Counter("new" if row.new else row.operation for row in plan.rows)
    rows = [f"| {operation} | {count} |" for operation, count in counts.most_common()]
    return "\n".join(["| operation | tensors |", "| --- | --- |", *rows])


def _check_table(checks: dict[str, dict[str, Any]]) -> str:
    rows = []
    for name, check in checks.items():
        result = f"skipped: {check['reason']}" if check["passed"] is None else "passed" if check["passed"] else "failed"
        worst = f"{check['worst']:.1e}" if "worst" in check else ""
        rows.append(f"| {name} | {result} | {worst} |")
    return "\n".join(["| check | result | worst error |", "| --- | --- | --- |", *rows])
