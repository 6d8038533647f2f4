"""One reading of a GGUF file for all that ask for it.

Upstream: transformers 5.23 (`modeling_gguf_pytorch_utils.py`) reads the whole file again for the configuration, the weights
and the tokenizer, each time token by token, and makes the table of tensor names again for every module of the model: most of
the time that the import of a small model takes.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import gguf

_ONE_AT_A_TIME = threading.Lock()  # two that overlap would each put back what the other had put there


@contextlib.contextmanager
def read_once(source: Path) -> Iterator[Any]:
    """The file's `gguf.GGUFReader`; inside, whoever asks `gguf` for one of the same file gets it. It is only read."""
    with _ONE_AT_A_TIME:
        reader_class, name_map = gguf.GGUFReader, gguf.get_tensor_name_map
        file = reader_class(source)

        def reader_of(path: Any, *arguments: Any, **named: Any) -> Any:
            return file if Path(path) == source and not arguments and not named else reader_class(path, *arguments, **named)

        setattr(gguf, "GGUFReader", reader_of)  # noqa: B010  (a function in the place of a class, for those who call it)
        setattr(gguf, "get_tensor_name_map", cache(name_map))  # noqa: B010
        try:
            yield file
        finally:
            setattr(gguf, "GGUFReader", reader_class)  # noqa: B010
            setattr(gguf, "get_tensor_name_map", name_map)  # noqa: B010
