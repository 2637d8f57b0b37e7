"""Loading by name, directory and hub id; strictness. Nothing is downloaded: the hub is a stand-in."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import httpx
import huggingface_hub
import pytest
import torch
from huggingface_hub import errors
from safetensors.torch import load_file, save_file

import zoo
from zoo import registry
from zoo.architectures.core import hub
from zoo.errors import ZooError
from zoo.loading import resolve


def logits(model: Any, length: int = 40) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(length)[None] % model.config.vocab_size).logits


@pytest.fixture
def zoo_checkpoint(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    return zoo.save(zoo.create("gated_delta_net", preset="hybrid_tiny"), tmp_path / "ours", max_shard_size="60KB")


@pytest.fixture
def released(tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for released weights: `demo-llama`."""
    folder = tmp_path / "model_cards" / "checkpoints" / "demo-llama"
    shutil.copytree(tiny_llama, folder)
    names = registry.names
    monkeypatch.setattr(registry, "names", lambda kind: ["demo-llama"] if kind == "checkpoints" else names(kind))
    monkeypatch.setattr(hub, "files", lambda package: tmp_path)
    return folder


def test_a_released_name_wins_over_a_directory(released: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo-llama").mkdir()
    assert resolve("demo-llama") == released
    assert resolve("./demo-llama").resolve() == tmp_path / "demo-llama"
    assert logits(zoo.from_pretrained("demo-llama")).isfinite().all()
    assert zoo.tokenizer("demo-llama").vocab_size


def test_an_architecture_has_no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "transformer").mkdir()
    with pytest.raises(ZooError, match=r"no weights; zoo\.create\('transformer'\)"):
        zoo.from_pretrained("transformer")
    assert resolve("./transformer").resolve() == resolve(Path("transformer")).resolve() == tmp_path / "transformer"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("demo-lama", "did you mean demo-llama"),
        ("/nowhere/at/all", "no directory at /nowhere/at/all"),
        ("./nowhere", "no directory at"),
        ("a/b/c", "no directory at a/b/c"),
        ("owner/model", "no directory 'owner/model' here, and as a hub id"),
        ("not a name!", "no hub id"),
    ],
)
def test_a_name_that_is_nothing(name: str, words: str, released: Path) -> None:
    with pytest.raises(ZooError, match=words) as caught:
        zoo.from_pretrained(name)
    assert "\n" not in str(caught.value)


def test_a_file_is_not_a_checkpoint(tiny_llama: Path) -> None:
    with pytest.raises(ZooError, match="is a file"):
        zoo.from_pretrained(tiny_llama / "config.json")


def test_hub_arguments_reach_the_hub(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(tiny_llama, tmp_path / "deep" / "er")
    seen: list[dict[str, Any]] = []

    def download(name: str, **options: Any) -> str:
        seen.append({"name": name, **options})
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    where = dict(revision="v2", token="secret", cache_dir="cache", local_files_only=True)
    model = zoo.from_pretrained("owner/model", subfolder="deep/er", dtype="float16", **where)
    assert model.dtype == torch.float16 and len(seen) == 1
    assert {"name": "owner/model", **where}.items() <= seen[0].items()
    assert "deep/er/*.safetensors" in seen[0]["allow_patterns"]
    assert not any(pattern.endswith((".bin", ".pth", ".py")) for pattern in seen[0]["allow_patterns"])
    assert zoo.tokenizer("owner/model", subfolder="deep/er")("a")["input_ids"]


def test_pickles_are_downloaded_only_where_there_is_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **o: asked.append(o["allow_patterns"]) or str(tmp_path)
    )
    resolve("owner/model")
    assert "*.bin" not in asked[0] and "*.bin" in asked[1]


