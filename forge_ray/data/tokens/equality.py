"""Whether a fast encoder gives the ids of the reference, for one tokenizer: both get texts on which encoders differ.

Texts: every entry of the vocabulary; every added token in every position; the characters of Unicode in front of others;
seeded mixtures of all of these; long runs; and texts that begin as the one before, since an encoder may remember what it did
last. A character at which the two differ (they have other versions of Unicode) is left to the reference where these are few.
Any other difference refuses the encoder for this tokenizer.
"""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from forge_ray.data.tokens.fast import NAME, REFERENCE, FastEncoder, Ids

EDITION = 1  # of the texts: another one is another proof
BATCH = 2048
NUM_MIXTURES, NUM_SHARED = 3000, 60
MAX_LEFT = 256  # characters
MAX_REFUSED = 0.05  # of all texts
CONTINUED = 4500  # characters from which an encoder may remember a text
POOLS = (
    *(
        "abc def GHI",
        "0123456789",
        "  \t\n\r",
        "äöüßéñ",
        "東京都你好",
        "مرحبا",
        "नमस्ते",
        "한국어 조선말",
        "각ᄀ",
        "ﬁﬂ",
        "Ａ１",
        "𝒜𝔅",
    ),
    *(
        "🙂👩\u200d👩\u200d👧\u200d👦🏳\ufe0f\u200d🌈",
        "\u200b\u200d\ufeff\u00a0\u3000",
        "\u0301\u0308a\u0323",
        "\u2028\u2029\x85",
    ),
    *("!!!???...,,;;", "_-/\\<>|{}[]`~@#$%^&*", "\x00\x01\x1f\x7f"),
)
WORDS = (
    "'s",
    "'t",
    "'RE",
    "'ll",
    "\r\n",
    "\r\n\r\n",
    "   ",
    "\n \n",
    "<0xE4>",
    "<0x0A>",
    "▁",
    "Ġ",
    "Ċ",
    "https://a.b/c?d=1",
    "camelCaseWord",
    "1,234.50",
    "<s>",
    "</s>",
    "<|",
    "|>",
)
RUNS = (
    " ",
    "\t",
    "\n",
    "\r\n",
    "a",
    "A",
    "aB",
    "ab ",
    "1",
    "!",
    ".-",
    "é",
    "字",
    "🙂",
    "\u0301",
    "e\u0301",
    "\u200d",
    "'s",
    "▁",
)
LENGTHS = (2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 63, 127, 255, 511, 1023, 1024, 1025, 4096)


@dataclass(frozen=True)
class Proof:
    """On how many texts the two were equal; `left` are the characters at which they are not, `difference` why the encoder is
    not used, "" where it is."""

    num_texts: int
    left: str = ""
    difference: str = ""


@dataclass
class _Comparison:
    backend: Any
    fast: FastEncoder
    num_texts: int = 0
    different: list[str] = field(default_factory=list)

    def look(self, texts: Sequence[str], add_special_tokens: bool = False) -> None:
        """Compare the two, a batch at a time; a text of which they make other ids is kept."""
        for start in range(0, len(texts), BATCH):
            batch = list(texts[start : start + BATCH])
            encodings = self.backend.encode_batch_fast(batch, add_special_tokens=add_special_tokens)
            results = self.fast.ids(batch, add_special_tokens)
            self.num_texts += len(batch)
            self.different += [
                text for text, one, other in zip(batch, results, encodings, strict=True) if not _equal(one, other.ids)
            ]


def _equal(ids: Ids | None, expected: list[int]) -> bool:
    return ids is None or ids.tolist() == expected


