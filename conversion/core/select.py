"""Layer selection: which layers of a softmax model keep their attention when the others are converted.

Every method gives a ranking, the layer that needs its attention most first. They measure different things and disagree;
published gains over a uniform choice do not always repeat, so that the uniform choice always stands beside the others.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from zoo.architectures.core.load import from_pretrained
from zoo.architectures.core.shards import atomic_directory, write_json
from zoo.conversion.core.judge import Judge, Samples
from zoo.conversion.core.scored import Scored
from zoo.conversion.core.select_heads import probe_heads
from zoo.conversion.core.select_plot import plot
from zoo.conversion.core.select_state import measure_states
from zoo.conversion.core.select_swap import Mixers, mixers_of, restore_greedily, swap_each
from zoo.conversion.core.work import Work
from zoo.errors import ZooError

# by method, what it needs beside the teacher and the probes
METHODS: dict[str, frozenset[str]] = {
    "uniform": frozenset(),
    "heads": frozenset(),
    "state_tolerance": frozenset({"data"}),
    "state_entropy": frozenset({"data"}),
    "swap_recall": frozenset({"bank"}),
    "swap_kl": frozenset({"bank", "data"}),
    "swap_perplexity": frozenset({"bank", "data"}),
    "greedy": frozenset({"bank"}),
}
STATE_ROWS = 4  # windows: a singular value decomposition per head and place
MEASURES = {"swap_recall": "recall_nll", "swap_kl": "kl", "swap_perplexity": "perplexity"}


@dataclass(frozen=True)
class Ranking:
    """One method's answer: layers, the most needed first; the `keep` of them; and the score of each, higher is more."""

    order: list[int]
    keep: list[int]
    scores: dict[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Selection:
    """What `select` found.

    Args:
        by: the method whose layers are kept.
        depth: layers of the teacher.
        rankings: by method; `uniform` is always there.
        heads: by `LAYER:HEAD` what the head probe measured, the best first.
        swaps: by layer what its swap alone cost, with that of the unchanged teacher as `teacher`.
    """

    by: str
    depth: int
    rankings: dict[str, Ranking]
    heads: dict[str, dict[str, float]] = field(default_factory=dict)
    swaps: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def keep(self) -> list[int]:
        """The layers to keep, as `zoo.convert(keep=...)` takes them."""
        return self.rankings[self.by].keep

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {"keep": self.keep, **asdict(self)}


def select(
    teacher: str | Path,
    out: str | Path,
    samples: Samples,
    *,
    keep: int,
    bank: str | Path | None = None,
    by: str | None = None,
    methods: Sequence[str] | None = None,
    window: int = 64,
    resume: bool = False,
    settings: Mapping[str, Any] | None = None,
    device: str | None = None,
    step: Callable[[str, int], None] = lambda name, total: None,
) -> Selection:
    """Rank the layers of `teacher` and write `ranking.json`, `ranking.svg` and `keep.txt` to `out`.

    Args:
        teacher: registered name, directory or hub id of a softmax model.
        out: the directory to write. Until it is whole, finished scores are in `OUT.partial/scores.jsonl`.
        samples: recall probes, and text for the methods that need it.
        keep: layers to keep.
        bank: a conversion of all layers of the teacher whose mixers are aligned and whose other weights are untouched.
        by: the method that decides; by default `swap_recall` with a bank and `heads` without.
        methods: those to run; by default all that the samples and the bank allow.
        window: tokens that a local head sees in the head probe.
        resume: go on from `OUT.partial`; everything else must be as it was.
        settings: what made the samples, written down and compared on resume.
        device: `cuda` or `cpu`; by default the GPU where there is one.
        step: told each measurement that is there and how many there will be, at most.

    Raises:
        ZooError: bad input, nothing is written then; or a teacher without recall.
    """
    chosen = wanted(methods, by, samples, bank)
    by = by or ("swap_recall" if "swap_recall" in chosen else chosen[-1])
    model, mixers = load(teacher, bank, device)
    layers = [index for index, layer in enumerate(model.model.decoder_config.layers) if layer.mixer == "attention"]
    layers = [index for index in layers if not mixers or index in mixers]
    if not 1 <= keep <= len(layers):
        raise ZooError(f"keep was {keep}; it must be 1 to {len(layers)}, the layers with attention to choose from")
    work = Work(Path(out))
    own = {"teacher": str(teacher), "bank": None if bank is None else str(bank), "window": window, "keep": keep}
    record = {**own, **(settings or {})}
    work.open(Path(out), record, resume)
    total = _total(model, chosen, layers, keep)
    scored = Scored(work.folder / "scores.jsonl", lambda name: step(name, total))
    try:
        selection = _Run(model, mixers, samples, layers, chosen, keep, window, scored).select(by)
    except ZooError:
        work.remove()
        raise
    with atomic_directory(Path(out)) as folder:
        write_json(folder / "ranking.json", {"format_version": 1, **selection.to_dict(), "settings": record})
        (folder / "ranking.svg").write_text(plot(selection.rankings, selection.depth), encoding="utf-8")
        (folder / "keep.txt").write_text(",".join(map(str, selection.keep)) + "\n", encoding="utf-8")
    work.remove()
    return selection


def wanted(methods: Sequence[str] | None, by: str | None, samples: Samples, bank: str | Path | None) -> list[str]:
    """The methods to run, in the order of `METHODS`; `uniform` is always among them.

    Raises:
        ZooError: an unknown method, or one that lacks what it needs.
    """
    given = {name for name, value in (("data", samples.text), ("bank", bank)) if value is not None}
    asked = None if methods is None else {*methods, "uniform", *([by] if by else [])}
    for name in (by,) if asked is None and by else sorted(asked or ()):
        if name not in METHODS:
            raise ZooError(f"method {name!r} is unknown; choose from {', '.join(METHODS)}")
        if lacking := sorted(METHODS[name] - given):
            raise ZooError(f"method {name!r} needs {' and '.join(f'--{each}' for each in lacking)}; give it")
    return [name for name, needs in METHODS.items() if needs <= given and (asked is None or name in asked)]


def load(teacher: str | Path, bank: str | Path | None, device: str | None) -> tuple[Any, Mixers]:
    """The teacher, and the bank's mixers by layer: on a GPU in their dtype, on a CPU in fp32."""
    if device not in (None, "cpu", "cuda"):
        raise ZooError(f"device was {device!r}; it must be cuda or cpu")
    cuda = torch.cuda.is_available() if device is None else device == "cuda"
    options: dict[str, Any] = {} if cuda else {"dtype": torch.float32}
    models = [from_pretrained(name, **options).eval().requires_grad_(False) for name in (teacher, bank) if name]
    models = [model.to("cuda" if cuda else "cpu") for model in models]
    return models[0], {} if bank is None else mixers_of(models[1], models[0], bank)


def uniform(depth: int, keep: int) -> list[int]:
    """`keep` of `depth` layers, evenly spread, the last one among them."""
    return [round((n + 1) * depth / keep) - 1 for n in range(keep)]


@dataclass
class _Run:
    """What all methods of one call share; each of them adds to `rankings`."""

    model: Any
    mixers: Mixers
    samples: Samples
    layers: list[int]
    methods: list[str]
    keep: int
    window: int
    scored: Scored
    rankings: dict[str, Ranking] = field(default_factory=dict)

    def select(self, by: str) -> Selection:
        even = [self.layers[index] for index in uniform(len(self.layers), self.keep)]
        self.rankings["uniform"] = Ranking([*even, *(layer for layer in self.layers if layer not in even)], even)
        heads = self.heads() if "heads" in self.methods else {}
        if variants := [name for name in ("tolerance", "entropy") if f"state_{name}" in self.methods]:
            self.states(variants)
        swaps = self.swaps() if self.mixers else {}
        return Selection(by, len(self.model.model.decoder_config.layers), self.rankings, heads, swaps)

    def add(self, method: str, scores: Mapping[int, float]) -> None:
        order = sorted(scores, key=lambda layer: -scores[layer])
        self.rankings[method] = Ranking(order, sorted(order[: self.keep]), dict(scores))

    def heads(self) -> dict[str, dict[str, float]]:
        """A layer's score is that of its best head."""
        judge = Judge(self.model, Samples(self.samples.probes))
        found = probe_heads(self.model, judge, self.layers, self.window, self.scored)
        self.add("heads", {at: max(x["score"] for (layer, _), x in found.items() if layer == at) for at in self.layers})
        return {f"{at[0]}:{at[1]}": found[at] for at in sorted(found, key=lambda at: -found[at]["score"])}

    def states(self, variants: Sequence[str]) -> None:
        assert self.samples.text is not None
        found = measure_states(self.model, self.samples.text[:STATE_ROWS, :-1], self.layers, self.scored)
        for name in variants:
            self.add(f"state_{name}", {layer: sizes[name] for layer, sizes in found.items()})

    def swaps(self) -> dict[str, dict[str, float]]:
        measures = {method: name for method, name in MEASURES.items() if method in self.methods}
        judge, found = Judge(self.model, self.samples), {}
        if measures:
            base = self.scored.get("swap/teacher", lambda: judge(self.model))
            each = swap_each(self.model, self.mixers, judge, self.scored)
            found = {"teacher": base, **{str(layer): scores for layer, scores in each.items()}}
            for method, name in measures.items():
                self.add(method, {layer: scores[name] - base[name] for layer, scores in each.items()})
        if "greedy" in self.methods:
            order, left = restore_greedily(self.model, self.mixers, judge, self.keep, self.scored)
            kept = sorted(order[: self.keep])
            self.rankings["greedy"] = Ranking(order, kept, {layer: -left[layer] for layer in order})
        return found


def _total(model: Any, methods: Collection[str], layers: list[int], keep: int) -> int:
    """How many measurements the methods take."""
    count = 0
    if "heads" in methods:
        count += 2 + 2 * sum(model.model.layers[layer].mixer.heads for layer in layers)
    if {"state_tolerance", "state_entropy"} & set(methods):
        count += len(layers)
    if set(MEASURES) & set(methods):
        count += 1 + len(layers)
    if "greedy" in methods:
        count += sum(len(layers) - n for n in range(keep))
    return count
