"""National identity numbers with their check digits.

Each entry is a pattern and a test of the characters that count. Numbers that are bare digits, without a form of their own,
are taken only where a word shortly before them says what they are: of random numbers one in eleven has a good check digit.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date

CONTEXT = 40  # characters before a number in which the word must stand


@dataclass(frozen=True)
class NationalId:
    """`near` is '' where the form alone is telling."""

    country: str
    pattern: re.Pattern[str]
    is_valid: Callable[[str], bool]
    near: str = ""


def national_ids(text: str) -> Iterator[tuple[int, int]]:
    """Start and end of every number that passes its test."""
    for entry in IDS:
        for match in entry.pattern.finditer(text):
            if entry.near and not re.search(entry.near, text[max(0, match.start() - CONTEXT) : match.start()].lower()):
                continue
            if entry.is_valid(re.sub(r"[ ./-]", "", match[0])):
                yield match.span()


def _weighted(digits: str, weights: tuple[int, ...]) -> int:
    return sum(int(digit) * weight for digit, weight in zip(digits, weights, strict=False))


def luhn(digits: str) -> bool:
    """ISO/IEC 7812-1, annex B."""
    total = 0
    for place, digit in enumerate(reversed(digits)):
        value = int(digit) * (1 + place % 2)
        total += value - 9 * (value > 9)
    return total % 10 == 0


def _is_date(year: int, month: int, day: int) -> bool:
    try:
        return bool(date(year, month, day))
    except ValueError:
        return False


def _nhs(digits: str) -> bool:
    check = 11 - _weighted(digits, tuple(range(10, 1, -1))) % 11
    return check % 11 == int(digits[9]) and check != 10


def _steuer_id(digits: str) -> bool:
    """ISO 7064, MOD 11,10; one digit comes twice or three times among the first ten."""
    if digits[0] == "0" or not 2 <= max(digits[:10].count(digit) for digit in digits[:10]) <= 3:
        return False
    product = 10
    for digit in digits[:10]:
        total = (int(digit) + product) % 10 or 10
        product = total * 2 % 11
    return (11 - product) % 10 == int(digits[10])


def _nir(value: str) -> bool:
    number = value[:13].replace("2A", "19").replace("2B", "18")
    return 97 - int(number) % 97 == int(value[13:])


def _dni(value: str) -> bool:
    value = value.translate(str.maketrans("XYZ", "012"))
    return "TRWAGMYFPDXBNJZSQVHLCKE"[int(value[:-1]) % 23] == value[-1].translate(str.maketrans("012", "XYZ"))


_ODD_VALUES = (1, 0, 5, 7, 9, 13, 15, 17, 19, 21, 2, 4, 18, 20, 11, 3, 6, 8, 12, 14, 16, 10, 22, 25, 24, 23)
_ODD = dict(zip("0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ", (*_ODD_VALUES[:10], *_ODD_VALUES), strict=True))


def _codice_fiscale(value: str) -> bool:
    total = sum(
        _ODD[char] if place % 2 == 0 else int(char, 36) - 10 * char.isalpha() for place, char in enumerate(value[:15])
    )
    return chr(ord("A") + total % 26) == value[15]


def _bsn(digits: str) -> bool:
    return _weighted(digits, (9, 8, 7, 6, 5, 4, 3, 2, -1)) % 11 == 0 and int(digits) > 0


def _rijksregister(digits: str) -> bool:
    return int(digits[9:]) in (97 - int(digits[:9]) % 97, 97 - int("2" + digits[:9]) % 97)


def _pesel(digits: str) -> bool:
    month = int(digits[2:4]) % 20
    return -_weighted(digits, (1, 3, 7, 9, 1, 3, 7, 9, 1, 3)) % 10 == int(digits[10]) and 1 <= month <= 12


def _personnummer(value: str) -> bool:
    digits = re.sub(r"\D", "", value)[-10:]
    day = int(digits[4:6]) % 60  # a co-ordination number adds 60
    return luhn(digits) and _is_date(2000 + int(digits[:2]) % 100, int(digits[2:4]), day)


def _hetu(value: str) -> bool:
    number = int(value[:6] + value[-4:-1])
    day, month = int(value[:2]), int(value[2:4])
    return "0123456789ABCDEFHJKLMNPRSTUVWXY"[number % 31] == value[-1] and _is_date(2000, month, day)


def _cpf(digits: str) -> bool:
    if len(set(digits)) == 1:
        return False
    for length in (9, 10):
        check = _weighted(digits[:length], tuple(range(length + 1, 1, -1))) * 10 % 11 % 10
        if check != int(digits[length]):
            return False
    return True


_DIHEDRAL = [[(i + j) % 5 if i < 5 else 5 + (i - j) % 5 for j in range(5)] for i in range(10)]
for _row, _values in enumerate(_DIHEDRAL):
    _values += [5 + (_row + j) % 5 if _row < 5 else (_row - j) % 5 for j in range(5)]
_PERMUTED = [list(range(10)), [1, 5, 7, 6, 2, 8, 3, 0, 9, 4]]
for _ in range(6):
    _PERMUTED.append([_PERMUTED[-1][_PERMUTED[1][i]] for i in range(10)])


def verhoeff(digits: str) -> bool:
    """Verhoeff, "Error detecting decimal codes" (1969)."""
    check = 0
    for place, digit in enumerate(reversed(digits)):
        check = _DIHEDRAL[check][_PERMUTED[place % 8][int(digit)]]
    return check == 0


def _always(value: str) -> bool:
    return True


IDS = tuple(
    NationalId(country, re.compile(rf"(?<![\w.,-])(?:{pattern})(?![\w-]|[.,]\d)"), is_valid, near)
    for country, pattern, is_valid, near in [
        ("US", r"(?!000|666|9)\d{3}-(?!00)\d{2}-(?!0000)\d{4}", _always, ""),
        ("GB NINO", r"(?!BG|GB|NK|KN|TN|NT|ZZ)[A-CEGHJ-PR-TW-Z][A-CEGHJ-NPR-TW-Z] ?\d\d ?\d\d ?\d\d ?[A-D]", _always, ""),
        ("GB NHS", r"\d{3}[ -]?\d{3}[ -]?\d{4}", _nhs, r"\bnhs\b"),
        ("DE", r"\d{2} ?\d{3} ?\d{3} ?\d{3}", _steuer_id, r"steuer|\bidnr|\btin\b|\btax\b"),
        ("FR", r"[12] ?\d\d ?(?:0[1-9]|1[0-2]|[2-9]\d) ?(?:\d\d|2[AB]) ?\d{3} ?\d{3} ?\d\d", _nir, ""),
        ("ES", r"(?:\d{8}|[XYZ]-?\d{7})-?[A-HJ-NP-TV-Z]", _dni, ""),
        ("IT", r"[A-Z]{6}\d\d[A-EHLMPRST]\d\d[A-Z]\d{3}[A-Z]", _codice_fiscale, ""),
        ("NL", r"\d{4}[. ]?\d{2}[. ]?\d{3}", _bsn, r"\bbsn\b|burgerservice|sofi"),
        ("BE", r"\d\d\.\d\d\.\d\d-\d{3}\.\d\d", _rijksregister, ""),
        ("PL", r"\d{11}", _pesel, r"\bpesel\b"),
        ("SE", r"(?:19|20)?\d{6}[-+]\d{4}", _personnummer, ""),
        ("FI", r"\d{6}[-+A-FU-Y]\d{3}[0-9A-FHJ-NPR-Y]", _hetu, ""),
        ("BR", r"\d{3}\.\d{3}\.\d{3}-\d\d", _cpf, ""),
        ("BR", r"\d{11}", _cpf, r"\bcpf\b"),
        ("IN", r"[2-9]\d{3} \d{4} \d{4}", verhoeff, ""),
        ("IN", r"[2-9]\d{11}", verhoeff, r"aadhaar|\buid\b"),
    ]
)