def prove(backend: Any, fast: FastEncoder, added: Sequence[str]) -> Proof:
    """Compare `fast` with the `tokenizers.Tokenizer` that it was opened from; `added`: its added tokens. The backend neither
    truncates nor pads."""
    comparison, rng = _Comparison(backend, fast), random.Random(EDITION)
    characters = list(swept())
    comparison.look([f"a{c}b {c}\u0301{c}1{c}" for c in characters])
    left = "".join(sorted({text[1] for text in comparison.different}))
    if len(left) > MAX_LEFT:
        return Proof(comparison.num_texts, "", _differs(comparison.different[0], f"and {len(left) - 1} other characters"))
    comparison = _Comparison(backend, FastEncoder(fast.native, left), comparison.num_texts)
    pieces = [backend.decode([i], skip_special_tokens=False) for i in range(backend.get_vocab_size(with_added_tokens=True))]
    placed = list(placed_tokens(added))
    mixed = list(mixtures(rng, [piece for piece in pieces if piece], added, characters))
    comparison.look(pieces)
    for add_special_tokens in (False, True):
        comparison.look(placed, add_special_tokens)
        comparison.look(mixed if not add_special_tokens else mixed[: BATCH // 2], add_special_tokens)
    comparison.look([run for text in (*RUNS, *added[:8]) for run in runs(text)])
    for text in continued(rng, added):
        comparison.look([text])
    if comparison.fast.failure:
        return Proof(comparison.num_texts, left, comparison.fast.failure)
    if comparison.different:
        return Proof(comparison.num_texts, left, _differs(min(comparison.different, key=len), ""))
    if comparison.fast.num_refused > MAX_REFUSED * comparison.num_texts:
        return Proof(comparison.num_texts, left, f"{NAME} refuses {comparison.fast.num_refused} of the texts")
    return Proof(comparison.num_texts, left)


def _differs(text: str, more: str) -> str:
    return " ".join(filter(None, [f"{NAME} and {REFERENCE} make other ids of {text[:40]!r}", more]))


def swept() -> Iterator[str]:
    """The characters of Unicode that are looked at: all that are assigned, but every eighth of the many letters without
    case and parts, and some that are not assigned."""
    for number in range(0x110000):
        character = chr(number)
        match unicodedata.category(character):
            case "Cs":
                continue
            case "Cn" | "Co":  # Python's tables may be older than those of the encoders
                if number % (1 if number < 0x3000 else 8 if number < 0x20000 else 4096) == 0:
                    yield character
            case "Lo":
                if number < 0x3400 or number % 8 == 0 or unicodedata.decomposition(character):
                    yield character
            case _:
                yield character


def placed_tokens(added: Sequence[str]) -> Iterator[str]:
    """Each added token alone, at the beginning, in the middle, at the end, doubled, beside spaces and letters, and cut."""
    for token in added:
        yield from (
            token,
            f"{token}a",
            f"a{token}",
            f"a{token}b",
            token + token,
            f" {token} ",
            f"a {token} b",
            f"  {token}  ",
        )
        yield from (
            f"\n{token}\n",
            f"é{token}1",
            f"{token} {token}",
            f"{token}\u0301",
            token[:-1],
            token[1:],
            f"{token[:-1]} {token[-1]}",
        )
        yield from (token.upper(), token.lower(), f"x{token[:-1]}{token}", f"▁{token}▁", f"\t{token}\r\n")


def mixtures(rng: random.Random, pieces: Sequence[str], added: Sequence[str], characters: Sequence[str]) -> Iterator[str]:
    """Seeded texts of all kinds of pieces, most of them short."""
    for _ in range(NUM_MIXTURES):
        yield "".join(_piece(rng, pieces, added, characters) for _ in range(rng.choice((3, 8, 20, 60))))


def _piece(rng: random.Random, pieces: Sequence[str], added: Sequence[str], characters: Sequence[str]) -> str:
    match rng.randrange(8):
        case 0:
            return rng.choice(added) if added else ""
        case 1 | 2:
            return rng.choice(rng.choice(POOLS))
        case 3:
            return rng.choice(POOLS)
        case 4:
            return rng.choice(characters)
        case 5:
            return rng.choice(WORDS)
        case 6:
            return rng.choice(RUNS) * rng.choice(LENGTHS[:12])
        case _:
            return rng.choice(pieces)


def runs(text: str) -> Iterator[str]:
    for length in LENGTHS:
        yield text * length
        yield f"a {text * length}b"


def continued(rng: random.Random, added: Sequence[str]) -> Iterator[str]:
    """Texts each of which goes on otherwise than the one before it, behind thousands of characters that both have."""
    text = _filler(rng, 2 * CONTINUED)
    for number in range(NUM_SHARED):
        cut = rng.randrange(CONTINUED, len(text))
        end = rng.choice((*RUNS, *WORDS)) * rng.choice((1, 2, 3, 700))
        marked = rng.choice(added) if added and number % 3 == 0 else ""
        text = (marked + text[:cut] + end + _filler(rng, rng.choice((1, 50, 2000))))[: 4 * CONTINUED]
        yield text
    spaced = _filler(rng, CONTINUED) + " " * 700
    for before, after in (
        ("x", " "),
        ("x", "\n"),
        ("x", "\tx"),
        ("xyz", "xy"),
        ("x", ""),
        ("'", "'s"),
        ("1", "12"),
        ("\r", "\r\n"),
    ):
        yield from ("", spaced + before + _filler(rng, 1000), spaced + after)
        yield from ("", spaced[:CONTINUED] + before, spaced[:CONTINUED] + after)


def _filler(rng: random.Random, length: int) -> str:
    letters = "etaoinshrdlu"
    words: list[str] = []
    while length > 0:
        words.append("".join(rng.choices(letters, k=rng.randint(1, 9))))
        length -= len(words[-1]) + 1
    return " ".join(words)
