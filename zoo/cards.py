"""Model cards: prose by hand, tables between markers by command.

A card is `model_cards/<name>.md`, in Hugging Face's card format. Between `<!-- presets -->` and `<!-- /presets -->` (or
another block of `BLOCKS`) stands what a function here makes of the registries and of the results beside bundled weights.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard

from zoo import registry
from zoo.errors import ZooError

README = "README"
LENGTHS = {"1k": 1024, "32k": 32768, "1M": 1048576}  # tokens
KINDS = ("architectures", "mixers", "channels", "blocks", "kernels", "sources", "evals", "checkpoints")


def targets() -> list[str]:
    """Names of all cards there are, and README where there is a source tree."""
    names = sorted(path.stem for path in _folder().glob("*.md"))
    return [*names, README] if _readme().exists() else names


def refresh(name: str, write: bool = True) -> bool:
    """Bring the generated parts of a card up to date; True when they were not.

    Args:
        name: the card's name, or `README`.
        write: False only compares.

    Raises:
        ZooError: there is no such card, or it has a block that nothing makes.
    """
    path = _path(name)
    old = path.read_text(encoding="utf-8")
    new = render(name, old)
    if write and new != old:
        path.write_text(new, encoding="utf-8")
    return new != old


def render(name: str, text: str) -> str:
    """`text` of the card `name` with its generated parts as they should be."""
    for block in re.findall(r"^<!-- (\w+) -->$", text, flags=re.MULTILINE):
        if block not in BLOCKS:
            raise ZooError(f"card {name!r} has an unknown block {block!r}; the blocks are {', '.join(BLOCKS)}")
        text = _fill(text, block, BLOCKS[block](name), name)
    results = stored_results(name)
    return _with_model_index(text, name, results) if results else text


def stored_results(name: str) -> dict[str, Any]:
    """Results by task that are kept beside bundled weights; empty for a card that has none."""
    if name not in registry.names("checkpoints"):
        return {}
    path = _folder() / "checkpoints" / name / "results.json"
    return metrics_by_task(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}


def metrics_by_task(data: Mapping[str, Any]) -> dict[str, Any]:
    """The results of each task in a results file."""
    found: dict[str, Any] = dict(data.get("results", data))
    return {task: result for task, result in found.items() if isinstance(result, Mapping) and "metrics" in result}


def preset_rows(name: str) -> list[tuple[str, ...]]:
    """Preset, parameters, layers, and bytes of state at `LENGTHS`, for each preset of an architecture."""
    return [_preset_row(name, preset) for preset in registry.get("architectures", name, "PRESETS")]


def _preset_row(name: str, preset: str) -> tuple[str, ...]:
    import torch

    from zoo import loading
    from zoo.architectures.core.modeling import ZooForCausalLM

    config = loading.config(name, preset=preset)
    with torch.device("meta"):
        model = ZooForCausalLM(config)
    model.tie_weights()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    states = [bytes_text(model.state_bytes(length, 2)) for length in LENGTHS.values()]
    return (preset, count_text(parameters), str(config.num_hidden_layers), *states)


def presets_table(name: str) -> str:
    """Sizes of an architecture; state is for one sequence in a 16-bit dtype."""
    header = ("preset", "parameters", "layers", *(f"state at {length}" for length in LENGTHS))
    return markdown(header, preset_rows(name))


def results_table(name: str) -> str:
    """Results kept beside the weights of a released checkpoint."""
    rows = [
        (task, str(row["metric"]), _condition(row), f"{row['value']:.4g}", _error(row), str(row.get("n") or ""))
        for task, result in stored_results(name).items()
        for row in result["metrics"]
    ]
    return markdown(("eval", "metric", "at", "value", "standard error", "n"), rows) if rows else "No results yet."


def zoo_table(name: str = README) -> str:
    """Everything registered, with the first sentence that each says of itself."""
    rows = [(kind.removesuffix("s"), f"`{entry}`", _summary(kind, entry)) for kind in KINDS for entry in _entries(kind)]
    return markdown(("kind", "name", "what it is"), rows)


BLOCKS: dict[str, Callable[[str], str]] = {"presets": presets_table, "results": results_table, "zoo": zoo_table}


def _entries(kind: str) -> list[str]:
    own = set(registry.names("architectures")) if kind == "sources" else set()
    return [name for name in registry.names(kind) if name not in own]


def _summary(kind: str, name: str) -> str:
    if kind == "checkpoints":
        return f"[card](model_cards/{name}.md)"
    doc = " ".join((registry.load(kind, name).__doc__ or "").split("\n\n")[0].split())
    # A sentence ends before a capital: "et al. 2024" does not end one.
    sentence = re.split(r"(?<=[.:])\s+(?=[A-Z`])", doc)[0].rstrip(".:")
    text = sentence.replace("|", r"\|")
    return f"{text} ([card](model_cards/{name}.md))" if kind == "architectures" else text


def _with_model_index(text: str, name: str, results: Mapping[str, Any]) -> str:
    card = ModelCard(text, ignore_metadata_errors=False)
    card.data.model_name = name
    card.data.eval_results = [_eval_result(task, row) for task, result in results.items() for row in result["metrics"]]
    front = card.data.to_yaml(line_break="\n").strip()
    body = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)
    return f"---\n{front}\n---\n{body}"


def _eval_result(task: str, row: Mapping[str, Any]) -> EvalResult:
    condition = _condition(row)
    return EvalResult(
        task_type="text-generation",
        dataset_type=task,
        dataset_name=f"{task} ({condition})" if condition else task,
        metric_type=row["metric"],
        metric_value=round(float(row["value"]), 6),
    )


def _condition(row: Mapping[str, Any]) -> str:
    """What tells a metric's row from the others: its length, position, ..."""
    known = {"metric", "value", "n", "stderr", "ci95", "params"}
    own = {**{k: v for k, v in row.items() if k not in known}, **(row.get("params") or {})}
    return ", ".join(f"{key} {value}" for key, value in own.items() if value is not None)


def _error(row: Mapping[str, Any]) -> str:
    return "" if row.get("stderr") is None else f"{row['stderr']:.2g}"


def _fill(text: str, block: str, content: str, name: str) -> str:
    pattern = re.compile(rf"^<!-- {block} -->$.*?^<!-- /{block} -->$", flags=re.MULTILINE | re.DOTALL)
    if not pattern.search(text):
        raise ZooError(f"card {name!r} opens the block {block!r} and does not close it; add <!-- /{block} -->")
    return pattern.sub(lambda _: f"<!-- {block} -->\n{content}\n<!-- /{block} -->", text, count=1)


def markdown(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A table in Markdown."""
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def count_text(number: int) -> str:
    """1316818944 -> 1.32B."""
    for size, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{suffix}"
    return str(number)


def bytes_text(number: int) -> str:
    """Bytes in decimal units: 4000000 -> 4 MB."""
    for size, suffix in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if number >= size:
            return f"{number / size:.3g} {suffix}"
    return f"{number} B"


def _folder() -> Path:
    return Path(str(files("zoo").joinpath("model_cards")))


def _readme() -> Path:
    return Path(str(files("zoo"))).parent / "README.md"


def _path(name: str) -> Path:
    path = _readme() if name == README else _folder() / f"{name}.md"
    if not path.exists():
        raise ZooError(f"there is no card {name!r}; choose one of {', '.join(targets()) or '(none)'}")
    return path
