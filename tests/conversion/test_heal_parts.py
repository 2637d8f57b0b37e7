"""The parts of healing: rows, texts, losses, schedule, sampling. B rows, L tokens per row, V vocabulary."""

from __future__ import annotations

import lzma
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

from zoo.conversion.core import recall, recall_pool, sampling, texts
from zoo.conversion.core.data import check
from zoo.conversion.core.distill import chunked_kl
from zoo.conversion.core.optim import decays, new_layers, parameter_groups
from zoo.conversion.core.recipe import override, read
from zoo.conversion.core.rows import Mixture, Part, Pool, Refreshed, Stream, assignment, needed_rows, parse
from zoo.conversion.core.settings import choose
from zoo.conversion.core.stages import Stage
from zoo.errors import ZooError


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One id per byte, with id 0 as the end token."""
    alphabet = ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    model = Tokenizer(models.BPE(vocab={token: n for n, token in enumerate(alphabet)}, merges=[]))
    model.pre_tokenizer, model.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<|endoftext|>", bos_token="<|endoftext|>")


# ---- shares ---------------------------------------------------------------------------------------------------------
def test_parse_gives_the_rest_to_the_sources_without_a_share() -> None:
    assert parse("books.txt,recall=0.4") == [Part("books.txt", 0.6), Part("recall", 0.4)]
    assert [part.fraction for part in parse("a=0.5,b,c")] == [0.5, 0.25, 0.25]
    assert parse("self") == [Part("self", 1.0)]
    assert parse("name=x.txt") == [Part("name=x.txt", 1.0)]


@pytest.mark.parametrize("data", ["", "a=0.5", "a=0.7,b=0.7", "a=1,b", "a,a", "a=0,b", "a=-1,b"])
def test_parse_refuses_shares_that_do_not_add_up(data: str) -> None:
    with pytest.raises(ZooError):
        parse(data)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(0, 400), st.integers(1, 60))
def test_every_stretch_of_a_run_holds_the_shares(weights: list[int], start: int, size: int) -> None:
    fractions = [weight / sum(weights) for weight in weights]
    owner, place = assignment(fractions, 500)
    for n, fraction in enumerate(fractions):
        assert abs((owner[start : start + size] == n).sum() - fraction * len(owner[start : start + size])) <= 4
        assert place[owner == n].tolist() == list(range((owner == n).sum()))


def test_needed_rows_counts_what_a_mixture_takes() -> None:
    parts = parse("a=0.3,b")
    needed = needed_rows(parts, 1000)
    assert sum(needed.values()) == 1000 and abs(needed["a"] - 300) <= 2


# ---- rows -----------------------------------------------------------------------------------------------------------
def test_a_stream_gives_every_row_once_per_epoch_and_moves_the_cuts_between_epochs() -> None:
    stream = Stream(np.arange(1000), 10, seed=3)
    first = stream.take(np.arange(stream.count))
    second = stream.take(np.arange(stream.count, 2 * stream.count))
    assert len(np.unique(first)) == first.size
    assert (first[:, 1:] - first[:, :-1] == 1).all()
    assert set(first[:, 0] % 10) != set(second[:, 0] % 10) or first.tolist() != second.tolist()


def test_stream_rows_begin_with_what_the_model_expects() -> None:
    rows = Stream(np.arange(100, 200), 10, seed=0, start=[7]).take(np.arange(5))
    assert (rows[:, 0] == 7).all() and rows.shape == (5, 10) and (rows[:, 1] >= 100).all()


def test_a_text_shorter_than_a_row_is_refused() -> None:
    with pytest.raises(ZooError, match="9 tokens; one row takes 10"):
        Stream(np.arange(9), 10, seed=0)


def test_a_pool_is_drawn_without_replacement() -> None:
    pool = Pool(np.arange(8)[:, None], seed=1)
    assert sorted(pool.take(np.arange(8)).ravel()) == list(range(8))
    assert pool.take(np.arange(8)).tolist() != pool.take(np.arange(8, 16)).tolist()


def test_a_refreshed_pool_is_made_anew_after_its_uses() -> None:
    made = []

    def make(number: int) -> Any:
        made.append(number)
        return np.full((4, 2), number)

    rows = Refreshed(make, size=4, uses=3, seed=0).take(np.arange(24))
    assert made == [0, 1]
    assert rows[:12].max() == 0 and rows[12:].min() == 1


def test_batches_depend_on_their_place_alone() -> None:
    def mixture() -> Mixture:
        sources = {"a": Stream(np.arange(1000), 10, 0), "b": Pool(np.arange(2000, 2080).reshape(8, 10), 0)}
        return Mixture(sources, parse("a,b=0.25"), 100)

    whole, later = mixture(), mixture()
    seen = [whole.batch(start, start + 8) for start in range(0, 96, 8)]
    assert (later.batch(64, 72) == seen[8]).all()
    assert 0 < sum((batch[:, 0] >= 2000).sum() for batch in seen) < 40


# ---- texts ----------------------------------------------------------------------------------------------------------
def test_texts_from_a_file_an_archive_and_a_directory_are_the_same(tmp_path: Path, tokenizer: Any) -> None:
    text = "One book.<|endoftext|>Another book, longer."
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.txt").write_text(text)
    (tmp_path / "b.txt.xz").write_bytes(lzma.compress(text.encode()))
    found = [texts.documents(str(tmp_path / name), "<|endoftext|>", 100) for name in ("a", "a/b.txt", "b.txt.xz")]
    assert found == [["One book.", "Another book, longer."]] * 3


def test_tokens_hold_every_document_after_the_prefix_and_come_from_the_cache_again(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "b.txt").write_text("alpha<|endoftext|>beta")
    tokens = texts.text_tokens(str(tmp_path / "b.txt"), tokenizer, 100, 0, tmp_path / "cache")
    assert sorted(tokenizer.decode(tokens).split("<|endoftext|>")) == ["", "alpha", "beta"]
    monkeypatch.setattr(texts, "tokenize", lambda *args: pytest.fail("not from the cache"))
    assert (texts.text_tokens(str(tmp_path / "b.txt"), tokenizer, 100, 0, tmp_path / "cache") == tokens).all()


def test_pieces_join_to_the_document() -> None:
    document = "\n\n".join(f"paragraph {n} " + "x" * (n % 50) for n in range(300))
    parts = list(texts.pieces(document, 500))
    assert "".join(parts) == document and len(parts) > 5


def test_a_small_budget_sees_many_documents() -> None:
    books = [f"book {n}\n\n" + "word " * 40_000 for n in range(10)]
    chosen = texts.selection(books, 400_000, seed=0)
    assert sum(map(len, chosen)) < 600_000
    assert len(set(chosen)) > 1


@pytest.mark.parametrize("name", ["missing.txt", "datasets-missing/", "missing.xz"])
def test_missing_text_names_the_path_and_what_is_possible(name: str) -> None:
    with pytest.raises(ZooError, match=r"does not exist; give a text file"):
        check(name)


def test_empty_and_broken_texts_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "blank.txt").write_text(" \n ")
    (tmp_path / "broken.xz").write_bytes(lzma.compress(b"some text" * 100)[:-20])
    (tmp_path / "folder").mkdir()
    with pytest.raises(ZooError, match="is empty"):
        check(str(tmp_path / "empty.txt"))
    for name in ("blank.txt", "broken.xz", "folder"):
        with pytest.raises(ZooError):
            texts.documents(str(tmp_path / name), "", 100)


def test_a_data_set_is_read_as_far_as_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(name: str, split: str, streaming: bool) -> Any:
        assert (name, split, streaming) == ("org/name", "test", True)
        return ({"id": n, "story": "x" * 10} for n in range(100))

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert texts.documents("datasets:org/name:test", "", 35) == ["x" * 10] * 4


def test_a_data_set_that_cannot_be_loaded_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*args: Any, **kwargs: Any) -> Any:
        raise ConnectionError("no network\nat all")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(ZooError, match="cannot be loaded .no network.; check its name") as error:
        texts.documents("datasets:org/name", "", 35)
    assert "\n" not in str(error.value)


# ---- recall rows ----------------------------------------------------------------------------------------------------
def test_workers_make_the_same_recall_rows_however_many_they_are(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recall_pool, "SMALL", 3)
    filler = "A first sentence of text. And then a second one! " * 40
    one, two = (recall_pool.recall_pool(tokenizer, filler, 6, 600, 5, workers) for workers in (1, 2))
    assert (one == two).all() and one.shape == (6, 600)
    digits = [sum(character.isdigit() for character in tokenizer.decode(row)) for row in one]
    assert sum(count > 30 for count in digits) >= 3  # documents full of numbers, and not filler alone


def test_rows_of_lists_hold_lists_alone(tokenizer: Any) -> None:
    filler = "A first sentence of text. And then a second one! " * 40
    texts = [tokenizer.decode(row) for row in recall_pool.recall_pool(tokenizer, filler, 8, 900, 5, kind="lists")]
    assert all(recall.INTRODUCTION[:20] not in text for text in texts)
    assert sum(recall.LIST_OPENING in text for text in texts) >= 6


# ---- losses and schedule --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("chunk", [3, 7, 100])
def test_chunked_kl_is_torchs_kl_in_value_and_gradients(chunk: int) -> None:
    torch.manual_seed(0)
    hidden, target = torch.randn(20, 6, dtype=torch.float64), torch.randn(20, 6, dtype=torch.float64)
    head, other = torch.randn(11, 6, dtype=torch.float64), torch.randn(11, 6, dtype=torch.float64)
    grads = []
    for chunked in (True, False):
        h, w = hidden.clone().requires_grad_(), head.clone().requires_grad_()
        if chunked:
            loss = chunked_kl(h, target, lambda x, w=w: x @ w.T, lambda x: x @ other.T, chunk)
        else:
            log_q, log_p = F.log_softmax(h @ w.T, -1), F.log_softmax(target @ other.T, -1)
            loss = F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
        loss.backward()
        grads.append((loss.detach(), h.grad, w.grad))
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-6)


def stage_of(kind: str, steps: int, lr_new: float, lr_copied: float, **fields: Any) -> Stage:
    return Stage(kind, kind, 10 * steps, length=5, batch_size=2, lr_new=lr_new, lr_copied=lr_copied, **fields)


def test_the_rate_rises_holds_and_falls() -> None:
    stage = stage_of("distill", 100, 1.0, 0.5, warmup=0.1, hold=0.5)
    factors = [stage.factor(step) for step in range(100)]
    assert factors[0] == pytest.approx(0.1) and max(factors) == 1.0
    assert factors[49] == 1.0 and factors[75] == pytest.approx(0.5) and factors[99] == 0.02
    assert all(a >= b for a, b in zip(factors[50:], factors[51:], strict=False))


def test_groups_freeze_what_a_stage_leaves_alone_and_spare_norms_from_decay() -> None:
    model = torch.nn.Module()
    model.weight, model.norm = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2, 2))
    model.dt = torch.nn.Parameter(torch.ones(2, 2))
    model.dt._no_weight_decay = True
    groups = parameter_groups(model.named_parameters(), ["dt"], stage_of("long", 1, 1e-3, 0.0), 0.1)
    assert [len(group["params"]) for group in groups] == [1]
    assert [p.requires_grad for p in (model.weight, model.norm, model.dt)] == [False, False, True]
    groups = parameter_groups(model.named_parameters(), ["dt"], stage_of("distill", 1, 1e-3, 1e-4), 0.1)
    assert {(group["lr"], group["weight_decay"]) for group in groups} == {(1e-3, 0.0), (1e-4, 0.1), (1e-4, 0.0)}
    assert not decays("a.o_norm", model.norm)


def test_new_layers_come_from_names() -> None:
    assert new_layers(["model.layers.10.mixer.a", "model.layers.2.mixer.a", "model.layers.2.mixer.b"]) == [2, 10]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"length": 5000}, "stage align: length was 5000; the teacher reads at most 512"),
        ({"lenght": 5}, "unknown setting 'lenght'"),
        ({"align_tokens": -1}, "align_tokens was -1"),
        ({"batch_size": 0}, "batch_size was 0"),
        ({"align_tokens": 0, "distill_tokens": 0}, "nothing would train"),
    ],
)
def test_settings_that_cannot_be_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ZooError, match=message):
        choose(False, 512, override(read("quick"), given))


# ---- sampling -------------------------------------------------------------------------------------------------------
class Table(torch.nn.Module):
    """A model that predicts from the last token alone; it needs no cache."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.table, self.device = logits, torch.device("cpu")
        self.config = SimpleNamespace()

    def forward(self, ids: torch.Tensor, **kwargs: Any) -> Any:
        return SimpleNamespace(logits=self.table[ids])


def test_samples_follow_the_models_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "DynamicCache", lambda **kwargs: None)
    torch.manual_seed(0)
    logits = torch.randn(5, 5)
    rows = sampling.sample_rows(Table(logits), [0], 400, 50, seed=1, batch=100)
    pairs = np.zeros((5, 5))
    np.add.at(pairs, (rows[:, :-1].ravel(), rows[:, 1:].ravel()), 1)
    expected = logits.softmax(-1).numpy()
    assert (rows[:, 0] == 0).all()
    np.testing.assert_allclose(pairs / pairs.sum(1, keepdims=True), expected, atol=0.03)


def test_the_same_seed_gives_the_same_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "DynamicCache", lambda **kwargs: None)
    table = Table(torch.zeros(9, 9))
    a, b, c = (sampling.sample_rows(table, [0], 4, 20, seed, 4).tolist() for seed in (1, 1, 2))
    assert a == b != c
