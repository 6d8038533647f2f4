"""What pyproject.toml describes; a wheel also carries files that a checkout has next to the package.

They go to `forge_ray/files`, where `forge_ray.machine.shipped` looks for them. An editable installation needs no copy: it is
the checkout. Python files stay outside, so that `code_digest` is the same from a wheel and from a checkout.
"""

from __future__ import annotations

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

FOLDERS = ("cluster", "docs", "jobs")
ENDINGS = (".json", ".jsonl", ".md", ".png", ".sh", ".yaml")


class BuildWithFiles(build_py):
    def shipped(self) -> dict[str, str]:
        """Each file of the wheel that comes from outside the package → its source."""
        target = Path(self.build_lib, "forge_ray", "files")
        sources = [path for folder in FOLDERS for path in sorted(Path(folder).rglob("*")) if path.suffix in ENDINGS]
        return {str(target / source): str(source) for source in sources}

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            for target, source in self.shipped().items():
                self.mkpath(str(Path(target).parent))
                self.copy_file(source, target)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        outputs = super().get_outputs(include_bytecode)
        return outputs if self.editable_mode else [*outputs, *self.shipped()]

    def get_source_files(self) -> list[str]:
        return [*super().get_source_files(), *self.shipped().values()]


setup(cmdclass={"build_py": BuildWithFiles})
