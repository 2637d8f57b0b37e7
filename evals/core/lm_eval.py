r"""Tasks of lm-evaluation-harness, run on our requests: pad-free, resumable, shared between processes.

Example: `--tasks lm_eval:arc_easy` is its own task (whose data it downloads unless it is in the cache of `datasets`);
`--tasks lm_eval:path/to/task.yaml` is a task file, whose data may be local:

    task: my_arc
    dataset_path: json
    dataset_kwargs: {data_files: {test: /data/arc_easy.jsonl}}
    test_split: test
    output_type: multiple_choice
    doc_to_text: "{{query}}\nAnswer:"
    doc_to_choice: choices
    doc_to_target: gold
    metric_list: [{metric: acc}, {metric: acc_norm}]

Definitions, prompts, filters and metrics are the harness's; intervals are ours. The package is optional
(`pip install hybrid-zoo[lm-eval]`).
"""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import importlib.util
import math
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from zoo.errors import ZooError
from zoo.evals.core import running
from zoo.evals.core.records import Record, summarised
from zoo.evals.core.result import Result, Row
from zoo.evals.core.statistics import exponential, mean_row

PREFIX = "lm_eval:"
_FEWSHOT_SEED = 1234  # the harness's default
_SHOWN = 4096


@dataclass(frozen=True)
class Family:
    """Stands for a module of evals: `task` is the whole name, "lm_eval:arc_easy"."""

    task: str
    VERSION: ClassVar[int] = 1
    NEEDS: ClassVar[tuple[str, ...]] = ("tokenizer",)

    def evaluate(
        self,
        model: Any,
        tokenizer: Any,
        *,
        samples: int | None = None,
        shots: int | None = None,
        batch_tokens: int | None = None,
    ) -> Result:
        """The harness's result on `model`.

        Args:
            samples: at most this many per task, from the start (default: all).
            shots: examples before the question (default: the task's own number).
            batch_tokens: tokens that run together; it changes the speed, not the scores.

        Returns:
            Rows of the task's metrics, at {"task": name} where it is a group of tasks and {"filter": name} where there
            are several. Means over samples, and perplexities, have standard errors and intervals; others have none.

        Raises:
            ZooError: no tokenizer, an unknown task, data that cannot be loaded, or a text beyond the model's length.
        """
        started = time.perf_counter()
        running.require_tokenizer(tokenizer, self.task)
        running.check_positive(self.task, samples=samples)
        if shots is not None and shots < 0:
            raise ZooError(f"task {self.task!r}: shots was {shots}; it must be at least 0")
        loaded = _load(self.task, shots)
        adapter = importlib.import_module("zoo.evals.core.lm_eval_model")
        lm = adapter.ZooLM(model, tokenizer, self.task, batch_tokens)
        found = importlib.import_module("lm_eval").evaluate(lm, loaded, limit=samples, bootstrap_iters=0)
        records = list(_records(found["samples"]))
        return running.build(
            self.task,
            self.VERSION,
            model,
            list(_rows(found["results"], records, several=len(loaded["tasks"]) > 1)),
            started=started,
            options={"samples": samples, "shots": found["n-shot"], "versions": found["versions"], "lm_eval": version()},
            comparable_to=self.task,
            records=records,
        )


def family(task: str) -> Family:
    """What stands for the module of `task`, "lm_eval:NAME" or "lm_eval:FILE.yaml".

    Raises:
        ZooError: the package is not installed, there is no name, or no such file.
    """
    name = task.removeprefix(PREFIX)
    if not name:
        raise ZooError(f"task {task!r} names no task; write {PREFIX}arc_easy or {PREFIX}path/to/task.yaml")
    if importlib.util.find_spec("lm_eval") is None:
        raise ZooError(f"task {task!r} needs lm-evaluation-harness; install it with `pip install hybrid-zoo[lm-eval]`")
    if name.endswith((".yaml", ".yml")) and not Path(name).is_file():
        raise ZooError(f"task {task!r}: file {name!r} does not exist; pass the path of a task file")
    return Family(task)


def version() -> str:
    """The version of the harness."""
    return importlib.metadata.version("lm_eval")


def _load(task: str, shots: int | None) -> Any:
    """The harness's tasks with their data."""
    name = task.removeprefix(PREFIX)
    local = name.endswith((".yaml", ".yml"))
    manager = importlib.import_module("lm_eval.tasks").TaskManager(include_defaults=not local)
    if not local and name not in manager.all_tasks:
        close = difflib.get_close_matches(name, manager.all_tasks, n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else "list its tasks with `lm-eval ls tasks`"
        raise ZooError(f"task {task!r} is not one of lm-evaluation-harness {version()}; {hint}")
    try:
        loaded = manager.load([str(Path(name).resolve()) if local else name])
    except Exception as error:  # a task file may fail in any way: its data, its fields, its own code
        raise ZooError(
            f"task {task!r} could not be loaded ({type(error).__name__}: {error}); check its data"
        ) from error
    for each in loaded["tasks"].values():
        own = each.get_config("num_fewshot")
        each.set_config(key="num_fewshot", value=own or 0 if shots is None or own == 0 else shots)
        each.set_fewshot_seed(seed=_FEWSHOT_SEED)
    return loaded


def _records(samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> Iterator[Record]:
    """One record per sample and filter; a metric that is not one number per sample is left out."""
    for task, entries in samples.items():
        for entry in entries:
            scores = {metric: entry[metric] for metric in entry["metrics"] if _is_number(entry[metric])}
            context = entry["arguments"][0][0]
            yield Record(
                id=f"{task}/{entry['doc_id']}/{entry['filter']}",
                scores={metric: float(value) for metric, value in scores.items()},
                at={"task": task, "filter": entry["filter"]},
                prompt=str(context)[-_SHOWN:],
                output=[response[0] for response in entry["resps"]],
                answers=(str(entry["target"]),),
            )


def _is_number(value: Any) -> bool:
    # numpy's scalars are none of Python's numbers
    return hasattr(value, "__float__") and not isinstance(value, str)


def _rows(results: Mapping[str, Any], records: Sequence[Record], several: bool) -> Iterator[Row]:
    """The harness's numbers, with the interval of a mean or a perplexity where they are one."""
    by_place: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for record in records:
        by_place[str(record.at["task"]), str(record.at["filter"])].append(record)
    for task, entry in results.items():
        for name, value in entry.items():
            metric, _, chosen = name.partition(",")
            if not chosen or metric.endswith("_stderr") or not _is_number(value):
                continue
            at: dict[str, int | str] = {"task": task} if several else {}
            at |= {} if chosen == "none" else {"filter": chosen}
            yield _row(metric, float(value), by_place[task, chosen], at)


def _row(metric: str, value: float, records: Sequence[Record], at: dict[str, int | str]) -> Row:
    scored = [Record(record.id, {metric: record.scores[metric]}) for record in records if metric in record.scores]
    for make in (_mean, _perplexity) if scored else ():
        row: Row = make(metric, scored)
        if math.isclose(row.value, value, rel_tol=1e-9, abs_tol=1e-12):
            return Row(metric, value, row.n, row.stderr, row.ci95, at)
    return Row(metric, value, n=len(records) or None, at=at)


def _mean(metric: str, records: Sequence[Record]) -> Row:
    return summarised(records)[0]


def _perplexity(metric: str, records: Sequence[Record]) -> Row:
    row = mean_row(metric, [-record.scores[metric] for record in records])
    return exponential(metric, row) if row.value < 700 else row
