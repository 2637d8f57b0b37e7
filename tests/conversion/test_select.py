"""Layer selection: every score against a model built for it, a formula written out, or a case that is known."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaForCausalLM
from typer.testing import CliRunner

import zoo
from zoo.architectures.core.load import from_pretrained
from zoo.cli import app
from zoo.conversion.core import select_heads
from zoo.conversion.core.convert import convert
from zoo.conversion.core.heal import heal
from zoo.conversion.core.judge import Judge, Samples
from zoo.conversion.core.recall import Probe
from zoo.conversion.core.scored import Scored
from zoo.conversion.core.select import METHODS, uniform
from zoo.conversion.core.select_heads import local_heads, probe_heads
from zoo.conversion.core.select_state import measure_states, state_sizes
from zoo.conversion.core.select_swap import mixers_of, restore_greedily, swap_each
from zoo.errors import ZooError

LAYERS = range(3)
TEXT = torch.randint(96, (2, 33), generator=torch.Generator().manual_seed(0))
PROBES = [Probe(TEXT[0, :20].tolist(), 15), Probe(TEXT[1, :31].tolist(), 28)]


def load(folder: Path) -> Any:
    return from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def kl(teacher: Tensor, model: Tensor) -> float:
    """Nats per token, by torch's own function."""
    p, q = (x.flatten(0, -2).double().log_softmax(-1) for x in (teacher, model))
    return float(F.kl_div(q, p, log_target=True, reduction="batchmean"))


def answers(model: Any) -> Tensor:
    """Logits at the tokens of all answers, one prompt at a time."""
    return torch.cat([logits(model, torch.tensor([p.ids]))[0, p.start - 1 : -1] for p in PROBES])


@pytest.fixture(scope="module")
def swapped(hard_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, ...], Path]:
    """`hard_llama` with every choice of layers that keep their attention."""
    folder, found = tmp_path_factory.mktemp("swapped"), {}
    for kept in ((), (0,), (1,), (2,), (0, 1), (0, 2), (1, 2)):
        found[kept] = folder / "".join(map(str, ["kept", *kept]))
        convert(hard_llama, found[kept], mixer="gated_delta_net", keep=kept, fresh_process=False)
    return found


# ---- what a change costs --------------------------------------------------------------------------------------------
def test_the_judge_measures_what_the_logits_say(hard_llama: Path, swapped: dict[tuple[int, ...], Path]) -> None:
    teacher, model = load(hard_llama), load(swapped[1,])
    found = Judge(teacher, Samples(PROBES, TEXT), batch_tokens=40)(model)
    text, recall = logits(model, TEXT[:, :-1]), answers(model)
    right = torch.tensor([token for p in PROBES for token in p.ids[p.start :]])
    expected = {
        "kl": kl(logits(teacher, TEXT[:, :-1]), text),
        "perplexity": float(F.cross_entropy(text.flatten(0, 1), TEXT[:, 1:].flatten()).exp()),
        "recall_nll": float(F.cross_entropy(recall, right)),
        "recall_kl": kl(answers(teacher), recall),
        "recall_accuracy": 0.0,
    }
    assert found == pytest.approx(expected, rel=1e-4)


def test_an_answer_counts_when_every_token_of_it_is_right(hard_llama: Path) -> None:
    teacher = load(hard_llama)
    best = logits(teacher, TEXT[:1, :10])[0, -1].argmax().item()
    row = TEXT[0, :10].tolist()
    second = logits(teacher, torch.tensor([[*row, best]]))[0, -1].argmax().item()
    probes = [Probe([*row, best, second], 10), Probe([*row, best, (second + 1) % 96], 10)]
    assert Judge(teacher, Samples(probes))(teacher)["recall_accuracy"] == 0.5


