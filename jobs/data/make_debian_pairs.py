"""Make pairs of judged answers from debian_sections.jsonl: a package's own section against a plausible wrong one.

Plausible are the five wrong sections whose packages share most words with this one (naive Bayes over the other rows); a hash
of the row takes one of them. The same rows give the same bytes.

    python jobs/data/make_debian_pairs.py > jobs/data/debian_pairs.jsonl
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import sys
from collections import Counter
from pathlib import Path

ROWS = Path(__file__).with_name("debian_sections.jsonl")
NUM_PLAUSIBLE = 5


def words(text: str) -> set[str]:
    return set(re.findall(r"[a-z]{2,}", text.lower()))


def main() -> None:
    rows = [json.loads(line)["messages"] for line in ROWS.read_text(encoding="utf-8").splitlines()]
    packages = [(turns, words(turns[-2]["content"]), turns[-1]["content"]) for turns in rows]
    sizes = Counter(section for _, _, section in packages)
    counts = {section: Counter[str]() for section in sizes}
    for _, mentioned, section in packages:
        counts[section].update(mentioned)
    for turns, mentioned, section in packages:
        likeliness = {
            other: sum(math.log((counts[other][word] + 0.1) / (sizes[other] + 0.2)) for word in sorted(mentioned))
            for other in sizes
            if other != section
        }
        plausible = sorted(likeliness, key=lambda other: (-likeliness[other], other))[:NUM_PLAUSIBLE]
        number = hashlib.sha256(turns[-2]["content"].encode()).digest()[0] % NUM_PLAUSIBLE
        pair = {"prompt": turns[:-1], "chosen": section, "rejected": plausible[number]}
        sys.stdout.write(json.dumps(pair, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
