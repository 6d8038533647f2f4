"""A GGUF file is parsed once, however many ask for it, and afterwards everything is as it was."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest

from forge_ray.models.gguf_once import read_once

pytestmark = pytest.mark.unit


def a_file(path: Path) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_who_asks_for_the_file_gets_the_one_that_was_read(tmp_path: Path) -> None:
    one, other = a_file(tmp_path / "one.gguf"), a_file(tmp_path / "other.gguf")
    before = gguf.GGUFReader, gguf.get_tensor_name_map
    with read_once(one) as file:
        assert gguf.GGUFReader(str(one)) is file
        assert gguf.GGUFReader(other) is not file
        llama = gguf.MODEL_ARCH.LLAMA
        assert gguf.get_tensor_name_map(llama, 2) is gguf.get_tensor_name_map(llama, 2)
        assert gguf.get_tensor_name_map(llama, 3).mapping != gguf.get_tensor_name_map(llama, 2).mapping
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == before


def test_an_error_leaves_nothing_behind(tmp_path: Path) -> None:
    before = gguf.GGUFReader, gguf.get_tensor_name_map
    with pytest.raises(ZeroDivisionError), read_once(a_file(tmp_path / "one.gguf")):
        raise ZeroDivisionError
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == before
