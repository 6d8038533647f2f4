"""Limit the log output of libraries to errors: on the terminal each stage has one line of ours."""

from __future__ import annotations

import logging
import os


def quiet_libraries() -> None:
    """Set a filter instead of a level, because DeepSpeed sets its own level when it is imported."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for name in ("DeepSpeed", "ray.serve"):
        logger = logging.getLogger(name)
        if _errors_only not in logger.filters:
            logger.addFilter(_errors_only)


def _errors_only(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR
