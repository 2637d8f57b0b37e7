"""What the command line shows is its own: notices and bars of the libraries below it are turned off."""

from __future__ import annotations

import os


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
