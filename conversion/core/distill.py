"""Stages on predictions: forward and reverse KL to the teacher's next-token distribution, cross-entropy of the text.

B rows, T tokens, N = B * T, C tokens of a chunk, D hidden size, V vocabulary, k tokens of which a cache knows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from zoo.conversion.core.likeliest import Likeliest, log_rest

Head = Callable[[Tensor], Tensor]
KL = {"kl": 1.0}


def kl_sum(student: Tensor, teacher: Tensor, student_head: Head, teacher_head: Head) -> Tensor:
    """Sum over tokens of KL(teacher || student) in nats at temperature 1, from hidden states [C, D], in fp32."""
    log_q = torch.log_softmax(student_head(student).float(), dim=-1)
    log_p = torch.log_softmax(teacher_head(teacher).float(), dim=-1)
    return (log_p.exp() * (log_p - log_q)).sum()


def in_chunks(total: Callable[..., Tensor], tensors: tuple[Tensor, ...], chunk: int) -> Tensor:
    """The sum of `total(*tensors)` over chunks of their first axis.

    With several chunks the backward pass computes each chunk again, so that the logits of one alone are held.
    """
    if len(tensors[0]) <= chunk:
        return total(*tensors)
    parts = zip(*(tensor.split(chunk) for tensor in tensors), strict=True)
    return torch.stack([checkpoint(total, *part, use_reentrant=False) for part in parts]).sum()


def chunked_kl(student: Tensor, teacher: Tensor, student_head: Head, teacher_head: Head, chunk: int) -> Tensor:
    """Mean KL per token, from hidden states [N, D], holding the logits [C, V] of one chunk at a time."""
    total = partial(kl_sum, student_head=student_head, teacher_head=teacher_head)
    return in_chunks(total, (student, teacher), chunk) / len(student)


def divergence(log_q: Tensor, log_p: Tensor, loss: Mapping[str, float]) -> Tensor:
    """Weighted sum of KL(p || q) and KL(q || p) over the last axis."""
    kl, reverse = loss.get("kl", 0.0), loss.get("reverse_kl", 0.0)
    apart = log_p - log_q
    total = torch.zeros_like(log_q[..., 0])
    if kl:
        total = total + kl * (log_p.exp() * apart).sum(-1)
    if reverse:
        total = total - reverse * (log_q.exp() * apart).sum(-1)
    return total


def loss_sum(
    hidden: Tensor,
    labels: Tensor,
    weight: Tensor,
    *teacher: Tensor,
    student_head: Head,
    teacher_head: Head,
    loss: Mapping[str, float],
) -> Tensor:
    """Weighted sum over tokens of the loss in nats, in fp32.

    Args:
        hidden: [C, D] of the student. labels: [C], the next tokens. weight: [C].
        teacher: its hidden states [C, D]; or of a cache, tokens [C, k], their log-probabilities [C, k] and that of
            all others together [C]; or nothing.
        loss: weights of `kl`, `reverse_kl` and `cross_entropy`.
    """
    logits = student_head(hidden).float()
    log_q = torch.log_softmax(logits, dim=-1)
    total = torch.zeros_like(weight)
    if len(teacher) == 1:
        total = divergence(log_q, torch.log_softmax(teacher_head(*teacher).float(), dim=-1), loss)
    elif teacher:
        tokens, log_p, rest = teacher
        known = log_q.gather(-1, tokens)
        if tokens.shape[-1] < logits.shape[-1]:
            known = torch.cat([known, log_rest(log_q, tokens)[..., None]], dim=-1)
            log_p = torch.cat([log_p, rest[..., None]], dim=-1)
        total = divergence(known, log_p, loss)
    if loss.get("cross_entropy"):
        total = total - loss["cross_entropy"] * log_q.gather(-1, labels[:, None])[:, 0]
    return (total * weight).sum()


class Distill(nn.Module):
    """`ids [B, T]`, and where `[B, T]` the next token is learned, to the mean loss per learned token.

    With cross-entropy the last token of a row, whose successor is not in it, is left out.

    Args:
        student, teacher: causal models of one vocabulary.
        loss: weights of `kl` (teacher to student), `reverse_kl` and `cross_entropy`; without the first two the teacher
            is not run.
        chunk: tokens whose logits are held at once.
        compiled: compile the loss of a chunk.
        cache: what the teacher said before.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        loss: Mapping[str, float] = KL,
        chunk: int = 8192,
        compiled: bool = False,
        cache: Likeliest | None = None,
    ) -> None:
        super().__init__()
        self.student: Any = student
        self.loss, self.chunk, self.cache = loss, chunk, cache
        self.teacher: tuple[Any] = (teacher,)  # in a tuple: not a submodule, so neither trained nor saved
        self.total = torch.compile(loss_sum, dynamic=False) if compiled else loss_sum

    def forward(self, ids: Tensor, learned: Tensor | None = None) -> Tensor:
        said = self.said(ids)
        hidden = self.student.model(input_ids=ids, use_cache=False).last_hidden_state
        weight = torch.ones(ids.shape, device=ids.device) if learned is None else learned.float()
        if self.loss.get("cross_entropy"):
            weight = weight * (torch.arange(ids.shape[1], device=ids.device) < ids.shape[1] - 1)
        weight = weight / weight.sum().clamp(min=1)
        tokens = (hidden, ids.roll(-1, dims=1), weight, *said)
        heads = {"student_head": self.student.logits, "teacher_head": self.frozen_head}
        total = partial(self.total, loss=self.loss, **heads)
        return in_chunks(total, tuple(tensor.flatten(0, 1) for tensor in tokens), self.chunk)

    def said(self, ids: Tensor) -> tuple[Tensor, ...]:
        """What the loss needs of the teacher, `[B, T, ...]`."""
        if not (self.loss.get("kl") or self.loss.get("reverse_kl")):
            return ()
        return (self.hidden(ids),) if self.cache is None else self.cache.of(ids, self.hidden, self.frozen_head)

    def hidden(self, ids: Tensor) -> Tensor:
        """The teacher's hidden states [B, T, D]."""
        (teacher,) = self.teacher
        with torch.no_grad(), torch.autocast(ids.device.type, enabled=False):
            hidden: Tensor = teacher.model(input_ids=ids, use_cache=False).last_hidden_state
        return hidden

    def frozen_head(self, hidden: Tensor) -> Tensor:
        with torch.no_grad():
            return self.teacher[0].logits(hidden)
