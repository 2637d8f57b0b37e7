"""What the README shows works: its Python runs, its commands parse, its links lead somewhere."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from zoo.cli import app

README = Path(__file__).resolve().parent.parent / "README.md"
PAGES = ("README.md", "CONTRIBUTING.md", "docs/overview.md")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README.read_text(), flags=re.MULTILINE | re.DOTALL)


def commands() -> list[list[str]]:
    lines = [line for block in blocks("console") for line in block.splitlines() if line.startswith("$ zoo ")]
    return [shlex.split(line, comments=True)[2:] for line in lines]


def test_python_block_runs(tmp_path: Path) -> None:
    [code] = blocks("python")
    assert len([line for line in code.splitlines() if line.strip()]) <= 11
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    said = re.search(r"True (\d+) of (\d+) bytes of state", done.stdout)
    assert said and int(said[1]) < int(said[2]), done.stdout


@pytest.mark.parametrize("line", commands(), ids=" ".join)
def test_command_parses(line: list[str]) -> None:
    group = typer.main.get_command(app)
    with group.make_context("zoo", list(line)) as ctx:
        name, verb, rest = group.resolve_command(ctx, list(line))  # type: ignore[attr-defined]
        assert verb.make_context(name, rest, parent=ctx).params


def test_every_verb_is_shown() -> None:
    group = typer.main.get_command(app)
    assert {line[0] for line in commands()} == set(group.commands)  # type: ignore[attr-defined]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(root: Path, page: str) -> None:
    path = root / page
    targets = [target for target in re.findall(r"\]\(([^)#]+)", path.read_text()) if "://" not in target]
    assert [target for target in targets if not (path.parent / target).exists()] == []


def test_make_targets_exist(root: Path) -> None:
    makefile = (root / "Makefile").read_text()
    named = set(re.findall(r"make (\w+)", "".join((root / page).read_text() for page in PAGES)))
    assert {name for name in named if not re.search(rf"^{name}:", makefile, flags=re.MULTILINE)} <= {"a"}
