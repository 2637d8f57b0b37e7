"""Export: transformers alone, in a process that cannot import this library, computes what our model computes."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import zoo
from zoo.architectures.core.checkpoint import read_json
from zoo.cli import app
from zoo.conversion.core.export import rewrites
from zoo.errors import ZooError

SIZES: dict[str, Any] = dict(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=128,
    rms_norm_eps=1e-5,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
LLAMA3 = dict(rope_type="llama3", rope_theta=1e5, factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0)
LINEAR = {"rope_type": "linear", "factor": 3.0, "rope_theta": 1000.0}
# what the classes of transformers have in these layers, of which the source's attention has less
DELTA = (
    "gated_delta_net(conv_activation=silu,gate_bias=False,norm_per_head=False,beta_bias=False,rope=None,qk_norm=None)"
)
MAMBA = "mamba2(conv_activation=silu,norm_groups=1,rope=None)"
WINDOW = "attention(window=7)"
FOUR = "gated_delta_net,gla,mamba2,attention(window=7,sinks=1)"
WIDE = {"hidden_size": 64}  # Qwen2 has no head_dim of its own
PLAIN = """
import sys

sys.modules["zoo"] = None
import torch
from transformers import AutoModelForCausalLM

ids, found = torch.load(sys.argv[1]), {}
for folder in sys.argv[3:]:
    model, info = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert not any(info.values()), info
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    with torch.no_grad():
        text = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)
        found[folder] = type(model).__name__, model(ids).logits, text
assert not any(name == "zoo" or name.startswith("zoo.") for name, module in sys.modules.items() if module is not None)
torch.save(found, sys.argv[2])
"""


@dataclass(frozen=True)
class Case:
    """A source of transformers' `model_type`, converted to `layout` (None: not), exported `to` the class `name`."""

    model_type: str
    layout: str | None
    to: str
    name: str
    options: dict[str, Any] = field(default_factory=dict)


TIED = {"tie_word_embeddings": True}
BIASED = {"attention_bias": True, "mlp_bias": True}
GRANITE = "GraniteMoeHybridForCausalLM"
CASES = {
    "delta": Case("qwen3", f"{DELTA},attention", "native", "Qwen3_5ForCausalLM", {"rope_parameters": LLAMA3}),
    "delta_tied": Case("qwen3", f"attention,{DELTA}", "qwen3_5_text", "Qwen3_5ForCausalLM", TIED),
    "mamba": Case("llama", f"{MAMBA},attention", "native", GRANITE, {"rope_parameters": LLAMA3}),
    "mamba_tied": Case("llama", f"attention,{MAMBA}", "bamba", "BambaForCausalLM", {**BIASED, **TIED}),
    "mamba_qkv_bias": Case("qwen2", f"attention,{MAMBA}", "native", GRANITE, WIDE),
    "window": Case("llama", f"{WINDOW},attention", "native", "MinistralForCausalLM", {"rope_parameters": LINEAR}),
    "window_mlp_bias": Case(
        "llama", f"attention,{WINDOW}", "native", "CwmForCausalLM", {"mlp_bias": True, "rope_parameters": LLAMA3}
    ),
    "window_qkv_bias": Case("qwen2", f"{WINDOW},attention", "SmolLM3ForCausalLM", "SmolLM3ForCausalLM", WIDE),
    "window_own_class": Case("qwen2", f"{WINDOW},attention", "native", "Qwen2ForCausalLM", WIDE),
    "unchanged": Case("llama", None, "native", "LlamaForCausalLM", {"attention_bias": True}),
    "four_mixers": Case("llama", FOUR, "remote-code", "ZooForCausalLM", {"num_hidden_layers": 4, **BIASED}),
}
SLOW = {
    mixer: Case("llama", f"{mixer},attention", "remote-code", "ZooForCausalLM", {"tie_word_embeddings": True})
    for mixer in ("gated_delta_net", "gla", "mamba2", "attention(window=7)")
}
Result = tuple[str, Tensor, Tensor]


