"""Stage distill: forward KL from the teacher's next-token distribution to the student's.

B rows, T tokens, N = B * T, C tokens of a chunk, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Head = Callable[[Tensor], Tensor]


def kl_sum(student: Tensor, teacher: Tensor, student_head: Head, teacher_head: Head) -> Tensor:
    """Sum over tokens of KL(teacher || student) in nats at temperature 1, from hidden states [C, D], in fp32."""
    log_q = torch.log_softmax(student_head(student).float(), dim=-1)
    log_p = torch.log_softmax(teacher_head(teacher).float(), dim=-1)
    return (log_p.exp() * (log_p - log_q)).sum()


def chunked_kl(
    student: Tensor, teacher: Tensor, student_head: Head, teacher_head: Head, chunk: int, kl: Any = kl_sum
) -> Tensor:
    """Mean KL per token, from hidden states [N, D], holding the logits [C, V] of one chunk at a time.

    With several chunks the backward pass computes each chunk's logits again.
    """
    if len(student) <= chunk:
        return kl(student, teacher, student_head, teacher_head) / len(student)
    parts = zip(student.split(chunk), teacher.split(chunk), strict=True)
    sums = [checkpoint(kl, s, t, student_head, teacher_head, use_reentrant=False) for s, t in parts]
    return torch.stack(sums).sum() / len(student)


class Distill(nn.Module):
    """`ids [B, T]` to the mean KL per token.

    Args:
        student, teacher: causal models of one vocabulary.
        chunk: tokens whose logits are held at once.
        compiled: compile the loss of a chunk.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, chunk: int = 8192, compiled: bool = False) -> None:
        super().__init__()
        self.student: Any = student
        self.chunk = chunk
        self.teacher: tuple[Any] = (teacher,)  # in a tuple: not a submodule, so neither trained nor saved
        self.kl = torch.compile(kl_sum, dynamic=False) if compiled else kl_sum

    def forward(self, ids: Tensor) -> Tensor:
        (teacher,) = self.teacher
        with torch.no_grad(), torch.autocast(ids.device.type, enabled=False):
            target = teacher.model(input_ids=ids, use_cache=False).last_hidden_state
        hidden = self.student.model(input_ids=ids, use_cache=False).last_hidden_state
        heads = self.student.logits, self.frozen_head
        return chunked_kl(hidden.flatten(0, 1), target.flatten(0, 1), *heads, self.chunk, self.kl)

    def frozen_head(self, hidden: Tensor) -> Tensor:
        with torch.no_grad():
            return self.teacher[0].logits(hidden)
