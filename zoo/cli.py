"""The command line. Each verb parses its options, calls one library function and prints what it returned.

torch and transformers are imported inside the verbs, so that `zoo --help` is quick.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from zoo.commands.options import heads_by_layer, integers, names_in, parse_json
from zoo.errors import ZooError
from zoo.terminal import OneLineErrors, check_row, plan_row, show, show_json, show_table, silence

app = typer.Typer(
    cls=OneLineErrors,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Efficient and hybrid language-model architectures: convert a checkpoint, heal it, evaluate it.",
)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def main() -> None:
    """Entry point of the `zoo` command."""
    app()


@app.command("list")
def list_(
    kind: Annotated[str | None, typer.Argument(help="A registry; all of them when left out.")] = None,
    as_json: AsJson = False,
) -> None:
    """List what is registered."""
    from zoo import registry

    kinds = [kind] if kind else list(registry.KINDS)
    found = {name: registry.names(name) for name in kinds}
    if as_json:
        show_json(found[kind] if kind else found)
    elif kind:
        print("\n".join(found[kind]))
    else:
        show_table(("kind", "names"), [(name, ", ".join(names)) for name, names in found.items()])


@app.command()
def info(name: Annotated[str, typer.Argument(metavar="NAME", help="A registered name, or KIND/NAME.")]) -> None:
    """Describe what is registered under a name."""
    silence()
    from zoo.commands.info import describe

    print("\n\n".join(describe(name)))


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="Registered name, directory or hub id of a softmax checkpoint.")],
    out: Annotated[Path, typer.Argument(help="Directory to write; it must not exist.")],
    mixer: Annotated[str | None, typer.Option(help="Mixer for every layer that is not kept.")] = None,
    layout: Annotated[str | None, typer.Option(help='Mixer per layer: "gated_delta_net*3,attention".')] = None,
    keep: Annotated[str | None, typer.Option(help="Layers that keep their attention: 2,5,8,11.")] = None,
    keep_heads: Annotated[
        list[str] | None, typer.Option(help="Heads of a layer that keep theirs: 11:0,2. May be repeated.")
    ] = None,
    init: Annotated[str, typer.Option(help="Start of new parameters: plain, or calibrated on text.")] = "plain",
    calibration_data: Annotated[str, typer.Option(help="That text, as for `zoo heal --data`.")] = "self",
    rope: Annotated[str, typer.Option(help="RoPE of new layers: keep, drop or hype (kept layers lose it).")] = "keep",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and write nothing.")] = False,
) -> None:
    """Swap the attention layers of a checkpoint for other mixers."""
    if (mixer is None) == (layout is None):
        raise ZooError("convert needs one of --mixer M and --layout L; pass exactly one of them")
    kept, heads = integers("--keep", keep) or [], heads_by_layer("--keep-heads", keep_heads or [])
    silence()
    from zoo.conversion.core.convert import convert as run

    starts: dict[str, Any] = dict(init=init, calibration_data=calibration_data, rope=rope)
    report = run(source, out, mixer=mixer, keep=kept, keep_heads=heads, layout=layout, dry_run=dry_run, **starts)
    if dry_run:
        show_table(("target", "operation", "sources", "shape"), [plan_row(row) for row in report.plan.rows])
        return
    show_table(("check", "passed", "details"), [check_row(name, check) for name, check in report.checks.items()])
    print(f"wrote {out}" if report.ok else f"verification failed; see {out / 'verification.json'}")
    raise typer.Exit(0 if report.ok else 1)


@app.command()
def heal(
    teacher: Annotated[str, typer.Argument(help="Registered name, directory or hub id of the source model.")],
    student: Annotated[str, typer.Argument(help="Directory that `zoo convert` wrote.")],
    out: Annotated[Path, typer.Argument(help="Directory to write; it must not exist.")],
    recipe: Annotated[str, typer.Option(help="YAML file of stages, or a preset: see docs/healing.md.")] = "quick",
    data: Annotated[
        str | None,
        typer.Option(help="Text, .xz, .jsonl of messages, directory, datasets:NAME, recall, lists, or self (default)."),
    ] = None,
    align_tokens: Annotated[int | None, typer.Option(help="Tokens of stage align; by default by the device.")] = None,
    distill_tokens: Annotated[int | None, typer.Option(help="Tokens of stage distill; likewise.")] = None,
    cache: Annotated[Path | None, typer.Option(help="Directory for what runs share: tokens, teacher's words.")] = None,
    log: Annotated[str | None, typer.Option(help="tensorboard:DIR or trackio:PROJECT.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from OUT.partial.")] = False,
) -> None:
    """Train a converted model against its teacher."""
    silence()
    from zoo.conversion.core.heal import heal as run

    tokens: dict[str, Any] = {"align_tokens": align_tokens, "distill_tokens": distill_tokens}
    report = run(teacher, student, out, recipe=recipe, data=data, cache=cache, log=log, resume=resume, **tokens)
    print(f"wrote {out}: {report}")


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="Registered name, directory or hub id.")],
    out: Annotated[Path, typer.Argument(help="Directory to write; it must not exist.")],
    to: Annotated[
        str, typer.Option(help="native: a class of transformers that fits; the name of one; or remote-code.")
    ] = "native",
    max_shard_size: Annotated[str, typer.Option(help="Such as 500MB.")] = "5GB",
) -> None:
    """Write a checkpoint that transformers loads without this library."""
    silence()
    from zoo.commands.export import run

    print(run(model, out, to, max_shard_size))


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="Registered name, directory or hub id.")],
    tasks: Annotated[str | None, typer.Option(help="Comma-separated evals; see `zoo list evals`.")] = None,
    suite: Annotated[str | None, typer.Option(help="quick (default), recall, long, language or full.")] = None,
    teacher: Annotated[str | None, typer.Option(help="Model to compare with (fidelity).")] = None,
    data: Annotated[str | None, typer.Option(help="Text file (.txt, .md or .xz).")] = None,
    examples: Annotated[str | None, typer.Option(help="Examples of language tasks: .jsonl or directory.")] = None,
    lengths: Annotated[str | None, typer.Option(help="Lengths in tokens: 256,512.")] = None,
    samples: Annotated[int | None, typer.Option(help="Samples per length, where an eval draws samples.")] = None,
    out: Annotated[Path | None, typer.Option(help="Directory for the results (JSON) and the page (HTML).")] = None,
    as_json: AsJson = False,
) -> None:
    """Evaluate a model."""
    given = dict(teacher=teacher, data=data, examples=examples, lengths=integers("--lengths", lengths), samples=samples)
    silence()
    from zoo.commands.evaluate import run

    results = run(model, names_in(tasks), suite, out, **given)
    if as_json:
        show_json({task: result.to_dict() for task, result in results.items()})
        return
    from zoo.evals.core.report import table

    show(table([(model, results)]))
    if out is not None:
        print(f"wrote {out}")


@app.command()
def select(
    teacher: Annotated[str, typer.Argument(help="Registered name, directory or hub id of a softmax model.")],
    keep: Annotated[int, typer.Option(help="Layers that are to keep their attention.")],
    bank: Annotated[Path | None, typer.Option(help="Conversion of all layers, its mixers aligned.")] = None,
    data: Annotated[str | None, typer.Option(help="Text file (.txt, .md or .xz).")] = None,
    out: Annotated[Path, typer.Option(help="Directory to write; it must not exist.")] = Path("zoo-selection"),
    by: Annotated[str | None, typer.Option(help="Method that decides; swap_recall with a bank, else heads.")] = None,
    methods: Annotated[str | None, typer.Option(help="Comma-separated methods; all that can run by default.")] = None,
    samples: Annotated[int, typer.Option(help="Lists of keys and values, and windows of text.")] = 16,
    pairs: Annotated[int, typer.Option(help="Pairs in a list.")] = 24,
    length: Annotated[int, typer.Option(help="Tokens of a window of text.")] = 512,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from OUT.partial.")] = False,
) -> None:
    """Rank the layers of a model by how much they need their attention."""
    silence()
    from zoo.commands.select import notes, table
    from zoo.selection import select as run

    options = dict(bank=bank, data=data, by=by, methods=names_in(methods), samples=samples, pairs=pairs, length=length)
    found = run(teacher, out, keep=keep, resume=resume, **options)  # type: ignore[arg-type]
    show_table(("method", "keep", "ranking (score)"), table(found))
    print("\n".join([*notes(found, teacher), f"wrote {out}"]))


@app.command()
def verify(
    out: Annotated[Path, typer.Argument(help="Directory that `zoo convert` or `zoo heal` wrote.")],
    source: Annotated[str | None, typer.Option(help="Where its source lies now; by default as recorded.")] = None,
    data: Annotated[str | None, typer.Option(help="Text to measure on (.txt, .md or .xz).")] = None,
    report: Annotated[Path | None, typer.Option(help="Directory for JSON file and page; OUT by default.")] = None,
    as_json: AsJson = False,
) -> None:
    """Check a converted model against its source, and say what each of its new layers does."""
    silence()
    from zoo.conversion.core.verification import verify as run

    checks = run(out, source, data=data, report=report or out)
    if as_json:
        show_json(checks)
    else:
        show_table(("check", "passed", "details"), [check_row(name, check) for name, check in checks.items()])
        print(f"wrote {(report or out) / 'verification.json'} and verification.html")
    raise typer.Exit(1 if any(check["passed"] is False for check in checks.values()) else 0)


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help="Registered name, directory or hub id.")],
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the most likely token.")] = 0.8,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0)] = 0.95,
    seed: int = 0,
) -> None:
    """Continue a prompt; the text is printed as it comes."""
    silence()
    from zoo.commands.generate import stream

    stream(model, prompt, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)


@app.command()
def calibrate(
    model: Annotated[str, typer.Argument(help="Registered name, directory or hub id.")],
    method: Annotated[str, typer.Option(help="Training-free method that is calibrated: minference.")],
    data: Annotated[str, typer.Option(help="Text file (.txt, .md or .xz) with the samples.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="File to write; it must not exist.")],
    args: Annotated[str, typer.Option(help='Options of the method, as JSON: {"budget": 0.1}.')] = "{}",
    samples: Annotated[int, typer.Option(help="Windows of text.")] = 4,
    length: Annotated[int, typer.Option(help="Tokens of a window.")] = 2048,
) -> None:
    """Find what a training-free method needs to know about each layer of a model."""
    options = parse_json("--args", args)
    silence()
    from zoo.commands.calibrate import run

    written = run(model, method, data, out, args=options, samples=samples, length=length)
    layers = written["layers"]
    print(f"wrote {out}: {method} in {sum(layer is not None for layer in layers)} of {len(layers)} layers")


@app.command()
def card(
    name: Annotated[str | None, typer.Argument(help="A card's name, or README; all of them when left out.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Write nothing; exit 1 when a table is stale.")] = False,
) -> None:
    """Rewrite the generated tables of the model cards and of the README."""
    silence()
    from zoo import cards

    stale = [target for target in ([name] if name else cards.targets()) if cards.refresh(target, write=not check)]
    for target in stale:
        print(f"{target}: {'stale' if check else 'rewritten'}")
    raise typer.Exit(1 if check and stale else 0)


@app.command()
def bench(
    what: Annotated[str, typer.Argument(metavar="kernels", help="What to measure; `kernels` is all there is.")],
    op: Annotated[str | None, typer.Option(help="OP or OP/VARIANT, with commas between them; all by default.")] = None,
    against: Annotated[str | None, typer.Option(help="Peers to measure beside ours: fla,sdpa,flex.")] = None,
    out: Annotated[Path | None, typer.Option(help="CSV to write or go on with; the plot lies beside it.")] = None,
    tune: Annotated[bool, typer.Option("--tune", help="Search launch choices for this GPU and keep them.")] = False,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    direction: Annotated[str | None, typer.Option(help="fwd, fwdbwd or decode; all by default.")] = None,
    jobs: Annotated[int | None, typer.Option(help="Processes that compile first; one per core by default.")] = None,
) -> None:
    """Check and time the kernels on this GPU (small cases without one)."""
    if what != "kernels":
        raise ZooError(f"{what!r} cannot be measured; `zoo bench kernels` can")
    ops, peers = names_in(op), names_in(against) or []
    silence()
    from zoo.commands import bench as benchmark

    if tune:
        from zoo.commands import bench_tune

        found = bench_tune.tune(ops, dtype)
        show_table(("kernel", "key", "before", "now", "times faster"), found)
        return
    rows = benchmark.run(ops, peers, out, dtype=dtype, direction=direction, jobs=jobs)
    show_table(benchmark.HEADER, [benchmark.cells(row) for row in rows])
    if means := benchmark.summary(rows):
        show_table(benchmark.SUMMARY_HEADER, means)
    raise typer.Exit(0 if all(row["check"] == "ok" for row in rows) else 1)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Directory to write; it must not exist.")] = Path("zoo-demo"),
) -> None:
    """Convert, heal and evaluate the bundled teacher; nothing is downloaded."""
    silence()
    from zoo.demo import run

    run(out)
