"""The ids of texts by an encoder that is faster than `tokenizers`: fastokens, for a tokenizer on which it is proven equal.

`tokenizers` stays the reference: whoever decides that the fast one is used has compared the two (`equality.py`), and a text
that the fast one refuses, or that has a character at which the two differ, is the reference's. Offsets are too.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int32]
NAME, REFERENCE = "fastokens", "tokenizers"


def versions() -> dict[str, str]:
    """Of what decides whether the two are equal: both encoders, and the library that opens a tokenizer's files."""
    return {name: version(name) for name in (NAME, REFERENCE, "transformers")}


@dataclass(eq=False)
class FastEncoder:
    """`native`: a `fastokens.Tokenizer`; `left`: characters whose texts are left to the reference. What happens is counted:
    texts that it refused, and the `failure` after which this process no longer asks it."""

    native: Any
    left: str = ""
    num_refused: int = 0
    failure: str = ""

    def __post_init__(self) -> None:
        self._left = re.compile(f"[{re.escape(self.left)}]") if self.left else None

    def ids(self, texts: Sequence[str], add_special_tokens: bool = False) -> list[Ids | None]:
        """The ids of each text, [its tokens]; None where they are to be the reference's."""
        results: list[Ids | None] = [None] * len(texts)
        if self.failure:
            return results
        own = [n for n, text in enumerate(texts) if self._left is None or not self._left.search(text)]
        for number, ids in zip(own, self._encoded([texts[n] for n in own], add_special_tokens), strict=True):
            results[number] = ids
        return results

    def _encoded(self, texts: list[str], add_special_tokens: bool) -> Sequence[Ids | None]:
        if not texts:
            return []
        try:
            flat, bounds = self.native.encode_batch_flat(texts, add_special_tokens=add_special_tokens)
        except ValueError:  # one of them has what it does not support, such as a byte that the vocabulary lacks
            if len(texts) == 1:
                self.num_refused += 1
                return [None]
            half = len(texts) // 2
            return [*self._encoded(texts[:half], add_special_tokens), *self._encoded(texts[half:], add_special_tokens)]
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic of Rust is no `Exception`
            self.failure = f"{NAME} ended with {type(error).__name__}: {' '.join(str(error).split())[:200]}"
            print(f"error: {self.failure}; {REFERENCE} encodes from now on", file=sys.stderr)
            return [None] * len(texts)
        return np.split(
            np.frombuffer(flat, np.uint32).astype(np.int32), np.frombuffer(bounds, np.uint64)[1:-1].astype(np.int64)
        )


def open_fast(backend: Any, left: str = "") -> FastEncoder | str:
    """The fast encoder of a `tokenizers.Tokenizer` as it is now, or why there is none."""
    from fastokens import Tokenizer

    try:
        return FastEncoder(Tokenizer.from_json_str(backend.to_str()), left)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # what it does not support is a ValueError; a part in Python is not written out
        return f"{NAME} does not open it: {' '.join(str(error).split())[:200]}"
