"""The command line: its verbs and options, what it prints, and how it refuses."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

import zoo
from zoo import registry
from zoo.cli import app

START = {"--init", "--calibration-data", "--rope"}
HEAL = {"--recipe", "--align-tokens", "--distill-tokens", "--cache", "--log", "--resume"}
VERBS = {
    "list": {"KIND", "--json"},
    "info": {"NAME"},
    "convert": {"SOURCE", "OUT", "--mixer", "--layout", "--keep", "--keep-heads", *START, "--dry-run"},
    "heal": {"TEACHER", "STUDENT", "OUT", "--data", *HEAL},
    "eval": {
        "MODEL",
        "--tasks",
        "--suite",
        "--teacher",
        "--data",
        "--examples",
        "--lengths",
        "--samples",
        "--out",
        "--json",
    },
    "export": {"MODEL", "OUT", "--to", "--max-shard-size"},
    "generate": {"MODEL", "PROMPT", "--max-new-tokens", "--temperature", "--top-p", "--seed"},
    "bench": {"KERNELS", "--op", "--against", "--out", "--tune", "--dtype", "--direction", "--jobs"},
    "calibrate": {"MODEL", "--method", "--data", "--out", "--args", "--samples", "--length"},
    "select": {
        "TEACHER",
        "--keep",
        "--bank",
        "--data",
        "--out",
        "--by",
        "--methods",
        "--samples",
        "--pairs",
        "--length",
        "--resume",
    },
    "verify": {"OUT", "--source", "--data", "--report", "--json"},
    "card": {"NAME", "--check"},
    "demo": {"--out"},
}


def call(*args: object) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args])


def ok(*args: object) -> str:
    result = call(*args)
    assert result.exit_code == 0, (result.stderr, result.exception)
    return result.stdout


def refused(*args: object) -> str:
    """The one line that says why; exit code 2, nothing on stdout."""
    result = call(*args)
    assert (result.exit_code, result.stdout) == (2, ""), (result.stdout, result.stderr, result.exception)
    [line] = result.stderr.splitlines()
    assert line.startswith("error: ")
    return line


def tree(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def test_the_verbs_and_their_options_are_frozen() -> None:
    group = typer.main.get_command(app)
    found = {
        name: {
            option if option.startswith("--") else (param.metavar or param.name).upper()
            for param in verb.params
            for option in param.opts[-1:]
        }
        for name, verb in group.commands.items()  # type: ignore[attr-defined]
    }
    assert found == VERBS


def test_help_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, zoo.cli; sys.argv = ['zoo', '--help']\n"
        "try: zoo.cli.main()\n"
        "except SystemExit as end: assert not end.code\n"
        "assert not {'torch', 'transformers', 'numpy', 'huggingface_hub'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(verb in done.stdout for verb in VERBS)


def test_list() -> None:
    assert ok("list", "mixers").split() == zoo.list("mixers")
    assert json.loads(ok("list", "mixers", "--json")) == zoo.list("mixers")
    assert json.loads(ok("list", "--json")) == {kind: zoo.list(kind) for kind in registry.KINDS}
    assert all(kind in ok("list") for kind in registry.KINDS)


@pytest.mark.parametrize("kind", sorted(registry.KINDS))
def test_info_describes_everything_registered(kind: str) -> None:
    names = registry.names(kind)
    for name in names[:: 1 + len(names) // 20]:  # each is as slow as its sizes are many
        assert ok("info", f"{kind}/{name}").startswith(f"{kind}/{name}\n")


def test_info_by_name_shows_every_kind_that_has_it() -> None:
    said = ok("info", "gated_delta_net")
    assert "architectures/gated_delta_net" in said and "mixers/gated_delta_net" in said
    assert "tiny: " in said and "parameters" in said and "arguments:" in said


def test_dry_run_shows_the_plan_and_writes_nothing(tiny_llama: Path, tmp_path: Path) -> None:
    said = ok("convert", tiny_llama, tmp_path / "out", "--mixer", "gated_delta_net", "--keep", "2", "--dry-run")
    assert "model.embed_tokens.weight" in said and "model.layers.2.mixer.q_proj.weight" in said
    assert tree(tmp_path) == set()


@pytest.fixture(scope="module")
def converted(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("converted") / "hybrid"
    ok("convert", tiny_llama, out, "--layout", "gated_delta_net*2,attention")
    return out


def test_convert_says_what_was_checked(converted: Path) -> None:
    assert json.loads((converted / "verification.json").read_text())
    assert zoo.from_pretrained(str(converted)).config.layers[2]["mixer"] == "attention"


def test_generate_streams_the_prompt_and_repeats_with_a_seed(converted: Path) -> None:
    options = ("--max-new-tokens", 12, "--temperature", 1.5, "--top-p", 1.0)
    first = ok("generate", converted, "Hello", *options, "--seed", 1)
    assert first.startswith("Hello")
    assert first == ok("generate", converted, "Hello", *options, "--seed", 1)
    assert first != ok("generate", converted, "Hello", *options, "--seed", 2)


def test_greedy_generation_needs_no_seed(converted: Path) -> None:
    options = ("--max-new-tokens", 12, "--temperature", 0)
    assert ok("generate", converted, "Hello", *options, "--seed", 1) == ok("generate", converted, "Hello", *options)


def test_eval_prints_json_alone_and_writes_the_page(converted: Path, tiny_llama: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    options = ("--tasks", "perplexity,fidelity", "--teacher", tiny_llama, "--data", text, "--lengths", "64")
    said = json.loads(ok("eval", converted, *options, "--out", tmp_path / "out", "--json"))
    assert set(said) == {"perplexity", "fidelity"}
    assert said == json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    assert "<html" in (tmp_path / "out" / "index.html").read_text().lower()


def test_a_suite_runs_what_it_can_and_says_what_it_lacks(converted: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 1200)
    done = call(
        "eval", converted, "--data", text, "--out", tmp_path / "out", "--lengths", "400", "--samples", 1, "--json"
    )
    assert done.exit_code == 0, (done.stderr, done.exception)
    assert set(json.loads(done.stdout)) == {"perplexity", "needle", "key_value", "efficiency"}
    assert "fidelity is left out: it needs --teacher" in done.stderr
    assert "is unknown; choose one of: quick" in refused("eval", converted, "--suite", "quik")
    assert "give one of them" in refused("eval", converted, "--suite", "full", "--tasks", "needle")


def test_card_check_tells_by_its_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    from zoo import cards

    for stale in (False, True):
        monkeypatch.setattr(cards, "refresh", lambda name, write, stale=stale: stale)
        assert call("card", "transformer", "--check").exit_code == int(stale)


def test_an_interrupt_is_one_line_and_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(kind: str) -> list[str]:
        raise KeyboardInterrupt

    monkeypatch.setattr(registry, "names", interrupt)
    result = call("list", "mixers")
    assert (result.exit_code, result.stderr) == (130, "error: interrupted\n")


def test_an_unexpected_error_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(kind: str) -> list[str]:
        raise RuntimeError("a bug")

    monkeypatch.setattr(registry, "names", broken)
    assert isinstance(call("list", "mixers").exception, RuntimeError)


@pytest.mark.parametrize("args", [("frob",), ("info",), ("heal", "a", "b"), ("list", "--nope")])
def test_usage_errors_are_exit_2(args: tuple[str, ...]) -> None:
    assert call(*args).exit_code == 2


def copy(source: Path, folder: Path, change: Callable[[Path], object]) -> Path:
    """A damaged copy of a checkpoint."""
    out = folder / "damaged"
    shutil.copytree(source, out)
    change(out)
    return out


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def set_model_type(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "unheard_of"}))


def remove_tokenizer(folder: Path) -> None:
    for path in folder.glob("*token*"):
        path.unlink()


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "unsupported model_type": (set_model_type, "unheard_of.*llama"),
    "truncated shard": (truncate, "model.safetensors"),
    "not safetensors": (lambda folder: (folder / "model.safetensors").write_text("no"), "model.safetensors"),
    "corrupt config": (lambda folder: (folder / "config.json").write_text("{"), "config.json"),
    "tokenizer missing": (remove_tokenizer, "tokenizer"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_convert_refuses_a_damaged_checkpoint(tiny_llama: Path, tmp_path: Path, damage: str) -> None:
    change, cause = DAMAGE[damage]
    source = copy(tiny_llama, tmp_path, change)
    before = tree(tmp_path)
    line = refused("convert", source, tmp_path / "out", "--mixer", "gated_delta_net")
    assert re.search(cause, line), line
    assert tree(tmp_path) == before


BAD_CONVERT = {
    "no mixer": ((), "--mixer"),
    "mixer and layout": (("--mixer", "gated_delta_net", "--layout", "gated_delta_net*3"), "--layout"),
    "unknown mixer": (("--mixer", "gated_deltanet"), "gated_delta_net"),
    "unknown mixer in a layout": (("--layout", "gated_deltanet*2,attention"), "gated_delta_net"),
    "keep out of range": (("--mixer", "gated_delta_net", "--keep", "1,9"), "9"),
    "keep is no number": (("--mixer", "gated_delta_net", "--keep", "1,x"), "1,x"),
}


@pytest.mark.parametrize("case", BAD_CONVERT)
def test_convert_refuses_bad_options(tiny_llama: Path, tmp_path: Path, case: str) -> None:
    options, cause = BAD_CONVERT[case]
    assert cause in refused("convert", tiny_llama, tmp_path / "out", *options)
    assert tree(tmp_path) == set()


def test_convert_never_overwrites(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("keep me")
    assert str(tmp_path) in refused("convert", tiny_llama, tmp_path, "--mixer", "gated_delta_net")
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


@pytest.mark.parametrize(
    "args",
    [
        ("convert", "./missing", "out", "--mixer", "gated_delta_net"),
        ("heal", "./missing", "./missing", "out", "--align-tokens", "1", "--distill-tokens", "1"),
        ("eval", "./missing", "--tasks", "efficiency"),
        ("generate", "./missing", "Hello"),
    ],
    ids=lambda args: args[0],
)
def test_a_missing_path_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: tuple[str, ...]) -> None:
    monkeypatch.chdir(tmp_path)
    assert "missing" in refused(*args)
    assert tree(tmp_path) == set()


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        (("--tasks", "needel"), "needle"),
        (("--tasks", "perplexity", "--data", "empty.txt"), "empty"),
        (("--tasks", "perplexity", "--data", "missing.txt"), "missing.txt"),
        (("--tasks", "needle", "--data", "text.txt", "--lengths", "4096"), "512"),
        (("--tasks", "fidelity", "--data", "text.txt"), "teacher"),
        (("--tasks", "efficiency", "--out", "."), "exists"),
        (("--tasks", "efficiency", "--lengths", "many"), "many"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_eval_refuses(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], cause: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "text.txt").write_text("some words and then some more " * 300)
    before = tree(tmp_path)
    assert cause in refused("eval", tiny_llama, *options)
    assert tree(tmp_path) == before


def test_names_without_weights_are_told_apart() -> None:
    assert "zoo.create" in refused("generate", "gated_delta_net", "Hello")
    assert "gated_delta_net" in refused("info", "gated_deltanet")
    assert "transformer" in refused("card", "transfomer")


def test_demo_never_overwrites(tmp_path: Path) -> None:
    assert str(tmp_path) in refused("demo", "--out", tmp_path)
    assert tree(tmp_path) == set()
