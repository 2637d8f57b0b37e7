"""Conversations as data: which tokens are learned, how rows are packed, what a step's loss is. L tokens per row."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

from zoo.architectures.core.load import from_pretrained
from zoo.conversion.core.chat import chat_rows, packed
from zoo.conversion.core.convert import convert
from zoo.conversion.core.data import Plan, check, mixture
from zoo.conversion.core.distill import Distill
from zoo.conversion.core.heal import heal
from zoo.conversion.core.rows import Feed, shown
from zoo.conversion.core.stages import Stage
from zoo.conversion.core.trainer import Loop, Trainer
from zoo.conversion.core.work import Work
from zoo.errors import ZooError

PLAIN = (
    "{% for m in messages %}<{{ m.role }}>{% if m.reasoning_content %}({{ m.reasoning_content }}){% endif %}"
    "{{ m.content }};{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
MARKED = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }};{% endgeneration %}{% else %}{{ m.content }};{% endif %}{% endfor %}"
)
LAST_ONLY = "{% for m in messages %}<{{ m.role }}>{{ m.content if loop.last else '' }};{% endfor %}"
TALK = [("user", "river"), ("assistant", "the old man"), ("user", "by"), ("assistant", "inn")]


def byte_tokenizer(template: str | None) -> Any:
    """An id per byte, 0 the end; as many ids as a vocabulary of 257 has."""
    alphabet = ["<|end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    model = Tokenizer(models.BPE(vocab={token: n for n, token in enumerate(alphabet)}, merges=[]))
    model.pre_tokenizer, model.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<|end|>")
    made.chat_template = template
    return made


def write(file: Path, *talks: list[tuple[str, str]], **extra: str) -> str:
    lines = [{"messages": [{"role": role, "content": text, **extra} for role, text in talk]} for talk in talks]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(file)


def learned_text(tokenizer: Any, row: Any) -> str:
    """The tokens of a row that some place before them learns."""
    ids, learned = shown(row[None])
    assert learned is not None
    return str(tokenizer.decode(ids[0, 1:][learned[0, :-1]]))


# ---- what is learned ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_the_replies_of_a_conversation_are_learned_and_nothing_else(template: str, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(template)
    (row,) = chat_rows(write(tmp_path / "a.jsonl", TALK), tokenizer, 80, 0)
    text = "".join(f"<{role}>{said};" for role, said in TALK)
    assert tokenizer.decode(shown(row[None])[0][0]) == text + "<|end|>" * (80 - len(text))
    assert learned_text(tokenizer, row) == "the old man;inn;"


def test_reasoning_is_part_of_the_reply(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(PLAIN)
    file = write(tmp_path / "a.jsonl", TALK[:2], reasoning_content="hm")
    assert learned_text(tokenizer, chat_rows(file, tokenizer, 80, 0)[0]) == "(hm)the old man;"


def test_rows_are_packed_with_no_loss_across_and_long_conversations_are_cut(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(PLAIN)
    talks = [[("user", "q" * n), ("assistant", "r" * n)] for n in (1, 2, 3, 30)]
    rows = chat_rows(write(tmp_path / "a.jsonl", *talks), tokenizer, 80, 0)
    texts = [tokenizer.decode(ids) for ids in shown(rows)[0]]
    whole = ["<user>" + "q" * n + ";<assistant>" + "r" * n + ";" for n in (1, 2, 3, 30)]
    assert all(sum(text in row for row in texts) == 1 for text in whole) and len(rows) == 2
    assert sorted("".join(learned_text(tokenizer, row) for row in rows).split(";")) == [
        "", "r", "rr", "rrr", "r" * 30
    ]  # fmt: skip
    (cut,) = chat_rows(write(tmp_path / "b.jsonl", talks[3]), tokenizer, 60, 0)
    assert learned_text(tokenizer, cut) == "r" * 12  # of 60 tokens the prompt takes 48


def test_packing_keeps_every_part_whole_and_wastes_little() -> None:
    rng = np.random.default_rng(0)
    parts = [np.full(int(size), n) for n, size in enumerate(rng.integers(1, 40, 300))]
    rows = packed(parts, 64, -1, 0)
    assert {n: int((rows == n).sum()) for n in range(300)} == {n: len(part) for n, part in enumerate(parts)}
    assert all(len(np.unique(np.nonzero(rows == n)[0])) == 1 for n in range(300))
    assert (rows == -1).mean() < 0.03


# ---- what is refused ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("template", "line", "message"),
    [
        (None, None, "needs a chat template"),
        (PLAIN, '{"text": "a"}', r"line 1 has no messages"),
        (PLAIN, '{"messages": []}', r"line 1 has no messages"),
        (PLAIN, '{"messages": ', r"line 1 is no JSON"),
        (PLAIN, '{"messages": [{"role": "user", "content": "a"}]}', "no reply of an assistant"),
        (MARKED, '{"messages": [{"role": "assistant", "content": "a", "reasoning_content": "b"}]}', "leaves out"),
        (LAST_ONLY, None, "message 2 otherwise once more follow"),
        ("{{ raise_exception('roles') }}", None, r"does not fit the chat template \(roles"),
    ],
)
def test_conversations_that_cannot_be_used_are_refused(
    template: str | None, line: str | None, message: str, tmp_path: Path
) -> None:
    file = tmp_path / "a.jsonl"
    write(file, TALK) if line is None else file.write_text(line + "\n")
    with pytest.raises(ZooError, match=message) as error:
        chat_rows(str(file), byte_tokenizer(template), 80, 0)
    assert "\n" not in str(error.value)


# ---- the loss of a step ---------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def models_of(hard_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Teacher and student, with words of 96 ids."""
    student = tmp_path_factory.mktemp("chat") / "student"
    convert(hard_llama, student, mixer="gated_delta_net", keep=[2], fresh_process=False)
    return hard_llama, student


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("loss", [{"kl": 1.0}, {"kl": 0.5, "cross_entropy": 0.25}])
def test_a_step_is_the_loss_over_the_learned_tokens_of_the_batch(
    passes: int, loss: dict[str, float], models_of: tuple[Path, Path], tmp_path: Path
) -> None:
    teacher, student = (from_pretrained(path, dtype=torch.float32).eval() for path in models_of)
    rows = np.random.default_rng(0).integers(1, 90, (4, 12))
    learned = np.random.default_rng(1).random((4, 12)) < np.array([[0.1], [0.9], [0.5], [0.5]])
    stage = Stage("distill", "distill", 48, 12, 4, 1e-3, 1e-3, loss=loss)
    mixed: Any = SimpleNamespace(batch=lambda start, stop: np.where(learned, rows, ~rows))
    trainer = Trainer(student, [], Loop(passes=passes), Work(tmp_path / "out"), Accelerator(cpu=True))
    objective, idle = Distill(student, teacher, loss), torch.optim.SGD(student.parameters(), lr=0.0)
    came = trainer._step(stage, objective, idle, Feed(mixed, 0, 4)).item()
    ids = torch.from_numpy(rows)
    q, p = (model(ids).logits.log_softmax(-1) for model in (student, teacher))
    each = loss["kl"] * F.kl_div(q, p, log_target=True, reduction="none").sum(-1)
    if "cross_entropy" in loss:  # the last token's successor is not in the row
        ce = F.cross_entropy(q[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
        each, learned = each[:, :-1] + loss["cross_entropy"] * ce, learned[:, :-1]
    assert came == pytest.approx(each[torch.from_numpy(learned)].mean().item(), rel=1e-4)


def test_a_student_heals_on_conversations_and_text(models_of: tuple[Path, Path], tmp_path: Path) -> None:
    teacher, student = models_of
    (tmp_path / "t.txt").write_text("the river old man by inn " * 50)
    file = write(tmp_path / "a.jsonl", *[TALK] * 20)
    options: dict[str, Any] = {"align_tokens": 64, "distill_tokens": 64, "length": 16, "batch_size": 4}
    options |= {"progress": False, "device": "cpu", "data": f"{file},{tmp_path / 't.txt'}"}
    report = heal(teacher, student, tmp_path / "out", **options)
    assert report.tokens == 128 and np.isfinite(report.curves["distill"][-1][1])
    write(tmp_path / "a.jsonl", TALK[:1])
    with pytest.raises(ZooError, match="no reply of an assistant"):
        heal(teacher, student, tmp_path / "again", **options)
    assert not list(tmp_path.glob("again*"))


def test_conversations_mix_with_text_by_their_shares(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(PLAIN)
    (tmp_path / "t.txt").write_text("plain text " * 100)
    file = write(tmp_path / "a.jsonl", *[TALK] * 5)
    plan = Plan(length=80, total=8, seed=0, cache=tmp_path / "cache")
    rows = mixture(check(f"{file}=0.5,{tmp_path / 't.txt'}"), None, tokenizer, plan).batch(0, 8)
    hidden = (rows < 0).any(1)
    assert rows.shape == (8, 80) and hidden.sum() == 4
    assert all("plain text" in tokenizer.decode(row) for row in rows[~hidden])
