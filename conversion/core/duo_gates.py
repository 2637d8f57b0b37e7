"""Learns which KV heads need all tokens (DuoAttention, Xiao et al. 2024, arXiv 2410.10819).

    o_g = alpha_g full_g + (1 - alpha_g) stream_g        stream: the first `sinks` and the last `recent` tokens
    loss = mean over answer tokens and channels of (h - h')^2 + weight mean(alpha)

h and h' are the last hidden states of the model and of the model with gates. Only the gates learn, from 1 down; the
rows ask for passkeys that lie far back, so that heads which find them stay open.

B batch, T tokens, D hidden size, G KV heads.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from zoo.architectures.core.modeling import ZooForCausalLM
from zoo.architectures.mixers.attention import Attention
from zoo.conversion.core import recall
from zoo.conversion.core.judge import attending
from zoo.errors import ZooError
from zoo.kernels.attention import attention

Batch = tuple[Tensor, Tensor]  # ids [B, T], and which of them are answers, bool [B, T]
Report = Callable[[int, float, float], None]  # step, distillation loss, mean gate


def train_gates(
    model: ZooForCausalLM,
    batches: Iterable[Batch],
    *,
    sinks: int = 128,
    recent: int = 256,
    steps: int | None = None,
    lr: float = 0.02,
    weight: float = 0.05,
    report: Report | None = None,
) -> list[list[float] | None]:
    """The gates of each layer's KV heads, 0 to 1; None for a layer that is not full softmax attention.

    Args:
        model: its weights stay as they are.
        batches: see `Batch`; `steps` of them are used (by default all; then they must have a length).
        sinks, recent: tokens that a streaming head sees, the query's own counted.
        lr: highest learning rate of AdamW, which rises in the first fifth of the steps and falls in the last.
        weight: of the mean gate, which pulls gates to 0.
        report: called after each step.

    Raises:
        ZooError: the model has no layer of full softmax attention, or a batch has no answer.
    """
    mixers = gated_mixers(model)
    steps = len(batches) if steps is None else steps  # type: ignore[arg-type]
    gates = {index: nn.Parameter(torch.ones(mixer.kv_heads, device=model.device)) for index, mixer in mixers.items()}
    optimizer = torch.optim.AdamW(gates.values(), lr=lr, weight_decay=0.0)
    learning = {name: p.requires_grad for name, p in model.named_parameters()}
    model.requires_grad_(False)
    try:
        for step, (ids, answers) in zip(range(steps), batches, strict=False):
            for group in optimizer.param_groups:
                group["lr"] = lr * rate(step, steps)
            wrong = distance(model, mixers, gates, ids.to(model.device), answers.to(model.device), sinks, recent)
            opened = torch.cat(list(gates.values())).mean()
            optimizer.zero_grad()
            (wrong + weight * opened).backward()
            optimizer.step()
            with torch.no_grad():
                for gate in gates.values():
                    gate.clamp_(0, 1)
            if report is not None:
                report(step, wrong.item(), opened.item())
    finally:
        for name, p in model.named_parameters():
            p.requires_grad_(learning[name])
    found = {index: [round(a, 4) for a in gate.tolist()] for index, gate in gates.items()}
    return [found.get(index) for index in range(len(model.model.layers))]


def gated_mixers(model: ZooForCausalLM) -> dict[int, Attention]:
    """The full softmax attention of a model, by layer."""
    found = {}
    for index, block in enumerate(model.model.layers):
        mixer = getattr(block, "mixer", None)
        if isinstance(mixer, Attention) and mixer.recent is None and mixer.args.differential is None:
            found[index] = mixer
    if not found:
        raise ZooError("no layer has full softmax attention (mixer attention), whose heads could be gated")
    return found


def rate(step: int, steps: int) -> float:
    """Share of the highest learning rate."""
    part = max(1, steps // 5)
    return min(1.0, max((step + 1) / part, 0.1), max((steps - step) / part, 0.1))


def distance(
    model: ZooForCausalLM,
    mixers: Mapping[int, Attention],
    gates: Mapping[int, Tensor],
    ids: Tensor,
    answers: Tensor,
    sinks: int,
    recent: int,
) -> Tensor:
    """Mean square of what the gates change in the hidden states of the answers."""
    if not bool(answers.any()):
        raise ZooError("a batch has no answer tokens; the gates have nothing to learn from")
    with torch.no_grad():
        true = model.model(ids, use_cache=False).last_hidden_state[answers].float()
    with gated(mixers, gates, sinks, recent):
        found = model.model(ids, use_cache=False).last_hidden_state[answers].float()
    return (found - true).square().mean()


def gated(
    mixers: Mapping[int, Attention], gates: Mapping[int, Tensor], sinks: int, recent: int
) -> AbstractContextManager[None]:
    """Within it, the mixers attend as the gates say."""
    return attending({mixer: gated_attend(mixer, gates[index], sinks, recent) for index, mixer in mixers.items()})


def gated_attend(mixer: Attention, gate: Tensor, sinks: int, recent: int) -> Callable[..., Tensor]:
    plain, sink_logits = mixer.attend, mixer.sinks if mixer.args.sink_logits else None

    def attend(q: Tensor, keys: Any, ctx: Any) -> Tensor:
        options: Any = dict(window=recent, sink_tokens=sinks, sink_logits=sink_logits)
        few = attention(q, keys.k, keys.v, **options, **mixer.call(keys, ctx))
        share = gate.repeat_interleave(mixer.heads // mixer.kv_heads)[:, None].to(q.dtype)
        o: Tensor = few + share * (plain(q, keys, ctx) - few)
        return o

    return attend


def deployed(gates: Sequence[Sequence[float] | None], sparsity: float) -> list[dict[str, Any] | None]:
    """The options of `duo_attention` for each layer, with a share `sparsity` of all KV heads streaming."""
    if not 0 <= sparsity <= 1:
        raise ZooError(f"sparsity was {sparsity}; it must be 0 to 1")
    order = sorted(alpha for layer in gates if layer for alpha in layer)
    count = round(sparsity * len(order))
    threshold = order[count - 1] if count else -1.0
    return [None if layer is None else {"alphas": list(layer), "threshold": threshold} for layer in gates]


def passkey_batches(
    tokenizer: Any, filler: str, length: int, rows: int, steps: int, seed: int = 0, passkeys: int = 10
) -> Iterator[Batch]:
    """`steps` batches of `rows` rows of at most `length` tokens, padded behind: passkeys in a text, then questions for
    all of them, which with their answers are what counts."""
    rng, parts = random.Random(seed), recall.sentences(filler)
    for _ in range(steps):
        made = [passkey_row(rng, parts, tokenizer, length, passkeys) for _ in range(rows)]
        ids = torch.full((rows, length), tokenizer.eos_token_id)
        answers = torch.zeros(rows, length, dtype=torch.bool)
        for row, (tokens, start) in enumerate(made):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            answers[row, start : len(tokens)] = True
        yield ids, answers


def passkey_row(
    rng: random.Random, filler: Sequence[str], tokenizer: Any, length: int, passkeys: int
) -> tuple[list[int], int]:
    """Token ids, and where the questions begin; fewer passkeys where `length` does not hold them."""
    for count in range(passkeys, 0, -1):
        values = {key: recall.number(rng) for key in recall.distinct(recall.word_key, rng, count)}
        needles = [recall.NEEDLE.format(key=key, value=value) for key, value in values.items()]
        asked = "".join(f"\n{recall.QUESTION.format(key=key)} {value}." for key, value in values.items())
        chars = 5 * length
        while chars > 0:
            text = f"{recall.INTRODUCTION}\n{recall.haystack(rng, filler, needles, chars)}"
            head, tail = recall.encode(tokenizer, [text, asked])
            if (over := len(head) + len(tail) - length) <= 0:
                return head + tail, len(head)
            chars -= max(16, 3 * over)
    raise ZooError(f"length was {length}; it must hold a passkey and its question")
