"""lm-evaluation-harness: its own model wrapper, ours, and our own tasks agree on the same model and samples."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from zoo.errors import ZooError
from zoo.evals import arc_easy, gsm8k, lambada, piqa, winogrande
from zoo.evals.core import lm_eval
from zoo.evals.core.runner import evaluate

N = 12
WORDS = ["stone", "river", "moon", "paper", "glass", "the", "of", "under", "red", "slow", "é", "wind"]
CHOICE = "output_type: multiple_choice\ndoc_to_choice: choices\ndoc_to_target: gold\nmetric_list: [{metric: acc}, "
TASKS = {
    "piqa": 'doc_to_text: "{{query}}Answer:"\n' + CHOICE + "{metric: acc_norm}, {metric: acc_bytes}]",
    "arc_easy": 'doc_to_text: "{{query}}\\nAnswer:"\n' + CHOICE + "{metric: acc_norm}, {metric: acc_bytes}]",
    "lambada": "output_type: loglikelihood\ndoc_to_text: context\ndoc_to_target: \"{{' ' + continuation}}\"\n"
    "metric_list: [{metric: perplexity}, {metric: acc}]",
    "winogrande": "output_type: multiple_choice\ndoc_to_text: gold\ndoc_to_choice: context_options\n"
    "doc_to_target: continuation\nmetric_list: [{metric: acc}]",
    "gsm8k": 'output_type: generate_until\ndoc_to_text: "Question: {{context}}\\nAnswer:"\ndoc_to_target: answer\n'
    "generation_kwargs: {until: ['Question:'], max_gen_toks: 6, do_sample: false}\n"
    "metric_list: [{metric: exact_match, regexes_to_ignore: [',']}]\nfilter_list:\n"
    "  - {name: strict, filter: [{function: regex, regex_pattern: '#### (-?[0-9.,]+)'}, {function: take_first}]}\n"
    "  - {name: flexible, filter: [{function: regex, group_select: -1, regex_pattern: '(-?[$0-9.,]{2,})|(-?[0-9]+)'}, "
    "{function: take_first}]}",
}


def _row(task: str, some: Callable[[int], str]) -> dict[str, Any]:
    """An example in the form of a task's file; `some(n)` is a text of up to n words."""
    if task == "lambada":
        return {"context": some(12), "continuation": some(2)}
    if task == "winogrande":
        return {"context_options": [some(9), some(9)], "continuation": some(5), "gold": len(some(9)) % 2}
    if task == "gsm8k":
        return {"context": some(9), "chain_of_thought": some(4), "answer": str(len(some(9)))}
    choices = [some(8) for _ in range(2 if task == "piqa" else 4)]
    end = "\n" if task == "piqa" else ""
    return {"query": f"Question: {some(9)}{end}", "choices": choices, "gold": len(some(9)) % len(choices)}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Examples in our form, and a task file of the harness's over each."""
    rng = random.Random(0)

    def some(n: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(1, n)))

    folder = tmp_path_factory.mktemp("tasks")
    names = {task: "lambada_openai" if task == "lambada" else task for task in TASKS}
    for task, name in names.items():
        rows = [json.dumps(_row(task, some)) for _ in range(N)]
        (folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
        head = f"task: local_{task}\ndataset_path: json\ntest_split: test\ndataset_kwargs:\n"
        source = f"  data_files: {{test: {folder}/{name}.jsonl}}\n  cache_dir: {folder}/cache\n"
        (folder / f"{task}.yaml").write_text(head + source + TASKS[task] + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=258, n_positions=512, n_embd=32, n_layer=2, n_head=2, eos_token_id=257)
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # far from uniform, so that differences show
    return model


def _harness(model: Any, tokenizer: Any, path: Path) -> dict[str, Any]:
    """What the harness says through its own wrapper of a transformers model."""
    harness = pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, max_length=512)
    loaded = TaskManager(include_defaults=False).load([str(path)])
    found: dict[str, Any] = harness.evaluate(lm, loaded, bootstrap_iters=0)
    return found


OURS: dict[str, Any] = {"piqa": piqa, "arc_easy": arc_easy, "lambada": lambada, "winogrande": winogrande}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("task", OURS)
def test_three_ways_agree(files: Path, gpt2: Any, tokenizer: Any, task: str) -> None:
    theirs = _harness(gpt2, tokenizer, files / f"{task}.yaml")["results"][f"local_{task}"]
    name = f"lm_eval:{files}/{task}.yaml"
    adapted = evaluate(gpt2, tokenizer, tasks=[name])[name]
    ours = OURS[task].evaluate(gpt2, tokenizer, examples=files)
    metrics = {key.partition(",")[0]: value for key, value in theirs.items() if key.endswith(",none")}
    metrics = {metric: value for metric, value in metrics.items() if not metric.endswith("_stderr")}
    assert metrics.keys() == {row.metric for row in ours.rows} == {row.metric for row in adapted.rows}
    for metric, value in metrics.items():
        exact = value if metric != "perplexity" else pytest.approx(value, rel=2e-6)  # fp32 sums, theirs padded
        assert adapted.value(metric) == exact and ours.value(metric) == exact
        assert adapted.value(metric) == pytest.approx(ours.value(metric), rel=1e-12)
        assert adapted.row(metric).n == ours.row(metric).n == N
        assert adapted.row(metric).ci95 == pytest.approx(ours.row(metric).ci95)
    assert [record.scores["acc"] for record in adapted.records] == [record.scores["acc"] for record in ours.records]