# ---- one layer at a time from the bank ------------------------------------------------------------------------------
def test_a_swap_costs_what_the_model_with_that_layer_converted_does(
    hard_llama: Path, swapped: dict[tuple[int, ...], Path]
) -> None:
    teacher, bank = load(hard_llama), load(swapped[()])
    mixers = mixers_of(bank, teacher, "bank")
    judge, expected = Judge(teacher, Samples(PROBES, TEXT)), logits(teacher, TEXT[:, :-1])
    found = swap_each(teacher, mixers, judge, Scored())
    for layer in LAYERS:
        other = load(swapped[tuple(sorted({*LAYERS} - {layer}))])
        assert found[layer]["kl"] == pytest.approx(kl(expected, logits(other, TEXT[:, :-1])), rel=1e-4)
    assert torch.equal(logits(teacher, TEXT[:, :-1]), expected)


def test_greedy_restores_the_layer_that_leaves_the_least_kl(
    hard_llama: Path, swapped: dict[tuple[int, ...], Path]
) -> None:
    teacher = load(hard_llama)
    expected, recall = logits(teacher, TEXT[:, :-1]), answers(teacher)

    def left(kept: tuple[int, ...]) -> float:
        model = load(swapped[tuple(sorted(kept))])
        return kl(expected, logits(model, TEXT[:, :-1])) + kl(recall, answers(model))

    first = min(LAYERS, key=lambda layer: left((layer,)))
    rest = sorted({*LAYERS} - {first}, key=lambda layer: left((first, layer)))
    mixers = mixers_of(load(swapped[()]), teacher, "bank")
    order, alone = restore_greedily(teacher, mixers, Judge(teacher, Samples(PROBES, TEXT)), 2, Scored())
    assert order == [first, *rest]
    assert alone == pytest.approx({layer: left((layer,)) for layer in LAYERS}, rel=1e-4)


def test_a_bank_is_a_conversion_of_which_only_mixers_were_trained(
    hard_llama: Path, swapped: dict[tuple[int, ...], Path], tmp_path: Path
) -> None:
    teacher = load(hard_llama)
    with pytest.raises(ZooError, match="is no conversion of the teacher"):
        mixers_of(load(hard_llama), teacher, "bank")
    text = tmp_path / "text.txt"
    text.write_text("the old man by the river inn " * 400)
    sizes = {"length": 16, "batch_size": 2, "progress": False, "device": "cpu", "data": str(text)}
    heal(hard_llama, swapped[1, 2], tmp_path / "aligned", align_tokens=64, distill_tokens=0, **sizes)
    assert list(mixers_of(load(tmp_path / "aligned"), teacher, "bank")) == [0]
    heal(hard_llama, swapped[1, 2], tmp_path / "distilled", align_tokens=0, distill_tokens=64, **sizes)
    with pytest.raises(ZooError, match="differs from the teacher in"):
        mixers_of(load(tmp_path / "distilled"), teacher, "bank")


# ---- heads ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("heads", [[0], [1, 4], range(6)])
def test_local_heads_are_transformers_attention_with_a_mask_for_them(hard_llama: Path, heads: list[int]) -> None:
    ids, window, lowest = TEXT[:1, :24], 5, torch.finfo(torch.float32).min
    query, key = torch.arange(24)[:, None], torch.arange(24)[None]
    causal, near = key <= query, (query - key < window) | (key == 0)
    seen = causal.repeat(6, 1, 1)
    seen[list(heads)] &= near
    reference = LlamaForCausalLM.from_pretrained(hard_llama, attn_implementation="eager", dtype=torch.float32).eval()
    with torch.no_grad():
        expected = reference(ids, attention_mask=torch.where(seen, 0.0, lowest)[None], use_cache=False).logits
    model = load(hard_llama)
    whole = logits(model, ids)
    with local_heads(model, dict.fromkeys(LAYERS, heads), window):
        found = logits(model, ids)
    assert (found - expected).abs().max() < 1e-4 * expected.std()
    assert (found - whole).abs().max() > 1e-2 * expected.std()
    assert torch.equal(logits(model, ids), whole)


