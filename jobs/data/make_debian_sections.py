"""Make debian_sections.jsonl: a package's name and one-line description → its section in the Debian archive.

Reads the package index that `apt-get update` has put on a Debian machine. The same index gives the same bytes: rows are
chosen and ordered by a hash of the package name, and nothing depends on the clock or on the order of the index.

    python jobs/data/make_debian_sections.py > jobs/data/debian_sections.jsonl
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

# Sections that a person tells apart, each with more than 200 source packages.
SECTIONS = (
    "admin",
    "editors",
    "fonts",
    "games",
    "graphics",
    "java",
    "javascript",
    "mail",
    "math",
    "net",
    "perl",
    "python",
    "ruby",
    "science",
    "sound",
)
SYSTEM = "Name the Debian section of this package."
SALT = "debian-sections-1"
NEAR = 0.7  # share of common words above which two descriptions say the same
# Companions of another package: their line says what they are to it, not what it does.
COMPANION = re.compile(
    r"transitional|dummy|metapackage|meta-package|debug(ging)? symbols|documentation|development (files|headers|libraries)"
    r"|common files|data files|translations?\b|language pack|examples|shared librar|runtime librar|\bdata$",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Package:
    name: str
    source: str
    section: str
    description: str

    @property
    def family(self) -> str:
        """One name for all versions and parts of a source: `foo`, `foo2`, `foo-1.4` are one."""
        return re.sub(r"[-_.+]?\d[\d.]*", "", self.source)

    @cached_property
    def rank(self) -> str:
        return hashlib.sha256(f"{SALT}:{self.name}".encode()).hexdigest()


def packages(index: str) -> Iterator[Package]:
    """The packages of the free `main` component, as `apt-cache dumpavail` prints them."""
    for stanza in index.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in stanza.splitlines() if ": " in line and not line.startswith(" "))
        if re.match(r"pool/(updates/)?main/", fields.get("Filename", "")):  # `updates`: the security archive
            yield Package(
                name=fields["Package"],
                source=fields.get("Source", fields["Package"]).split()[0],
                section=fields.get("Section", ""),
                description=" ".join(fields.get("Description", "").split()),
            )


def one_per_family(candidates: Iterator[Package]) -> list[Package]:
    """The package named like its source, else the one with the shortest name."""
    best: dict[str, Package] = {}
    for package in candidates:
        order = (package.name != package.source, len(package.name), package.name)
        incumbent = best.get(package.family)
        if incumbent is None or order < (incumbent.name != incumbent.source, len(incumbent.name), incumbent.name):
            best[package.family] = package
    return sorted(best.values(), key=lambda package: package.rank)


def distinct(ranked: list[Package], limit: int) -> list[Package]:
    """The first `limit` packages without near-repeats of a description, so that no test row is taught by its twin."""
    kept: list[Package] = []
    kept_words: list[frozenset[str]] = []
    for package in ranked:
        words = frozenset(re.findall(r"[a-z]{2,}", package.description.lower()))
        if not any(len(words & other) > NEAR * len(words | other) for other in kept_words):
            kept.append(package)
            kept_words.append(words)
        if len(kept) == limit:
            break
    return kept


def rows(index: str, per_section: int) -> list[dict[str, object]]:
    usable = (p for p in packages(index) if p.section in SECTIONS and p.description and not COMPANION.search(p.description))
    families = one_per_family(usable)
    chosen: list[Package] = []
    for section in SECTIONS:
        ranked = [package for package in families if package.section == section]
        kept = distinct(ranked, per_section)
        print(f"{section}: {len(kept)} of {len(ranked)}", file=sys.stderr)
        chosen += kept
    chosen.sort(key=lambda package: package.rank)
    return [
        {
            "messages": [
                {"role": "system", "content": SYSTEM},
                {"role": "user", "content": f"{package.name}: {package.description}"},
                {"role": "assistant", "content": package.section},
            ]
        }
        for package in chosen
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--per-section", type=int, default=200)
    arguments = parser.parse_args()
    command = ["apt-cache", "dumpavail"]
    index = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, "LC_ALL": "C.UTF-8"})
    for row in rows(index.stdout, arguments.per_section):
        print(json.dumps(row, ensure_ascii=False))


if __name__ == "__main__":
    main()
