"""A folder is a registry: what lies in it is registered, and nothing else."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import pytest

import zoo
from zoo import registry
from zoo.errors import ZooError

FOLDERS = {
    "architectures": "architectures",
    "mixers": "architectures/mixers",
    "channels": "architectures/channels",
    "blocks": "architectures/blocks",
    "evals": "evals",
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_every_module_in_the_folder_is_registered(root: Path, kind: str) -> None:
    expected = sorted(path.stem for path in (root / FOLDERS[kind]).glob("[!_]*.py"))
    assert zoo.list(kind) == expected
    assert expected, f"{kind} is empty"


def test_every_op_is_a_package(root: Path) -> None:
    assert zoo.list("kernels") == sorted(path.parent.name for path in (root / "kernels").glob("*/__init__.py"))


def test_sources_include_the_architectures_that_own_a_format(root: Path) -> None:
    files_ = {path.stem for path in (root / "conversion/sources").glob("[!_]*.py")}
    owners = {name for name in zoo.list("architectures") if hasattr(registry.load("architectures", name), "matches")}
    assert set(zoo.list("sources")) == files_ | owners
    assert all(callable(registry.get("sources", name, "matches")) for name in zoo.list("sources"))


def test_every_checkpoint_has_weights_and_config() -> None:
    for name in zoo.list("checkpoints"):
        entries = {entry.name for entry in files("zoo").joinpath("model_cards", "checkpoints", name).iterdir()}
        assert "config.json" in entries
        assert any(entry.endswith(".safetensors") for entry in entries), name


@pytest.mark.parametrize("kind", sorted(registry.KINDS))
def test_everything_registered_loads_and_documents_itself(kind: str) -> None:
    if kind == "checkpoints":
        return
    for name in registry.names(kind):
        assert (registry.load(kind, name).__doc__ or "").strip(), f"{kind}/{name} has no docstring"


@pytest.mark.parametrize(("kind", "attribute"), [("mixers", "MODULE"), ("channels", "MODULE"), ("evals", "evaluate")])
def test_what_a_kind_exports(kind: str, attribute: str) -> None:
    assert all(callable(registry.get(kind, name, attribute)) for name in registry.names(kind))


def test_architectures_have_a_tiny_preset() -> None:
    assert all("tiny" in registry.get("architectures", name, "PRESETS") for name in registry.names("architectures"))


def test_a_near_miss_is_suggested() -> None:
    with pytest.raises(ZooError, match="did you mean .*gated_delta_net") as caught:
        registry.load("mixers", "gated_deltanet")
    assert "\n" not in str(caught.value)


def test_a_far_miss_lists_what_there_is() -> None:
    with pytest.raises(ZooError, match="choose one of: .*attention.*"):
        registry.load("mixers", "zzzz")


def test_an_unknown_kind_lists_the_kinds() -> None:
    with pytest.raises(ZooError, match="'mixer' is not a registry; choose one of: architectures"):
        zoo.list("mixer")


def test_a_new_file_registers_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No list is edited: a module in a folder of the registry is found and loaded by its name."""
    import importlib

    package = importlib.import_module("zoo.architectures.mixers")
    (tmp_path / "novel.py").write_text('"""A new mixer."""\n\nMODULE = object\n')
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
    registry._modules.cache_clear()
    try:
        assert "novel" in registry.names("mixers")
        assert registry.get("mixers", "novel", "MODULE") is object
    finally:
        registry._modules.cache_clear()