def test_either_of_two_heads_that_do_the_same_is_found(hard_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recall needs one of the heads 1:2 and 2:0, and half as much of it the head 0:5 beside them."""
    far: set[tuple[int, int]] = set()

    @contextmanager
    def mark(model: Any, local: dict[int, Any], window: int) -> Iterator[None]:
        far.clear()
        far.update((layer, head) for layer in LAYERS for head in range(6) if head not in local.get(layer, ()))
        yield

    def judge(model: Any) -> dict[str, float]:
        recalls = bool(far & {(1, 2), (2, 0)})
        return {"recall_nll": 9.0 - 6.0 * recalls - 3.0 * (recalls and (0, 5) in far)}

    monkeypatch.setattr(select_heads, "local_heads", mark)
    found = probe_heads(load(hard_llama), judge, LAYERS, 5, Scored())  # type: ignore[arg-type]
    scores = {at: round(x["score"], 6) for at, x in found.items() if x["score"]}
    assert scores == {(1, 2): round(6 / 18, 6), (2, 0): round(6 / 18, 6), (0, 5): round(3 / 18, 6)}


def test_a_teacher_without_recall_is_told_so(hard_llama: Path) -> None:
    teacher = load(hard_llama)
    probe = Probe(TEXT[0, :4].tolist(), 3)
    with pytest.raises(ZooError, match="recalls nothing of the lists"):
        probe_heads(teacher, Judge(teacher, Samples([probe])), LAYERS, 5, Scored())


@pytest.mark.slow
@pytest.mark.shared
def test_the_recall_of_the_books_model_runs_through_layer_11_heads_0_and_2(shared: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = dict(keep=1, methods=["heads"], samples=2, pairs=20, device="cpu", progress=False)
    found = zoo.select(shared / "checkpoints" / "books-llama-22m", tmp_path / "out", **options)
    assert found.keep == [11] and {*list(found.heads)[:2]} == {"11:0", "11:2"}
    assert found.heads["11:2"]["score"] > 3 * list(found.heads.values())[2]["score"]


# ---- effective state size -------------------------------------------------------------------------------------------
def test_effective_state_sizes_of_known_operators() -> None:
    tokens, places = 32, (4, 8, 16, 24, 28)
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 1, tokens, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    lower = torch.ones(tokens, tokens, dtype=torch.float64).tril()
    scores = torch.randn(1, 1, tokens, tokens, generator=generator, dtype=torch.float64)
    softmax = (3 * scores).masked_fill(lower == 0, -torch.inf).softmax(-1)
    near = (lower - lower.tril(-7)) * scores
    cases = {
        "running sum": (lower[None, None], lambda i: 1),
        "linear attention": (q @ k.mT * lower, lambda i: min(i, 5, tokens - i)),
        "softmax": (softmax, lambda i: min(i, tokens - i)),
        "window": (near, lambda i: min(i, 6, tokens - i)),
    }
    for name, (weights, size) in cases.items():
        for place in places:
            assert state_sizes(weights, [place], 1e-9)[0].item() == size(place), (name, place)
    counts, entropies = state_sizes(torch.cat([lower[None, None], softmax], dim=1), places)
    assert entropies[0, 0].item() == pytest.approx(1.0)
    # equal singular values count in full
    assert state_sizes(torch.eye(8).roll(4, 0)[None, None], [4])[1].item() == pytest.approx(4.0)
    assert 1 < entropies[0, 1] < counts[0, 1]


def test_states_are_measured_on_transformers_attention_weights(hard_llama: Path) -> None:
    reference = LlamaForCausalLM.from_pretrained(hard_llama, attn_implementation="eager", dtype=torch.float32).eval()
    with torch.no_grad():
        weights = reference(TEXT, output_attentions=True).attentions
    places = [round(TEXT.shape[1] * n / 9) for n in range(1, 9)]
    for layer, found in measure_states(load(hard_llama), TEXT, LAYERS, Scored()).items():
        assert found["entropy"] == pytest.approx(float(state_sizes(weights[layer], places)[1].sum(1).mean()), rel=1e-3)


# ---- the whole run --------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def bank(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bank") / "bank"
    convert(tiny_llama, out, mixer="gated_delta_net", fresh_process=False)
    return out


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(" ".join(f"Sentence {n} says {n * n}." for n in range(200)))
    return file


def options(bank: Path, text: Path, **more: Any) -> dict[str, Any]:
    without_heads = [name for name in METHODS if name != "heads"]  # a random model has no recall
    small = dict(samples=2, pairs=3, length=48, device="cpu", progress=False)
    return dict(keep=2, bank=bank, data=text, methods=without_heads, **small, **more)


def test_a_run_that_was_stopped_goes_on_to_the_same_ranking(
    tiny_llama: Path, bank: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = zoo.select(tiny_llama, tmp_path / "whole", **options(bank, text))
    measured, call = [0], Judge.__call__

    def stop(self: Judge, model: Any) -> Any:
        measured[0] += 1
        if measured[0] == 5:
            raise KeyboardInterrupt
        return call(self, model)

    monkeypatch.setattr(Judge, "__call__", stop)
    with pytest.raises(KeyboardInterrupt):
        zoo.select(tiny_llama, tmp_path / "out", **options(bank, text))
    lines = tmp_path / "out.partial" / "scores.jsonl"
    kept = lines.read_text()
    lines.write_text(f"{kept}{{'name': 'sw")  # a line that was cut off
    with pytest.raises(ZooError, match="keep was 2 and is now 1"):
        zoo.select(tiny_llama, tmp_path / "out", **{**options(bank, text), "keep": 1}, resume=True)
    found = zoo.select(tiny_llama, tmp_path / "out", **options(bank, text), resume=True)
    assert found == whole and measured[0] == 5 + 1 + 7  # one swap was left, then 4 + 3 restorations
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]
    assert (tmp_path / "out" / "ranking.json").read_text() == (tmp_path / "whole" / "ranking.json").read_text()


def test_the_command_writes_what_convert_takes(tiny_llama: Path, bank: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    sizes = ["--samples", 2, "--pairs", 3, "--length", 48]
    chosen = ["--keep", 2, "--bank", bank, "--data", text, "--out", out, "--methods", "swap_kl,state_entropy", *sizes]
    result = CliRunner().invoke(app, ["select", str(tiny_llama), *map(str, [*chosen, "--by", "swap_kl"])])
    assert result.exit_code == 0, result.output
    written = json.loads((out / "ranking.json").read_text())
    assert list(written["rankings"]) == ["uniform", "state_entropy", "swap_kl"]
    assert written["rankings"]["uniform"]["keep"] == [1, 3]
    swap = written["rankings"]["swap_kl"]
    assert swap["order"] == sorted(range(4), key=lambda layer: -swap["scores"][str(layer)])
    assert written["keep"] == swap["keep"] == sorted(swap["order"][:2])
    kept = (out / "keep.txt").read_text().strip()
    assert f"--keep {kept}" in result.stdout and "uniform" in result.stdout
    drawn = (out / "ranking.svg").read_text()
    assert drawn.rstrip().endswith("</svg>") and all(f">{name}<" in drawn for name in written["rankings"])
    dry = ["convert", str(tiny_llama), str(tmp_path / "no"), "--mixer", "gla", "--keep", kept, "--dry-run"]
    assert CliRunner().invoke(app, dry).exit_code == 0


def test_uniform_is_evenly_spread() -> None:
    assert uniform(12, 4) == [2, 5, 8, 11] and uniform(12, 3) == [3, 7, 11] and uniform(5, 5) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keep": 0}, "keep was 0; it must be 1 to 4"),
        ({"keep": 5}, "keep was 5; it must be 1 to 4"),
        ({"samples": 0}, "samples was 0"),
        ({"methods": ["best"]}, "method 'best' is unknown; choose from uniform, heads"),
        ({"by": "best"}, "method 'best' is unknown"),
        ({"bank": None}, "method 'greedy' needs --bank"),
        ({"data": None}, "method 'state_entropy' needs --data"),
        ({"device": "tpu"}, "device was 'tpu'"),
        ({"methods": ["heads"]}, "recalls nothing of the lists"),
    ],
)
def test_bad_input_leaves_nothing(
    change: dict[str, Any], message: str, tiny_llama: Path, bank: Path, text: Path, tmp_path: Path
) -> None:
    with pytest.raises(ZooError, match=message):
        zoo.select(tiny_llama, tmp_path / "out", **{**options(bank, text), **change})
    assert list(tmp_path.iterdir()) == []
