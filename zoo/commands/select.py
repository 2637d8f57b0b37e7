"""`zoo select`: what was found, as a table and a command to go on with."""

from __future__ import annotations

from zoo.conversion.core.select import Selection

HEADS = 8


def table(selection: Selection) -> list[tuple[str, ...]]:
    """By method: the layers it keeps, and its ranking with scores."""
    return [
        (
            f"{method} *" if method == selection.by else method,
            ",".join(map(str, ranking.keep)),
            " ".join(f"{layer} ({ranking.scores[layer]:.3g})" for layer in ranking.order if ranking.scores),
        )
        for method, ranking in selection.rankings.items()
    ]


def notes(selection: Selection, teacher: str) -> list[str]:
    """The best heads, and how to convert by what was found."""
    best = [f"{at} ({head['score']:.3g})" for at, head in list(selection.heads.items())[:HEADS]]
    keep = ",".join(map(str, selection.keep))
    return [
        *([f"best heads, LAYER:HEAD (score): {' '.join(best)}"] if best else []),
        f"zoo convert {teacher} OUT --mixer M --keep {keep}",
    ]
