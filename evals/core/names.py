"""First and last names for phone books."""

from __future__ import annotations

_FIRST = """
Adam Alice Amber Andrew Anna Arthur Beth Brian Carl Carol Cathy Clara Colin Daisy David Diana Donald Edith Edward Elena
Emma Eric Ethan Fiona Frank Fred George Gina Grace Hannah Harold Helen Henry Hugo Irene Isaac Jack Jane Jason Joan
Joseph Julia Karen Keith Laura Leo Linda Louis Lucy Maria Mark Martha Nancy Nathan Nina Oliver Oscar Paula Peter Rachel
Ralph Rita Robert Rosa Ruth Samuel Sarah Simon Sophie Stella Thomas Vera Victor Wendy
"""
_LAST = """
Adams Allen Bailey Barnes Bell Bennett Brooks Burke Butler Carter Chapman Clark Collins Cooper Cox Curtis Dawson Dixon
Doyle Duncan Ellis Evans Ferguson Fisher Fletcher Foster Gibson Gordon Graham Grant Harper Harris Hayes Holmes Howard
Hughes Jenkins Kelly Kennedy Knight Lambert Lawson Lewis Marshall Mason Miller Mitchell Morgan Murphy Nelson Norris
Palmer Parker Pearson Perry Porter Powell Quinn Reed Reynolds Russell Saunders Shaw Spencer Stewart Sullivan Taylor
Turner Wallace Walsh Watson Webster Wheeler Young
"""
FIRST: tuple[str, ...] = tuple(_FIRST.split())
LAST: tuple[str, ...] = tuple(_LAST.split())


def names() -> list[str]:
    """Every "First Last", in one order."""
    return [f"{first} {last}" for first in FIRST for last in LAST]
