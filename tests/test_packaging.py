"""What is installed is what is in the tree, and installing it disturbs nobody."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

FOLDERS = ("architectures", "conversion", "evals", "kernels", "model_cards")
LEFT_OUT = (".*", "__pycache__", "build", "dist", "*.egg-info", "zoo-demo", "*.pyc")
LIMIT = 25_000_000  # bytes


def run(*command: str, cwd: Path, **env: str) -> str:
    done = subprocess.run(command, cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def built(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source archive and the wheel, built from a copy of the tree."""
    copy = tmp_path_factory.mktemp("tree") / "copy"
    shutil.copytree(root, copy, symlinks=True, ignore=shutil.ignore_patterns(*LEFT_OUT))
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", "dist", ".", cwd=copy)
    return copy / "dist"


@pytest.fixture(scope="module")
def wheel(built: Path) -> list[zipfile.ZipInfo]:
    with zipfile.ZipFile(next(built.glob("*.whl"))) as archive:
        return archive.infolist()


def own_files(root: Path, folder: str, pattern: str) -> set[str]:
    """Files of a top folder that are not reached through a link, as paths below the root."""
    found = [path for path in (root / folder).rglob(pattern) if path.is_file() and "__pycache__" not in path.parts]
    return {str(path.relative_to(root)) for path in found if not any(p.is_symlink() for p in path.parents)}


def installed(path: str) -> str:
    """Where a file of the tree is in an installation."""
    return path if path.startswith("zoo/") else f"zoo/{path}"


def test_wheel_has_exactly_the_modules_of_the_tree(root: Path, wheel: list[zipfile.ZipInfo]) -> None:
    expected = {installed(path) for folder in (*FOLDERS, "zoo") for path in own_files(root, folder, "*.py")}
    assert {info.filename for info in wheel if info.filename.endswith(".py")} == expected
    assert "zoo/registry.py" in expected and "zoo/architectures/core/config.py" in expected


def test_wheel_has_the_data(root: Path, wheel: list[zipfile.ZipInfo]) -> None:
    names = {info.filename for info in wheel}
    cards = {installed(path) for path in own_files(root, "model_cards", "*") if not Path(path).name.startswith(".")}
    assert cards <= names
    assert "zoo/py.typed" in names
    assert {installed(path) for path in own_files(root, "evals", "*.html*")} <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_wheel_installs_one_package(wheel: list[zipfile.ZipInfo]) -> None:
    tops = {info.filename.split("/")[0] for info in wheel}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"zoo"}


def test_archives_are_small(built: Path) -> None:
    assert {path.name: path.stat().st_size for path in built.iterdir() if path.stat().st_size > LIMIT} == {}


def test_source_archive_needs_no_links(built: Path) -> None:
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        members = archive.getmembers()
    assert [member.name for member in members if member.issym() or member.islnk()] == []
    names = {member.name.partition("/")[2] for member in members}
    assert {"constraints.txt", "Makefile", "LICENSE", "kernels/dispatch.py"} <= names
    assert "zoo/kernels/dispatch.py" not in names


def test_wheel_works_outside_the_tree(built: Path, tmp_path: Path) -> None:
    """Unpacked elsewhere, before the editable install on the path, it finds everything by name."""
    with zipfile.ZipFile(next(built.glob("*.whl"))) as archive:
        archive.extractall(tmp_path / "site")
    code = "import zoo; print(zoo.__file__); [print(k, *zoo.list(k)) for k in ('mixers', 'kernels', 'checkpoints')]"
    lines = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site")).splitlines()
    assert Path(lines[0]).is_relative_to(tmp_path)
    import zoo

    assert lines[1:] == [" ".join([kind, *zoo.list(kind)]) for kind in ("mixers", "kernels", "checkpoints")]


def test_links_are_relative_and_complete(root: Path) -> None:
    for folder in FOLDERS:
        assert os.readlink(root / "zoo" / folder) == f"../{folder}"
        assert not (root / folder / "__init__.py").exists(), f"{folder}/__init__.py would shadow another package"


def test_every_package_below_has_an_init(root: Path) -> None:
    folders = {str(Path(path).parent) for folder in FOLDERS[:4] for path in own_files(root, folder, "*.py")}
    bare = [folder for folder in folders - set(FOLDERS) if not (root / folder / "__init__.py").exists()]
    assert bare == []


def test_import_is_light(tmp_path: Path) -> None:
    code = "import sys, zoo, zoo.cli; print(*sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    assert run(sys.executable, "-c", code, cwd=tmp_path).split() == []


def test_every_exported_name_exists() -> None:
    import zoo

    assert [name for name in zoo.__all__ if not callable(getattr(zoo, name))] == []
    assert set(zoo.__all__) - {"list"} == set(zoo._EXPORTS)


def test_hugging_face_kernels_is_not_shadowed(root: Path, tmp_path: Path) -> None:
    """From the root of the tree, `import kernels` still finds the installed package of that name."""
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text("real = True\n")
    code = (
        "import sys, zoo.kernels; import kernels; assert kernels.real, kernels; "
        "assert zoo.kernels is not kernels; from transformers import LlamaForCausalLM; print('fine')"
    )
    command = f"import sys; sys.path.append({str(tmp_path)!r}); {code}"
    assert run(sys.executable, "-c", command, cwd=root).strip() == "fine"


def test_pins_cover_the_requirements(root: Path) -> None:
    """Every direct requirement is pinned, and torch and transformers at the tested versions."""
    text = (root / "constraints.txt").read_text()
    pins = dict(line.split("==") for line in text.splitlines() if "==" in line)
    pinned = {name.lower().replace("_", "-"): version for name, version in pins.items()}
    assert (pinned["torch"], pinned["transformers"]) == ("2.13.0", "5.17.0")
    import importlib.metadata
    import re

    direct = importlib.metadata.requires("hybrid-zoo") or []
    names = {re.split(r"[<>=;\[ ]", line)[0].lower().replace("_", "-") for line in direct if "gpu" not in line}
    assert names - set(pinned) == set()