def response(status: int) -> httpx.Response:
    return httpx.Response(status, request=httpx.Request("GET", "https://hub"))


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (errors.RepositoryNotFoundError("404\nlong", response=response(404)), "no such model, or it is private"),
        (errors.GatedRepoError("403\nlong", response=response(403)), "conditions accepted"),
        (errors.RevisionNotFoundError("404\nlong", response=response(404)), "no revision 'v9'"),
        (errors.LocalEntryNotFoundError("offline\nlong"), "not in the cache"),
        (errors.HfHubHTTPError("500 broken\nlong", response=response(500)), "500 broken"),
        (OSError("disk full\nlong"), "disk full"),
    ],
)
def test_hub_errors_are_one_line(error: Exception, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(name: str, **options: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(ZooError, match=words) as caught:
        zoo.from_pretrained("owner/model", revision="v9")
    assert "\n" not in str(caught.value)


def test_dtype_defaults_to_the_checkpoints(zoo_checkpoint: Path, tiny_llama: Path, tmp_path: Path) -> None:
    assert zoo.from_pretrained(tiny_llama).dtype == torch.float32
    half = zoo.from_pretrained(zoo_checkpoint, dtype=torch.bfloat16)
    zoo.save(half, tmp_path / "half")
    again = zoo.from_pretrained(tmp_path / "half")
    assert again.dtype == torch.bfloat16
    assert again.model.layers[0].mixer.A_log.dtype == torch.float32, "decay parameters stay fp32"
    assert torch.equal(logits(half), logits(again))
    assert zoo.from_pretrained(tmp_path / "half", dtype="float32").dtype == torch.float32


def test_attention_implementation_is_passed_on(tiny_llama: Path, zoo_checkpoint: Path) -> None:
    for path in (tiny_llama, zoo_checkpoint):
        assert zoo.from_pretrained(path, attn_implementation="eager").config._attn_implementation == "eager"


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_device_map(tiny_llama: Path, zoo_checkpoint: Path, device_map: Any) -> None:
    for path in (tiny_llama, zoo_checkpoint):
        model = zoo.from_pretrained(path, device_map=device_map)
        assert torch.equal(logits(model), logits(zoo.from_pretrained(path)))


def test_layers_may_lie_on_disk(tiny_llama: Path, tmp_path: Path) -> None:
    depth = json.loads((tiny_llama / "config.json").read_text())["num_hidden_layers"]
    places = {f"model.layers.{index}": "disk" if index else "cpu" for index in range(depth)}
    places |= dict.fromkeys(("model.embed_tokens", "model.norm", "model.ropes", "lm_head"), "cpu")
    model = zoo.from_pretrained(tiny_llama, device_map=places, offload_folder=str(tmp_path / "offload"))
    assert torch.equal(logits(model), logits(zoo.from_pretrained(tiny_llama)))


def test_generation_config_comes_along(tiny_llama: Path) -> None:
    model = zoo.from_pretrained(tiny_llama)
    expected = json.loads((tiny_llama / "generation_config.json").read_text())
    assert model.generation_config.eos_token_id == expected["eos_token_id"] == model.config.eos_token_id


def edit_tensors(folder: Path, change: Any) -> None:
    file = sorted(folder.glob("*.safetensors"))[0]
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


@pytest.mark.parametrize("foreign", [False, True])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors: tensors.pop(sorted(tensors)[-1]), "is missing"),
        (lambda tensors: tensors.update(stray=torch.zeros(1)), "'stray' is unexpected"),
        (lambda tensors: tensors.update({sorted(tensors)[-1]: torch.zeros(3, 3)}), "has shape"),
    ],
)
def test_every_load_is_strict(change: Any, words: str, foreign: bool, tiny_llama: Path, tmp_path: Path) -> None:
    path = tmp_path / "copy"
    shutil.copytree(tiny_llama, path)
    if not foreign:
        path = zoo.save(zoo.from_pretrained(tiny_llama), tmp_path / "zoo")
    edit_tensors(path, change)
    with pytest.raises(ZooError, match=words) as caught:
        zoo.from_pretrained(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("field", "value"), [("format_version", 99), ("layers", [{"mixer": "nope"}]), ("ropes", 3)])
def test_a_config_that_this_version_cannot_read(field: str, value: Any, zoo_checkpoint: Path) -> None:
    file = zoo_checkpoint / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), field: value}))
    with pytest.raises(ZooError) as caught:
        zoo.from_pretrained(zoo_checkpoint)
    assert "\n" not in str(caught.value)
    if field == "format_version":
        assert "99" in str(caught.value) and "upgrade" in str(caught.value)


def test_a_loaded_model_and_its_files_are_apart(tiny_llama: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_llama, tmp_path / "copy")
    file = tmp_path / "copy" / "model.safetensors"
    before = file.read_bytes()
    model = zoo.from_pretrained(tmp_path / "copy")
    expected = logits(model)
    with file.open("r+b") as stream:  # in place, as a synchronising tool would
        stream.seek(len(before) // 2)
        stream.write(b"\xff" * (len(before) // 2))
    assert torch.equal(logits(model), expected)


def test_a_missing_or_broken_tokenizer(tiny_llama: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_llama, tmp_path / "copy")
    (tmp_path / "copy" / "tokenizer.json").write_text("{}")
    with pytest.raises(ZooError, match="cannot be loaded"):
        zoo.tokenizer(tmp_path / "copy")
    (tmp_path / "copy" / "tokenizer.json").unlink()
    with pytest.raises(ZooError, match="has no tokenizer"):
        zoo.tokenizer(tmp_path / "copy")


@pytest.mark.shared
@pytest.mark.parametrize("name", ["stories260K", "books-llama-22m"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_published_weights_are_exact(name: str, attention: str, shared: Path) -> None:
    from transformers import LlamaForCausalLM

    options: dict[str, Any] = dict(dtype=torch.float32, attn_implementation=attention)
    path = shared / "checkpoints" / name
    theirs = logits(LlamaForCausalLM.from_pretrained(path, **options), 300)
    ours = logits(zoo.from_pretrained(path, **options), 300)
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.std()


@pytest.mark.shared
def test_the_golden_text(shared: Path) -> None:
    path = shared / "checkpoints" / "stories260K"
    golden = json.loads((path / "golden_greedy.json").read_text())
    model, tokenizer = zoo.from_pretrained(path), zoo.tokenizer(path)
    ids = model.generate(torch.tensor([golden["prompt_ids"]]), max_new_tokens=200, do_sample=False)
    assert tokenizer.decode(ids[0], skip_special_tokens=True).strip().startswith(golden["expected_prefix"].strip())
