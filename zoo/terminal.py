"""What the commands show is their own: a console that keeps names whole, and silence from the libraries below."""

from __future__ import annotations

import os
import sys

from rich.console import Console

PIPE_WIDTH = 200  # columns where there is no terminal to fit


def console() -> Console:
    """A console on stdout."""
    return Console(width=None if sys.stdout.isatty() else PIPE_WIDTH, highlight=False)


def silence() -> None:
    """Turn off the notices and progress bars of transformers, huggingface_hub and datasets."""
    for name, value in (
        ("TRANSFORMERS_VERBOSITY", "error"),
        ("HF_HUB_DISABLE_PROGRESS_BARS", "1"),
        ("HF_DATASETS_DISABLE_PROGRESS_BARS", "1"),
        ("TOKENIZERS_PARALLELISM", "false"),
    ):
        os.environ.setdefault(name, value)
    from transformers.utils import logging

    logging.disable_progress_bar()
