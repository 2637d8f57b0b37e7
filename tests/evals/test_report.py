"""The table and the page show the numbers of the results, and nothing from elsewhere."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path

import pytest
from report_runs import RUNS
from rich.console import Console

from zoo.errors import ZooError
from zoo.evals.core.report import table, write_html
from zoo.evals.core.summary import count, size

SHOWN = ["30.31 ± 0.21", "31.4", "0.95 ± 0.08", "0.85", "0.0123 ± 0.001", "192 MB", "1 MB", "12,345", "679", "32k"]


class Page(HTMLParser):
    VOID = frozenset({"meta", "link", "br", "img"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_html(RUNS, tmp_path_factory.mktemp("page") / "deep" / "report.html", title="Books").read_text(
        encoding="utf-8"
    )


def test_the_page_shows_every_number(page: str) -> None:
    for text in [*SHOWN, "teacher &amp; co", "healed", "Books", "&lt;needle&gt;", "torch 9.8.7", "lengths 512"]:
        assert text in page, text
    assert "12,345 B" not in page and "12.06 KB" not in page, "the teacher's row belongs to its own run"


def test_the_page_has_every_plot(page: str) -> None:
    headings = ["Perplexity by position", "Needle by length", "Divergence from", "State by length"]
    headings += ["Recall against state", "Tokens per second", "needle: teacher", "needle: healed", "needle by depth"]
    assert page.count("<svg") == len(headings)
    for heading in headings:
        assert heading in page
    assert "teacher &amp; co, 512" in page and "healed, 512" in page, "every pair of bars says whose it is"


def test_the_page_shows_samples_that_failed_first(page: str) -> None:
    assert "needle, healed: 6 samples, 2 without any hit" in page
    assert "I &lt;i&gt;forgot&lt;/i&gt;" in page and "&lt;b&gt;What&lt;/b&gt;" in page
    own = page[page.index("needle, healed: 6") :]
    assert own.index("<td>1024/50</td>") < own.index("<td>256/0</td>")


def test_a_heat_map_has_the_share_and_number_of_each_cell(page: str) -> None:
    cells = page[page.index("needle: teacher") : page.index("needle: healed")]
    assert (cells.count(">1.00<"), cells.count(">0.00<"), cells.count(">n 1<")) == (4, 2, 6)


def test_the_page_is_well_formed_and_stands_alone(page: str) -> None:
    parser = Page()
    parser.feed(page)
    assert parser.open == []
    tags = {tag for tag, _ in parser.seen}
    assert not tags & {"script", "link", "img", "iframe", "object"}
    links = [
        value for _, attrs in parser.seen for name, value in attrs.items() if name in ("src", "href", "xlink:href")
    ]
    assert all(value is not None and value.startswith("#") for value in links)
    assert "@import" not in page and not re.search(r"url\((?!#)", page)
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in parser.seen


def test_the_page_depends_on_the_results_alone(page: str, tmp_path: Path) -> None:
    assert write_html(RUNS, tmp_path / "again.html", title="Books").read_text(encoding="utf-8") == page


def test_the_table_shows_every_number() -> None:
    out = StringIO()
    Console(file=out, width=200).print(table(RUNS, title="Books"))
    for text in [*SHOWN, "teacher & co", "healed", "perplexity"]:
        assert text in out.getvalue(), text


def test_a_run_may_lack_a_task(tmp_path: Path) -> None:
    runs = [RUNS[0], ("only needle", {"needle": RUNS[1][1]["needle"]})]
    assert "only needle" in write_html(runs, tmp_path / "a.html").read_text(encoding="utf-8")
    assert table(runs).row_count == 6
    with pytest.raises(ZooError, match="no results"):
        table([])


def test_units() -> None:
    assert [size(x) for x in (0, 1023, 1024, 1536, 2**40)] == ["0 B", "1023 B", "1 KB", "1.5 KB", "1 TB"]
    assert [count(x) for x in (900, 1024, 1900, 131072, 1048576)] == ["900", "1k", "1900", "128k", "1M"]
