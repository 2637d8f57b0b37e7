"""The one exception that users see for bad input."""

from __future__ import annotations


class ZooError(ValueError):
    """Bad input. The message is one line: what was wrong, what was found, and what to do."""
