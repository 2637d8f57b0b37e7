"""Cards and registries agree, both ways, and the tables in the cards are current."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

import zoo
from zoo import cards, registry
from zoo.errors import ZooError
from zoo.evals.core.result import Result, Row, write_json

NAMES = cards.targets()


def test_every_architecture_and_checkpoint_has_a_card() -> None:
    assert set(zoo.list("architectures")) | set(zoo.list("checkpoints")) == set(NAMES) - {cards.README}


@pytest.mark.parametrize("name", NAMES)
def test_tables_are_current(name: str) -> None:
    assert not cards.refresh(name, write=False), f"run: zoo card {name}"


@pytest.mark.parametrize("name", sorted(set(NAMES) - {cards.README}))
def test_card_is_a_hugging_face_card(root: Path, name: str) -> None:
    card = ModelCard.load(root / "model_cards" / f"{name}.md")
    assert card.data.license == "apache-2.0"
    assert card.data.library_name in ("hybrid-zoo", "transformers")
    assert f"# {name}" in card.text


@pytest.mark.parametrize("name", zoo.list("checkpoints"))
def test_released_weights_state_their_results(name: str) -> None:
    results = cards.stored_results(name)
    assert results, f"{name} has no results.json"
    text = cards.render(name, (cards._path(name)).read_text())
    shown = [row for result in results.values() for row in cards.headline(result)]
    assert all(f"{row.value:.4g}" in text for row in shown)
    assert {"perplexity", "accuracy"} <= {row.metric for row in shown}
    assert not any(row.metric.startswith("position_") for row in shown), "a card is no plot"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of cards with one released checkpoint, `toy`, in place of the real one."""
    weights = tmp_path / "checkpoints" / "toy"
    weights.mkdir(parents=True)
    rows = (
        Row("accuracy", 0.93751, n=16, stderr=0.0605, at={"length": 256}),
        Row("accuracy", 0.5, n=16, at={"length": 512}),
    )
    result = Result("recall", version=1, model="toy", rows=rows)
    write_json(weights / "results.json", {"results": {"recall": result.to_dict()}})
    text = "---\nlicense: apache-2.0\n---\n\n# toy\n\nBy hand.\n\n<!-- results -->\nold\n<!-- /results -->\n\nAfter.\n"
    (tmp_path / "toy.md").write_text(text)
    monkeypatch.setattr(cards, "_folder", lambda: tmp_path)
    monkeypatch.setattr(registry, "names", lambda kind: ["toy"] if kind == "checkpoints" else [])
    return tmp_path


def test_results_fill_the_table_and_the_model_index(folder: Path) -> None:
    assert cards.refresh("toy")
    card = ModelCard.load(folder / "toy.md")
    assert [(e.dataset_name, e.metric_value) for e in card.data.eval_results] == [
        ("recall (length 256)", 0.93751),
        ("recall (length 512)", 0.5),
    ]
    assert "| recall | accuracy | length 256 | 0.9375 | 0.06 | 16 |" in card.text
    assert "By hand." in card.text and "After." in card.text and "old" not in card.text


def test_rewriting_is_idempotent_and_check_writes_nothing(folder: Path) -> None:
    before = (folder / "toy.md").read_text()
    assert cards.refresh("toy", write=False)
    assert (folder / "toy.md").read_text() == before
    assert cards.refresh("toy")
    assert not cards.refresh("toy")


def test_a_changed_result_makes_the_card_stale(folder: Path) -> None:
    cards.refresh("toy")
    path = folder / "checkpoints" / "toy" / "results.json"
    path.write_text(path.read_text().replace("0.93751", "0.9"))
    assert cards.refresh("toy", write=False)


def test_an_edited_table_is_stale(folder: Path) -> None:
    cards.refresh("toy")
    path = folder / "toy.md"
    path.write_text(path.read_text().replace("0.9375 |", "0.9999 |"))
    assert cards.refresh("toy", write=False)


def test_unknown_block_and_unclosed_block_are_named(folder: Path) -> None:
    for text, message in (("<!-- sizes -->\n<!-- /sizes -->\n", "'sizes'"), ("<!-- results -->\n", "does not close")):
        (folder / "toy.md").write_text(text)
        with pytest.raises(ZooError, match=message):
            cards.refresh("toy")


def test_an_unknown_card_lists_the_cards(folder: Path) -> None:
    shutil.copy(folder / "toy.md", folder / "other.md")
    with pytest.raises(ZooError, match="no card 'toi'; choose one of other, toy"):
        cards.refresh("toi")


def test_state_of_softmax_grows_and_of_the_recurrence_does_not() -> None:
    rows = {name: {row[0]: row[3:] for row in cards.preset_rows(name)} for name in ("transformer", "gated_delta_net")}
    assert len(set(rows["gated_delta_net"]["tiny"])) == 1
    assert len(set(rows["transformer"]["tiny"])) == 3


@pytest.mark.parametrize(
    ("number", "text"), [(999, "999"), (4_000_000, "4M"), (999_885_952, "1B"), (1_316_818_944, "1.32B")]
)
def test_counts(number: int, text: str) -> None:
    assert cards.count_text(number) == text


@pytest.mark.parametrize(
    ("number", "text"), [(12, "12 B"), (8_400_000, "8.4 MB"), (999_600, "1 MB"), (2_500_000_000, "2.5 GB")]
)
def test_sizes(number: int, text: str) -> None:
    assert cards.bytes_text(number) == text
