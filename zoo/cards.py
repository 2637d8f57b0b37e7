"""Model cards: prose by hand, tables between markers by command.

A card is `model_cards/<name>.md`, in Hugging Face's card format. Between `<!-- presets -->` and `<!-- /presets -->`, or
another block of `BLOCKS`, stands what a function here makes of the registries and of the results kept beside weights.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import EvalResult, ModelCard

from zoo import registry
from zoo.errors import ZooError

if TYPE_CHECKING:
    from zoo.evals.core.result import Result, Row

README = "README"
LENGTHS = {"1k": 1024, "32k": 32768, "1M": 1048576}  # tokens
ROUNDS_UP = 0.9995  # with three digits this share of a unit is already one
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


def stored_results(name: str) -> dict[str, Result]:
    """Results by task that are kept beside bundled weights; empty for a card that has none."""
    path = _folder() / "checkpoints" / name / "results.json"
    if name not in registry.names("checkpoints") or not path.exists():
        return {}
    from zoo.evals.core.result import read_results

    return read_results(path)


def preset_rows(name: str) -> list[tuple[str, ...]]:
    """Preset, parameters, layers, and bytes of state at `LENGTHS`, for each preset of an architecture."""
    return [_preset_row(name, preset) for preset in registry.get("architectures", name, "PRESETS")]


def _preset_row(name: str, preset: str) -> tuple[str, ...]:
    import torch

    from zoo import loading
    from zoo.architectures.core.modeling import model_class

    config = loading.config(name, preset=preset)
    with torch.device("meta"):
        model = model_class(config)(config)
    model.tie_weights()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    states = [bytes_text(model.state_bytes(length, 2)) for length in LENGTHS.values()]
    return (preset, count_text(parameters), str(config.num_hidden_layers), *states)


def presets_table(name: str) -> str:
    """Sizes of an architecture; state is for one sequence in a 16-bit dtype."""
    header = ("preset", "parameters", "layers", *(f"state at {length}" for length in LENGTHS))
    return markdown(header, preset_rows(name))


def headline(result: Result) -> list[Row]:
    """The rows that a card shows: all but those by position in the window."""
    return [row for row in result.rows if not row.metric.startswith("position_")]


def results_table(name: str) -> str:
    """Results kept beside the weights of a released checkpoint."""
    rows = [
        (task, row.metric, _condition(row), f"{row.value:.4g}", _error(row), "" if row.n is None else str(row.n))
        for task, result in stored_results(name).items()
        for row in headline(result)
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


def _with_model_index(text: str, name: str, results: Mapping[str, Result]) -> str:
    card = ModelCard(text, ignore_metadata_errors=False)
    data: Any = card.data
    data.model_name = name
    data.eval_results = [_eval_result(task, row) for task, result in results.items() for row in headline(result)]
    front = data.to_yaml(line_break="\n").strip()
    body = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)
    return f"---\n{front}\n---\n{body}"


def _eval_result(task: str, row: Row) -> EvalResult:
    condition = _condition(row)
    return EvalResult(
        task_type="text-generation",
        dataset_type=task,
        dataset_name=f"{task} ({condition})" if condition else task,
        dataset_config=condition or None,  # rows of one task stay apart by it
        metric_type=row.metric,
        metric_value=float(f"{row.value:.6g}"),
    )


def _condition(row: Row) -> str:
    """Where a number was taken: its length, position, ..."""
    return ", ".join(f"{key} {value}" for key, value in row.at.items())


def _error(row: Row) -> str:
    return "" if row.stderr is None else f"{row.stderr:.2g}"


def _fill(text: str, block: str, content: str, name: str) -> str:
    pattern = re.compile(rf"^<!-- {block} -->$.*?^<!-- /{block} -->$", flags=re.MULTILINE | re.DOTALL)
    if not pattern.search(text):
        raise ZooError(f"card {name!r} opens the block {block!r} and does not close it; add <!-- /{block} -->")
    return pattern.sub(lambda _: f"<!-- {block} -->\n{content}\n<!-- /{block} -->", text, count=1)


def markdown(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """A table in Markdown."""
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def count_text(number: int) -> str:
    """1316818944 -> 1.32B."""
    for size, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= ROUNDS_UP * size:
            return f"{number / size:.3g}{suffix}"
    return str(number)


def bytes_text(number: int) -> str:
    """Bytes in decimal units: 4000000 -> 4 MB."""
    for size, suffix in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if number >= ROUNDS_UP * size:
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
