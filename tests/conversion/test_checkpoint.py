"""Reading and writing checkpoint directories: whole or refused, whole or absent."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from zoo.architectures.core.checkpoint import Checkpoint
from zoo.architectures.core.shards import Spec, atomic_directory, parse_size, write_tensors
from zoo.errors import ZooError

TENSORS = {
    "a.odd": torch.randn(3).bfloat16(),
    "b.wide": torch.randn(5, 7),
    "c.empty": torch.zeros(0, 4),
    "d.scalar": torch.tensor(2.0),
    "e.columns": torch.randn(6, 4).T,
    "f.bytes": torch.arange(5, dtype=torch.uint8),
}


def write(folder: Path, max_shard_size: int | str = "5GB") -> Path:
    folder.mkdir(exist_ok=True)
    specs = {name: Spec(tuple(tensor.shape), tensor.dtype) for name, tensor in TENSORS.items()}
    write_tensors(folder, specs, TENSORS.__getitem__, max_shard_size)
    (folder / "config.json").write_text('{"dtype": "bfloat16"}')
    return folder


@pytest.mark.parametrize("size", [1, 50, 100, "5GB"])
def test_what_is_written_is_read_back(tmp_path: Path, size: int | str) -> None:
    checkpoint = Checkpoint(write(tmp_path, size))
    assert checkpoint.tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        found = checkpoint.get(name)
        assert found.dtype == tensor.dtype and torch.equal(found, tensor)
    shards = sorted(tmp_path.glob("*.safetensors"))
    merged = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    assert all(torch.equal(merged[name], tensor) for name, tensor in TENSORS.items()), "safetensors must read it too"
    if size == 50:
        assert len(shards) > 2 and max(shard.stat().st_size for shard in shards) < 140 + 700  # one tensor and a header


def test_a_tensor_that_is_not_as_planned_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ZooError, match="the plan says"):
        write_tensors(tmp_path, {"a": Spec((2,), torch.float32)}, lambda name: torch.zeros(3))


@pytest.mark.parametrize(("text", "size"), [("500MB", 500_000_000), ("2 GiB", 2**31), (7, 7), ("1.5kb", 1500)])
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "MB", "-1MB", "0", "5 parsecs"])
def test_bad_sizes(text: str) -> None:
    with pytest.raises(ZooError):
        parse_size(text)


def truncate(folder: Path) -> None:
    file = sorted(folder.glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:-5])


def replace_shard(folder: Path) -> None:
    sorted(folder.glob("*.safetensors"))[0].write_text("<html>not found</html>")


def lose_shard(folder: Path) -> None:
    sorted(folder.glob("*.safetensors"))[1].unlink()


def duplicate(folder: Path) -> None:
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    save_file({**load_file(second), **load_file(first)}, second)


def move_out_of_index(folder: Path) -> None:
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"]["ghost"] = index["weight_map"]["a.odd"]
    file.write_text(json.dumps(index))


def escape(folder: Path) -> None:
    file = folder / "model.safetensors.index.json"
    file.write_text(file.read_text().replace('"model-00001', '"../model-00001'))


BREAKS: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated": (truncate, r"model-00001-of-\d+\.safetensors is truncated"),
    "not safetensors": (replace_shard, "is truncated or is not safetensors"),
    "missing shard": (lose_shard, "model-00002.*not beside it"),
    "duplicate": (duplicate, "a.odd"),
    "ghost": (move_out_of_index, "lacks 'ghost'"),
    "outside": (escape, "not beside it"),
    "no weights": (lambda folder: [f.unlink() for f in folder.glob("model*")] and None, "has no weights"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "no config.json"),
    "corrupt config": (
        lambda folder: (folder / "config.json").write_text("{") and None,
        "config.json is not valid JSON",
    ),
    "list config": (lambda folder: (folder / "config.json").write_text("[]") and None, "holds a list"),
    "corrupt index": (
        lambda folder: (folder / "model.safetensors.index.json").write_text('{"weight_map": 3}') and None,
        "has no weight_map",
    ),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_directory_is_one_line_that_names_the_file(tmp_path: Path, name: str) -> None:
    change, words = BREAKS[name]
    change(write(tmp_path, 30))
    with pytest.raises(ZooError, match=words) as caught:
        Checkpoint(tmp_path)
    assert "\n" not in str(caught.value)


def test_pickles_are_read_as_plain_tensors_only(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    torch.save({"w": torch.ones(3)}, tmp_path / "pytorch_model.bin")
    assert torch.equal(Checkpoint(tmp_path).get("w"), torch.ones(3))

    class Command:
        def __reduce__(self) -> tuple[object, ...]:
            return os.mkdir, (str(tmp_path / "executed"),)

    torch.save({"w": Command()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ZooError, match="plain tensors"):
        Checkpoint(tmp_path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("error", [ZooError("bad"), KeyboardInterrupt(), MemoryError()])
def test_an_error_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    out = tmp_path / "made" / "here" / "out"
    with pytest.raises(type(error)), atomic_directory(out) as folder:
        (folder / "half").write_text("x")
        assert not out.exists()
        raise error
    assert list(tmp_path.iterdir()) == []


def test_termination_is_an_interrupt_and_leaves_nothing(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), atomic_directory(tmp_path / "out") as folder:
        (folder / "half").write_text("x")
        os.kill(os.getpid(), signal.SIGTERM)
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) == before


def test_success_renames_and_never_overwrites(tmp_path: Path) -> None:
    with atomic_directory(tmp_path / "out") as folder:
        (folder / "whole").write_text("x")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["whole"]
    assert len(list(tmp_path.iterdir())) == 1
    with pytest.raises(ZooError, match="exists"), atomic_directory(tmp_path / "out"):
        pass
    assert (tmp_path / "out" / "whole").read_text() == "x"
