"""The stages of a healing run: what each may be told, its defaults by kind and device, its schedule.

A stage is one of four kinds. *matrix*: each new mixer's mixing matrix learns the attention matrix. *align*: its output
learns the attention's output. *distill*: the whole model learns the teacher's predictions. *long*: the same on longer
rows, by default on the text itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zoo.errors import ZooError

KINDS = ("matrix", "align", "distill", "long")
MIXER_KINDS = ("matrix", "align")  # train each new mixer alone
LOSSES = ("kl", "reverse_kl", "cross_entropy")
FALLS = ("linear", "cosine")

Array = NDArray[np.bool_]
Check = Callable[[Any], Any]  # the value, in its type; ValueError says what it must be


@dataclass(frozen=True)
class Lora:
    """Adapters of low rank on the linear layers whose names end in one of `targets`, times `alpha / rank`."""

    rank: int
    alpha: float
    targets: tuple[str, ...]


@dataclass(frozen=True)
class Stage:
    """One stage of healing.

    Args:
        kind: one of `KINDS`.
        name: the kind; from the second of a kind on with a number.
        tokens: of one epoch. epochs: times that the same rows are read.
        length: tokens per row. batch_size: rows per step, over all processes.
        lr_new, lr_copied: highest learning rate of new and of transferred parameters; 0 freezes them. In `matrix` and
            `align` only the new mixers' parameters can train.
        warmup: share of the steps in which the rate rises.
        hold: share of the steps after which it falls to `final` (a share of the highest) along `fall`.
        loss: weights of `LOSSES`, in `distill` and `long`.
        lora: adapters that train at `lr_copied` in the transferred parameters' place; merged at the end of the stage.
        teacher_cache: keep what the teacher says in the run's cache: 0 does not, k of `distill` and `long` keeps
            the k likeliest tokens of each place, 1 of `align` keeps inputs and outputs of the mixers.
        data: sources and their shares.
    """

    kind: str
    name: str
    tokens: int
    length: int
    batch_size: int
    lr_new: float
    lr_copied: float
    epochs: int = 1
    warmup: float = 0.05
    hold: float = 0.2
    final: float = 0.02
    fall: str = "linear"
    loss: Mapping[str, float] = field(default_factory=dict)
    lora: Lora | None = None
    teacher_cache: int = 0
    data: str = "self"

    @property
    def epoch_steps(self) -> int:
        """Optimizer steps of one epoch."""
        return -(-self.tokens // (self.batch_size * self.length))

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return self.epochs * self.epoch_steps

    @property
    def rows(self) -> int:
        """Different rows that it reads."""
        return self.epoch_steps * self.batch_size

    @property
    def step_tokens(self) -> int:
        return self.batch_size * self.length

    @property
    def mixers_alone(self) -> bool:
        return self.kind in MIXER_KINDS

    @property
    def hears_teacher(self) -> bool:
        return self.mixers_alone or bool(self.loss.get("kl") or self.loss.get("reverse_kl"))

    def counted(self, learned: Array | None) -> Array | None:
        """Where `[B, L]` the loss counts, from where the next token is to be learned; None is everywhere.

        A row's last token has no successor in it, which cross-entropy would need.
        """
        if self.mixers_alone or learned is None:
            return None
        if self.loss.get("cross_entropy"):
            learned[:, -1] = False
        return learned

    def factor(self, step: int) -> float:
        """The learning rate of step `step` (from 0) over its highest."""
        rise = (step + 1) / max(1.0, self.warmup * self.steps)
        left = min(1.0, (self.steps - step) / max(1.0, (1 - self.hold) * self.steps))
        fall = left if self.fall == "linear" else self.final + (1 - self.final) * (1 - math.cos(math.pi * left)) / 2
        return min(1.0, rise, max(self.final, fall))


# ---- what may be said -----------------------------------------------------------------------------------------------
def whole(least: int) -> Check:
    def check(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError("a whole number")
        if value < least:
            raise ValueError(f"at least {least}")
        return value

    return check


def number(most: float = math.inf) -> Check:
    """0 to `most`; text such as 1e-4, which YAML does not take for a number, is one."""

    def check(value: Any) -> float:
        bounds = "a number of at least 0" if most == math.inf else f"a number from 0 to {most:g}"
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            raise ValueError(bounds)
        try:
            found = float(value)
        except ValueError:
            raise ValueError(bounds) from None
        if not 0 <= found <= most or found == math.inf:
            raise ValueError(bounds)
        return found

    return check


def text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError("text")
    return value


def one_of(*names: str) -> Check:
    def check(value: Any) -> str:
        if value not in names:
            raise ValueError(f"one of {', '.join(names)}")
        return str(value)

    return check


def losses(value: Any) -> dict[str, float]:
    if not isinstance(value, Mapping) or not value or not set(value) <= set(LOSSES):
        raise ValueError(f"weights of {', '.join(LOSSES)}, like {{kl: 1, cross_entropy: 0.1}}")
    found = {name: number()(weight) for name, weight in value.items()}
    if not any(found.values()):
        raise ValueError("weights of which one is above 0")
    return found


def lora(value: Any) -> Lora:
    example = "{rank: 8, alpha: 16, targets: [q_proj, v_proj]}"
    if isinstance(value, Lora):
        return value
    if not isinstance(value, Mapping) or not {"rank", "targets"} <= set(value) <= {"rank", "alpha", "targets"}:
        raise ValueError(f"like {example}; alpha is twice the rank when left out")
    targets = value["targets"]
    if not isinstance(targets, Sequence) or not targets or not all(isinstance(name, str) for name in targets):
        raise ValueError(f"like {example}: targets are names of linear layers")
    try:
        rank = whole(1)(value["rank"])
        return Lora(rank, number()(value.get("alpha", 2 * rank)), tuple(targets))
    except ValueError as error:
        raise ValueError(f"like {example}: rank and alpha are numbers, {error}") from None


def teacher_cache(value: Any) -> int:
    """`{k: 64}`, or `true` in align."""
    if isinstance(value, bool):
        return int(value)
    if not isinstance(value, Mapping) or set(value) != {"k"}:
        raise ValueError("like {k: 64}, or true in stage align")
    return int(whole(1)(value["k"]))


FIELDS: dict[str, Check] = {
    "tokens": whole(0),
    "epochs": whole(1),
    "length": whole(2),
    "batch_size": whole(1),
    "lr_new": number(),
    "lr_copied": number(),
    "warmup": number(1),
    "hold": number(1),
    "final": number(1),
    "fall": one_of(*FALLS),
    "loss": losses,
    "lora": lora,
    "teacher_cache": teacher_cache,
    "data": text,
}


def checked(name: str, value: Any, fields: Mapping[str, Check], where: str = "") -> Any:
    """`value` in its type.

    Raises:
        ZooError: it is not what `fields` says of `name`; the message begins with `where`.
    """
    try:
        return fields[name](value)
    except ValueError as error:
        raise ZooError(f"{where}{name} was {value!r}; it must be {error}") from None


# ---- defaults -------------------------------------------------------------------------------------------------------
def defaults(kind: str, cuda: bool, longest: int) -> dict[str, Any]:
    """What a stage is when nothing is said; a CPU gets little, as a 4M-parameter model then takes three minutes on two
    cores. Few steps end lower at higher rates.

    Args:
        longest: tokens that the teacher can read.
    """
    length = min(longest, 2048 if cuda else 256)
    if kind == "matrix":
        return {"tokens": 10_000_000 if cuda else 20_000, "length": min(length, 512), "lr_new": 1e-3, "lr_copied": 0.0}
    if kind == "align":
        return {"tokens": 10_000_000 if cuda else 40_000, "length": length, "lr_new": 1e-2, "lr_copied": 0.0}
    if kind == "distill":
        rates = {"lr_new": 2e-3, "lr_copied": 1e-3} if cuda else {"lr_new": 4e-3, "lr_copied": 2e-3}
        return {"tokens": 50_000_000 if cuda else 160_000, "length": length, "loss": {"kl": 1.0}, **rates}
    length = min(longest, 16_384 if cuda else 1024)
    tokens, rates = 10_000_000 if cuda else 40_000, {"lr_new": 1e-4, "lr_copied": 1e-4}
    return {"tokens": tokens, "length": length, "loss": {"cross_entropy": 1.0}, **rates}


def make_stage(kind: str, name: str, given: Mapping[str, Any], cuda: bool, longest: int) -> Stage:
    """A stage of checked fields `given`, the rest by default.

    Raises:
        ZooError: fields that do not go together, or rows that the teacher cannot read.
    """
    values = {**defaults(kind, cuda, longest), **given}
    values.setdefault("batch_size", max(1, (32_768 if cuda else 2048) // values["length"]))
    stage = Stage(kind=kind, name=name, **values)
    if stage.mixers_alone and (stage.loss or stage.lora):
        raise ZooError(f"stage {name} was given {'loss' if stage.loss else 'lora'}; stages distill and long take it")
    if stage.teacher_cache and (kind == "matrix" or not stage.hears_teacher):
        raise ZooError(f"stage {name} was given teacher_cache; it asks the teacher for nothing that could be kept")
    if kind == "align" and stage.teacher_cache > 1:
        raise ZooError("stage align was given teacher_cache {k: ...}; there it is true: all of its inputs and outputs")
    if stage.lr_new == stage.lr_copied == 0:
        raise ZooError(f"stage {name} has lr_new and lr_copied 0; nothing would train")
    if stage.lora and not stage.lr_copied:
        raise ZooError(f"stage {name} has lora and lr_copied 0; give lr_copied, the rate of its adapters")
    sampled = any(part.partition("=")[0].strip() == "self" for part in stage.data.split(","))
    if (stage.hears_teacher or sampled) and stage.length > longest:
        raise ZooError(f"stage {name}: length was {stage.length}; the teacher reads at most {longest} tokens")
    return stage
