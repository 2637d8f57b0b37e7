"""The training loop of healing: stages of steps over their rows, resumable at every step.

B rows of a batch, L tokens per row.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from zoo.conversion.core.lora import add_adapters, merge_adapters
from zoo.conversion.core.optim import make_optimizer, parameter_groups, set_rates
from zoo.conversion.core.progress import Meter
from zoo.conversion.core.rows import Array, Feed, shown
from zoo.conversion.core.stages import Stage
from zoo.conversion.core.work import Interrupt, Work


@dataclass
class Progress:
    """Where a run is: `stage` and `step` are the next to be done; `curves` holds `(tokens, loss)` pairs by stage.

    `tokens` is what it has trained on; `unread` is the sum of the losses since the last pair, in `count` steps.
    """

    stage: int = 0
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    unread: float = 0.0
    count: int = 0
    curves: dict[str, list[list[float]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Loop:
    """How steps are taken.

    Args:
        passes: parts of a batch that run one after the other, to save memory.
        clip: largest norm of the gradient.
        weight_decay: of AdamW.
        log_every: steps between two readings of the loss (a reading waits for the device).
        save_minutes: minutes between two checkpoints.
    """

    passes: int = 1
    clip: float = 1.0
    weight_decay: float = 0.01
    log_every: int = 10
    save_minutes: float = 10.0


class Trainer:
    """Runs stages on a student.

    Args:
        student: the model that trains; its parameters are fp32.
        new: names of the parameters that conversion added.
        work: where the state is kept.
        tracker: told the metrics too, of accelerate's kind.
    """

    def __init__(
        self,
        student: nn.Module,
        new: Sequence[str],
        loop: Loop,
        work: Work,
        accelerator: Accelerator,
        tracker: Any = None,
    ) -> None:
        self.student, self.new, self.loop, self.work, self.tracker = student, new, loop, work, tracker
        self.accelerator, self.interrupt = accelerator, Interrupt()
        self.progress = Progress()
        self.waiting: dict[str, Any] | None = None  # state of a stage that was stopped inside

    def resume(self) -> None:
        """Take up the state that `work` holds, if any."""
        state = self.work.load(self.accelerator.device)
        if state is None:
            return
        self.progress = Progress(**state["progress"])
        if state["optimizer"] is None:
            self.student.load_state_dict(state["student"])
        else:
            self.waiting = state  # its student may have adapters, which are there once the stage has begun

    def run(self, index: int, stage: Stage, objective: nn.Module, feed: Feed, meter: Meter) -> None:
        """Stage number `index`, from where the progress stands, on rows of `feed`.

        `objective(ids [B, L])` is its loss; that of a stage on predictions also takes `learned [B, L]`, True where the
        next token counts, or None.

        Raises:
            KeyboardInterrupt: a signal came; the state has been saved.
        """
        if self.progress.stage != index:
            return
        if stage.lora:
            add_adapters(self.student, stage.lora)
        if self.waiting is not None:
            self.student.load_state_dict(self.waiting["student"])
        groups = parameter_groups(self.student.named_parameters(), self.new, stage, self.loop.weight_decay)
        optimizer = make_optimizer(groups, self.accelerator.device)
        if self.waiting is not None:
            optimizer.load_state_dict(self.waiting["optimizer"])
            self.waiting = None
        module, prepared = self.accelerator.prepare(objective, optimizer)
        self.student.train()
        with self.interrupt.held():
            self._steps(stage, module, prepared, feed, meter)
        if stage.lora:
            merge_adapters(self.student)
        self.progress.stage, self.progress.step = index + 1, 0
        self._save(None)
        self.accelerator.free_memory(module, prepared)
        if self.interrupt.asked:
            raise KeyboardInterrupt(f"stopped after {stage.name}")

    def skip(self, index: int) -> None:
        """Leave stage number `index` out."""
        if self.progress.stage == index:
            self.progress.stage = index + 1

    def _steps(self, stage: Stage, module: nn.Module, optimizer: Any, feed: Feed, meter: Meter) -> None:
        place, saved = self.progress, time.monotonic()
        began = saved - place.seconds
        unread = torch.full((), place.unread, dtype=torch.float64, device=self.accelerator.device)
        while place.step < stage.steps:
            set_rates(optimizer, stage.factor(place.step))
            unread += self._step(stage, module, optimizer, feed)
            place.step, place.tokens, place.count = place.step + 1, place.tokens + stage.step_tokens, place.count + 1
            place.seconds = time.monotonic() - began
            if place.count == self.loop.log_every or place.step == stage.steps:
                self._log(stage, unread.item() / place.count, optimizer, meter)
                unread, place.count = torch.zeros_like(unread), 0
            stop = self.interrupt.asked and place.step < stage.steps
            if stop or time.monotonic() - saved > 60 * self.loop.save_minutes:
                place.unread, saved = unread.item(), time.monotonic()
                self._save(optimizer)
            if stop:
                raise KeyboardInterrupt(f"stopped after step {place.step} of {stage.name}")
        place.unread = 0.0

    def _step(self, stage: Stage, module: nn.Module, optimizer: Any, feed: Feed) -> Tensor:
        loss = torch.zeros((), device=self.accelerator.device)
        for share, args in self._parts(stage, feed):
            value = module(*args) * share
            self.accelerator.backward(value)
            loss += value.detach()
        self.accelerator.clip_grad_norm_(self.student.parameters(), self.loop.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    def _parts(self, stage: Stage, feed: Feed) -> Iterator[tuple[float, tuple[Tensor, ...]]]:
        """This process's rows of the next step, in parts: the part's share of the loss, what the objective is given.

        Where some tokens do not count, the shares are of those of the whole batch that do: processes whose gradients
        are averaged then give the gradient of one.
        """
        start, processes = self.progress.step * stage.batch_size, self.accelerator.num_processes
        ids, learned = shown(feed.batch(start, start + stage.batch_size))
        learned = stage.counted(learned)
        count, total = len(ids) // processes, 0.0 if learned is None else max(1, learned.sum()) / processes
        first = count * self.accelerator.process_index
        size = -(-count // self.loop.passes)
        for at in range(first, first + count, size):
            rows = slice(at, min(at + size, first + count))
            if learned is None:
                yield (rows.stop - at) / count, (self._moved(ids[rows]),)
            else:
                yield float(learned[rows].sum() / total), (self._moved(ids[rows]), self._moved(learned[rows]))

    def _moved(self, array: Array) -> Tensor:
        tensor = torch.from_numpy(array)
        if self.accelerator.device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self.accelerator.device, non_blocking=True)

    def _log(self, stage: Stage, loss: float, optimizer: Any, meter: Meter) -> None:
        tokens = self.progress.step * stage.step_tokens
        self.progress.curves.setdefault(stage.name, []).append([tokens, loss])
        meter.update(stage.name, tokens, loss)
        if self.accelerator.is_main_process:
            rates = {f"lr_{n}": group["lr"] for n, group in enumerate(optimizer.param_groups)}
            place = {"stage": stage.name, "step": self.progress.step, "tokens": tokens, "loss": loss}
            self.work.log({**place, "seconds": round(self.progress.seconds, 2), **rates})
            if self.tracker is not None:
                named = {f"{stage.name}/{name}": value for name, value in {"loss": loss, **rates}.items()}
                self.tracker.log(named, step=self.progress.tokens)

    def _save(self, optimizer: Any) -> None:
        if not self.accelerator.is_main_process:
            return
        state = None if optimizer is None else optimizer.state_dict()
        self.work.save({"student": self.student.state_dict(), "optimizer": state, "progress": vars(self.progress)})