def perturb(model: Any) -> None:
    """Every parameter random: no bias is zero, no norm is one."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def hybrid(case: Case, folder: Path, tokenizer: Any) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(case.model_type, **{**SIZES, **case.options}))
    perturb(model)
    model.save_pretrained(folder / "source")
    tokenizer.save_pretrained(folder / "source")
    if case.layout is None:
        return folder / "source"
    assert zoo.convert(folder / "source", folder / "new", layout=case.layout, fresh_process=False).ok
    converted = zoo.from_pretrained(folder / "new")
    perturb(converted)
    return zoo.save(converted, folder / "hybrid", tokenizer=tokenizer)


def ids() -> Tensor:
    return torch.randint(3, 96, (2, 30), generator=torch.Generator().manual_seed(1))


def plain(folders: list[Path], scratch: Path) -> dict[str, Result]:
    """What transformers alone finds: by folder the class, logits, and text after left padding."""
    torch.save(ids(), scratch / "ids.pt")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(scratch / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", PLAIN, str(scratch / "ids.pt"), str(scratch / "found.pt"), *map(str, folders)]
    done = subprocess.run(command, env=environment, cwd=scratch, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Result] = torch.load(scratch / "found.pt")
    return found


def ours(folder: Path) -> tuple[Tensor, Tensor]:
    model, mask = zoo.from_pretrained(folder), torch.ones_like(ids())
    mask[0, :5] = 0
    with torch.no_grad():
        return model(ids()).logits, model.generate(ids(), attention_mask=mask, max_new_tokens=12, do_sample=False)


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_llama)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> dict[str, Path]:
    """By case the folder with its hybrid and its export, `out`."""
    made = {name: tmp_path_factory.mktemp(name) for name in CASES}
    for name, case in CASES.items():
        zoo.export(hybrid(case, made[name], tokenizer), made[name] / "out", case.to)
    return made


@pytest.fixture(scope="module")
def found(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    return plain([folder / "out" for folder in folders.values()], tmp_path_factory.mktemp("plain"))


def check(case: Case, folder: Path, found: dict[str, Result]) -> None:
    name, logits, text = found[str(folder / "out")]
    expected, expected_text = ours(folder / ("source" if case.layout is None else "hybrid"))
    assert name == case.name
    assert (logits - expected).abs().max() <= 1e-4 * expected.std()
    assert torch.equal(text, expected_text)


@pytest.mark.parametrize("name", CASES)
def test_transformers_alone_computes_the_same(name: str, folders: dict[str, Path], found: dict[str, Result]) -> None:
    check(CASES[name], folders[name], found)


@pytest.mark.slow
def test_remote_code_of_each_mixer(tmp_path: Path, tokenizer: Any) -> None:
    for index, case in enumerate(SLOW.values()):
        (tmp_path / str(index)).mkdir()
        zoo.export(hybrid(case, tmp_path / str(index), tokenizer), tmp_path / str(index) / "out", case.to)
    found = plain([tmp_path / str(index) / "out" for index in range(len(SLOW))], tmp_path)
    for index, case in enumerate(SLOW.values()):
        check(case, tmp_path / str(index), found)


def test_what_is_beside_the_weights(folders: dict[str, Path], tokenizer: Any) -> None:
    for name in ("delta", "four_mixers"):
        out = folders[name] / "out"
        assert (out / "generation_config.json").is_file() and "license: unknown" in (out / "README.md").read_text()
        assert AutoTokenizer.from_pretrained(out)("the river").input_ids == tokenizer("the river").input_ids
    assert torch.equal(ours(folders["four_mixers"] / "out")[0], ours(folders["four_mixers"] / "hybrid")[0])


def test_the_modeling_file_needs_torch_and_transformers_alone(folders: dict[str, Path]) -> None:
    tree = ast.parse((folders["four_mixers"] / "out" / "modeling_zoo.py").read_text())
    used = {alias.name.partition(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names}
    used |= {str(n.module).partition(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert used - set(sys.stdlib_module_names) == {"torch", "transformers", "huggingface_hub"}


def test_half_precision_is_exact_and_streamed_in_shards(
    folders: dict[str, Path], tmp_path: Path, tokenizer: Any
) -> None:
    half = zoo.from_pretrained(folders["delta"] / "hybrid", dtype=torch.bfloat16)
    zoo.save(half, tmp_path / "half", tokenizer=tokenizer)
    made = zoo.export(tmp_path / "half", tmp_path / "out", max_shard_size="20KB")
    assert made.worst is not None and made.worst <= 1e-4
    tensors = {name: t for file in (tmp_path / "out").glob("*.safetensors") for name, t in load_file(file).items()}
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    ours_ = load_file(tmp_path / "half" / "model.safetensors")
    assert torch.equal(tensors["model.norm.weight"], ours_["model.norm.weight"].float() - 1)
    assert read_json(tmp_path / "out" / "config.json", "config")["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("layout", "to", "words"),
    [
        ("gla,attention", "native", "no class has .*gla .layer 0"),
        ("gla,attention", "BambaForCausalLM", "bamba: layer 0 is gla"),
        ("gated_delta_net,attention", "native", "layer 0 .gated_delta_net. has rope 'default', not None.*layer 1 "),
        ("attention(window=7,sinks=1),attention", "native", "layer 0 .attention. has sinks 1, not 0"),
        ("attention(window=7),attention(window=9)", "ministral", "layer 1 .attention. has window 9, not 7"),
        (None, "BertModel", "'BertModel'; it must be native, remote-code"),
        (None, "bloom", "model_type 'bloom' is not supported"),
    ],
)
def test_what_no_class_holds_is_refused_by_layer_and_field(
    layout: str | None, to: str, words: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    model = folders["mamba"] / "hybrid"
    if layout is not None:
        model = tmp_path / "hybrid"
        zoo.convert(folders["mamba"] / "source", model, layout=layout, fresh_process=False)
    with pytest.raises(ZooError, match=words) as caught:
        zoo.export(model, tmp_path / "out", to)
    assert "\n" not in str(caught.value) and not {*os.listdir(tmp_path)} - {"hybrid"}


def test_an_export_that_computes_something_else_is_not_kept(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rewrites, "_doubled", lambda make: make())
    with pytest.raises(ZooError, match="computes something else"):
        zoo.export(folders["delta"] / "hybrid", tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_the_command_says_what_it_wrote(folders: dict[str, Path], tmp_path: Path) -> None:
    runner, source = CliRunner(), str(folders["unchanged"] / "source")
    done = runner.invoke(app, ["export", source, str(tmp_path / "out"), "--to", "LlamaForCausalLM"])
    assert done.exit_code == 0 and "LlamaForCausalLM, logits within" in done.stdout
    assert runner.invoke(app, ["export", source, str(tmp_path / "out")]).exit_code == 2