@pytest.mark.filterwarnings("ignore")
def test_generated_answers_agree(files: Path, gpt2: Any, tokenizer: Any) -> None:
    theirs = _harness(gpt2, tokenizer, files / "gsm8k.yaml")["samples"]["local_gsm8k"]
    name = f"lm_eval:{files}/gsm8k.yaml"
    adapted = evaluate(gpt2, tokenizer, tasks=[name])[name]
    ours = gsm8k.evaluate(gpt2, tokenizer, examples=files, shots=0, max_new=6)
    texts = [entry["resps"][0][0] for entry in theirs if entry["filter"] == "strict"]
    assert [record.output for record in ours.records] == texts
    assert [record.output[0] for record in adapted.records if record.at["filter"] == "strict"] == texts
    assert adapted.value("exact_match", filter="flexible") == ours.value("flexible")

    mark = next(c for text in texts for c in text[1:] if c.isascii() and c.isalnum())
    stopped = files / "stopped.yaml"
    stopped.write_text((files / "gsm8k.yaml").read_text().replace("['Question:']", f"['{mark}']"))
    name = f"lm_eval:{stopped}"
    adapted = evaluate(gpt2, tokenizer, tasks=[name])[name]
    theirs = _harness(gpt2, tokenizer, stopped)["samples"]["local_gsm8k"]
    found = [record.output[0] for record in adapted.records if record.at["filter"] == "strict"]
    assert found == [entry["resps"][0][0] for entry in theirs if entry["filter"] == "strict"]
    assert found != texts


@pytest.mark.filterwarnings("ignore")
def test_rolling_likelihoods_agree(files: Path, gpt2: Any, tokenizer: Any) -> None:
    task = 'output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: context\nmetric_list: [{metric: '
    head = (files / "lambada.yaml").read_text().partition("output_type")[0].replace("local_lambada", "local_rolling")
    (files / "rolling.yaml").write_text(head + task + "bits_per_byte}]\n")
    theirs = _harness(gpt2, tokenizer, files / "rolling.yaml")["results"]["local_rolling"]["bits_per_byte,none"]
    name = f"lm_eval:{files}/rolling.yaml"
    assert evaluate(gpt2, tokenizer, tasks=[name])[name].value("bits_per_byte") == pytest.approx(theirs, rel=2e-6)


@pytest.mark.filterwarnings("ignore")
def test_what_cannot_run_is_refused(files: Path, gpt2: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval")
    name = f"lm_eval:{files}/gsm8k.yaml"
    sampled = files / "sampled.yaml"
    text = (files / "gsm8k.yaml").read_text()
    sampled.write_text(text.replace("do_sample: false", "do_sample: true, temperature: 1.0"))
    with pytest.raises(ZooError, match="samples its answers"):
        evaluate(gpt2, tokenizer, tasks=[f"lm_eval:{sampled}"])
    (files / "long.yaml").write_text(text.replace("max_gen_toks: 6", "max_gen_toks: 600"))
    with pytest.raises(ZooError, match="beyond the model's 512 positions"):
        evaluate(gpt2, tokenizer, tasks=[f"lm_eval:{files}/long.yaml"])
    (files / "gone.yaml").write_text(text.replace("gsm8k.jsonl", "gone.jsonl"))
    with pytest.raises(ZooError, match="could not be loaded"):
        evaluate(gpt2, tokenizer, tasks=[f"lm_eval:{files}/gone.yaml"])
    with pytest.raises(ZooError, match="shots was -1"):
        evaluate(gpt2, tokenizer, tasks=[name], options={name: {"shots": -1}})
    # its own index takes 15 s to build
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda include_defaults: SimpleNamespace(all_tasks=["arc_easy"]))
    with pytest.raises(ZooError, match="did you mean arc_easy"):
        evaluate(gpt2, tokenizer, tasks=["lm_eval:arc_eazy"])


def test_a_name_without_the_package_or_a_file_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ZooError, match="names no task"):
        lm_eval.family("lm_eval:")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ZooError, match=r"pip install hybrid-zoo\[lm-eval\]"):
        lm_eval.family("lm_eval:arc_easy")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    with pytest.raises(ZooError, match="file 'gone.yaml' does not exist"):
        lm_eval.family("lm_eval:gone.yaml")
