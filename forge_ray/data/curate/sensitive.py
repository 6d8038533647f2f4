"""Personal data and secrets in text, by pattern and checksum.

Found are things that have a form: an address of e-mail, a number with check digits, a key with a known beginning. Names,
streets and whatever a person puts into other words have none. No pattern backtracks far: the cost grows with the text alone.
"""

from __future__ import annotations

import base64
import binascii
import ipaddress
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from forge_ray.data.curate.national_ids import luhn, national_ids

Found = Iterator[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class SensitiveSpan:
    """Characters start..end-1 of a text are of `kind`."""

    start: int
    end: int
    kind: str


def personal_data(text: str, kinds: frozenset[str]) -> list[SensitiveSpan]:
    """Non-overlapping spans in order. Where two overlap, the one with the stronger check stays: an IBAN is no phone."""
    has_at, has_numbers = "@" in text, _NUMBERS.search(text) is not None
    if not has_at and not has_numbers and "::" not in text:
        return []
    return _spans(text, kinds, (entry for entry in PERSONAL if entry[0] != "email" or has_at))


def secrets(text: str, kinds: frozenset[str]) -> list[SensitiveSpan]:
    """Non-overlapping spans in order."""
    lower = text.lower()
    if not any(word in lower for word in _TRIGGERS):
        return []
    return _spans(text, kinds, iter(SECRETS))


def masked(text: str, spans: list[SensitiveSpan]) -> str:
    """`text` with <EMAIL>, <IBAN>, … in place of each span."""
    parts, last = [], 0
    for span in spans:
        parts += [text[last : span.start], f"<{span.kind.upper()}>"]
        last = span.end
    return "".join([*parts, text[last:]])


def _spans(text: str, kinds: frozenset[str], finders: Iterator[tuple[str, Callable[[str], Found]]]) -> list[SensitiveSpan]:
    spans: list[SensitiveSpan] = []
    for kind, find in finders:
        if kind in kinds:
            for start, end in find(text):
                if all(end <= span.start or start >= span.end for span in spans):
                    spans.append(SensitiveSpan(start, end, kind))
    return sorted(spans, key=lambda span: span.start)


# ---------------------------------------------------------------- personal data

_NUMBERS = re.compile(r"\d(?:[^\d\n]{0,3}\d){3}")  # four digits near each other: the least that any number below has
_LOCAL_PART = r"\w(?:[\w.!#$%&'*+^~-]{0,62}[\w+-])?"  # of RFC 5321, less what separates fields of a log: = / { | `
_EMAIL = re.compile(rf"(?<![\w.+-]){_LOCAL_PART}@(?:[^\W_](?:[\w-]{{0,61}}[^\W_])?\.){{1,8}}[^\W\d_]{{2,24}}(?![\w-])")
_IBAN = re.compile(r"(?<![A-Za-z0-9])[A-Z]{2}\d{2}(?:[ -]?[A-Z0-9]){11,30}")
_CARD = re.compile(r"(?<![\w.,+-])\d(?:[ -]?\d){12,18}(?![\w-])")
_IPV4 = re.compile(r"(?<![\w.-])(?:\d{1,3}\.){3}\d{1,3}(?![\w-]|\.\d)")
_IPV6 = re.compile(r"(?<![\w:.])(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{0,4}(?![\w:])")
_VERSION = re.compile(r"(?i)(?:\bv|version|release|ver\.?|rev\.?)[\s:=]*$")
_SEPARATED = r"[ ./-]?(?:\(\d{1,4}\)[ ./-]?)?\d"
_INTERNATIONAL = re.compile(rf"(?<![\w+])(?<!\d )(?:\+|00(?=[1-9]))[1-9](?:{_SEPARATED}){{7,14}}(?!\w)")
_NATIONAL = re.compile(
    r"(?<![\w.,/+-])(?<!\d )\(?0[1-9]\d{0,4}\)?(?: ?[/-] ?| )\d{2,8}(?:[ -]\d{2,4}){0,4}(?![\w-]|[.,:]\d)"
)
_AMERICAN = re.compile(r"(?<![\w.,/+-])(?:1[-. ])?(?:\([2-9]\d{2}\) ?|[2-9]\d{2}[-. ])[2-9]\d{2}[-. ]\d{4}(?![\w-]|[.,]\d)")
_CALLED = re.compile(
    r"(?i)\b(?:tel|phone|mobile|mobil|handy|telefon|téléphone|teléfono|fax|cell|call|whatsapp)"
    r"(?:\s?(?:no|nr|number|nummer))?[.:]{0,2}\s{0,2}(\d(?:[ /-]?\d){6,13})(?!\w)"
)
_DATE = re.compile(r"\d{1,2}[ ./-]\d{1,2}[ ./-](?:19|20)\d\d|(?:19|20)\d\d[ ./-]\d\d[ ./-]\d\d")

# ISO 13616, the registry of SWIFT: characters of an IBAN by country
_BY_LENGTH = {
    **{15: "NO", 16: "BE", 18: "DK FI FO GL NL SD", 19: "MK SI", 20: "AT BA EE KZ LT LU XK", 21: "CH CR HR LI LV"},
    **{22: "BG BH DE GB GE IE ME RS VA", 23: "AE GI IL IQ OM SO TL", 24: "AD CZ ES MD PK RO SA SE SK TN VG"},
    **{25: "LY PT ST", 26: "IS TR", 27: "BI DJ FR GR IT MC MR SM", 28: "AL AZ BY CY DO GT HU LB NI PL SV"},
    **{29: "BR EG PS QA UA", 30: "JO KW MU", 31: "MT SC", 32: "LC", 33: "RU"},
}
IBAN_LENGTHS = {country: length for length, countries in _BY_LENGTH.items() for country in countries.split()}


def _emails(text: str) -> Found:
    for match in _EMAIL.finditer(text):
        if not re.search(r"://[^\s/@]*$", text[max(0, match.start() - 80) : match.start()]):  # user and password of a URL
            yield match.span()


def _ibans(text: str) -> Found:
    for match in _IBAN.finditer(text):
        length = IBAN_LENGTHS.get(match[0][:2], 0)
        places = [place for place, char in enumerate(match[0]) if char.isalnum()][:length]
        if len(places) < length or not length:
            continue
        end = match.start() + places[-1] + 1
        value = "".join(match[0][place] for place in places)
        if not text[end : end + 1].isalnum() and int("".join(str(int(c, 36)) for c in value[4:] + value[:4])) % 97 == 1:
            yield match.start(), end


def _cards(text: str) -> Found:
    for match in _CARD.finditer(text):
        digits = re.sub(r"\D", "", match[0])
        if _ISSUER.match(digits) and luhn(digits) and len(set(digits)) > 1 and len(set(match[0]) & {" ", "-"}) < 2:
            yield match.span()


# ISO/IEC 7812: Visa, Mastercard, American Express, Diners, Discover, JCB, UnionPay, Maestro
_ISSUER = re.compile(
    r"(?:4\d{12}(?:\d{3}){0,2}|5[1-5]\d{14}|2(?:22[1-9]|2[3-9]\d|[3-6]\d\d|7[01]\d|720)\d{12}|3[47]\d{13}|3(?:0[0-5]|[689]\d)\d{11}"
    r"|6(?:011|5\d\d|4[4-9]\d)\d{12}|35(?:2[89]|[3-8]\d)\d{12}|62\d{14,17}|(?:5[06-9]|6[37])\d{10,17})$"
)


def _addresses(text: str) -> Found:
    """Not loopback, unspecified, multicast and net masks; private ones are reported, for they name a machine in a house."""
    for pattern in (_IPV4, _IPV6):
        for match in pattern.finditer(text):
            try:
                address = ipaddress.ip_address(match[0])
            except ValueError:
                continue
            if address.is_loopback or address.is_unspecified or address.is_multicast or match[0].startswith(("255.", "0.")):
                continue
            if _VERSION.search(text[max(0, match.start() - 12) : match.start()]):
                continue
            if address.version == 6 and (sum(map(bool, match[0].split(":"))) < 3 or not re.search(r"\d", match[0])):
                continue  # `a::b` of a program
            yield match.span()


def _phones(text: str) -> Found:
    for pattern in (_INTERNATIONAL, _AMERICAN, _NATIONAL):
        for match in pattern.finditer(text):
            count = sum(char.isdigit() for char in match[0])
            if 9 <= count <= 15 and not _DATE.match(match[0].lstrip("(")):
                yield match.span()
    for match in _CALLED.finditer(text):
        if not _DATE.match(match[1]):
            yield match.span(1)


PERSONAL: tuple[tuple[str, Callable[[str], Found]], ...] = (
    ("iban", _ibans),
    ("card", _cards),
    ("email", _emails),
    ("national_id", national_ids),
    ("ip", _addresses),
    ("phone", _phones),
)

# ---------------------------------------------------------------- secrets

_PRIVATE_KEY = re.compile(
    r"-----BEGIN [A-Z0-9 ]{0,30}PRIVATE KEY(?: BLOCK)?-----[^-]{0,20000}(?:-----END [A-Z0-9 ]{0,40}-----)?"
)
_CLOUD = [
    re.compile(r"(?<![A-Za-z0-9])(?:AKIA|ASIA)[A-Z2-7]{16}(?![A-Za-z0-9])"),
    re.compile(
        r"(?i)aws[\w .-]{0,20}(?:secret|key)[\w .-]{0,20}[\"']?\s{0,3}[:=]\s{0,3}[\"']?([A-Za-z0-9/+]{40})(?![A-Za-z0-9/+=])"
    ),
    re.compile(r"(?<![\w-])AIza[\w-]{35}(?![\w-])"),
    re.compile(r"(?:Account|SharedAccess)Key=([A-Za-z0-9+/]{42,86}={1,2})"),
    re.compile(r"(?<![\w-])GOCSPX-[\w-]{28}(?![\w-])"),
]
_TOKENS = re.compile(
    r"(?<![A-Za-z0-9])(?:gh[pousr]_[A-Za-z0-9]{36,255}|github_pat_\w{60,255}|glpat-[\w-]{20,64}|xox[abeprs]-[\w-]{10,250}"
    r"|hf_[A-Za-z0-9]{30,64}|sk-ant-[\w-]{20,200}|sk-(?:proj-|svcacct-)?[\w-]{20,200}|[rs]k_(?:live|test)_[A-Za-z0-9]{16,128}"
    r"|npm_[A-Za-z0-9]{36}|pypi-AgE[\w-]{50,250}|SG\.[\w-]{16,32}\.[\w-]{16,64}|dop_v1_[a-f0-9]{64}|hv[sb]\.[\w-]{20,200}"
    r"|SK[a-f0-9]{32}|shp(?:at|ca|pa|ss)_[a-fA-F0-9]{32}|\d{8,10}:AA[\w-]{33}|nvapi-[\w-]{60,80})(?![A-Za-z0-9])"
)
_JWT = re.compile(r"(?<![\w.-])eyJ[\w-]{8,4000}\.eyJ[\w-]{2,8000}\.[\w-]{10,2000}(?![\w-])")
_URL_PASSWORD = re.compile(r"[a-z][a-z0-9+]{1,20}://[^\s/:@\"']{0,64}:([^\s/@\"']{3,128})@")
_VALUE = r"[\"']?\s{0,3}(?::=|=>|[:=])\s{0,3}(?:\"([^\"\n]{4,200})\"|'([^'\n]{4,200})'|([^\s\"',;<>(){}\[\]]{4,200}))"
_PASSWORD = re.compile(r"(?i)(?:password|passwd|passwort|passphrase|pwd|mot de passe|contraseña)" + _VALUE)
_NAMED = re.compile(r"(?i)(?:key|secret|token|credential|auth)[\w-]{0,20}" + _VALUE)
_NAME = re.compile(r"[\w.-]{0,40}$")
_NOT_SECRET = re.compile(
    r"(?i)public|primary|foreign|sort|partition|keyboard|keyword|tokeniz|max_?tok|num_?tok|key_?id|author|cache_?key|idempot"
)
_PLACEHOLDER = re.compile(
    r"(?i)^[\W_x0]*$|^(?:your|my|the|some|example|changeme|change_me|placeholder|dummy|redacted|none|null|true|false|todo|insert|enter)"
    r"|^\$|\$\{|^%|\{\{|^<|example$|^\*|\.\.\.$|^os\.|^process\.|getenv|environ|^self\.|^settings\.|^config\."
)
_UUID = re.compile(r"(?i)^[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}$")
_TRIGGERS = (
    *("begin ", "akia", "asia", "aiza", "accountkey", "sharedaccesskey", "gocspx", "ghp_", "gho_", "ghu_", "ghs_", "ghr_"),
    *(
        "github_pat",
        "glpat",
        "xox",
        "hf_",
        "sk-",
        "sk_",
        "rk_",
        "npm_",
        "pypi-",
        "sg.",
        "dop_v1",
        "hvs.",
        "hvb.",
        "shp",
        ":aa",
    ),
    *(
        "nvapi",
        "eyj",
        "://",
        "passw",
        "passp",
        "pwd",
        "mot de passe",
        "contraseña",
        "key",
        "secret",
        "token",
        "credential",
        "auth",
    ),
)
QUOTED = 3  # the groups of _VALUE before this one stand in quotes
MIN_ENTROPY = 3.2  # bits per character; 16 random hexadecimal digits have about 3.3, English words 2.5 to 3.2


def _private_keys(text: str) -> Found:
    return (match.span() for match in _PRIVATE_KEY.finditer(text))


def _cloud_keys(text: str) -> Found:
    for pattern in _CLOUD:
        for match in pattern.finditer(text):
            if not match[match.lastindex or 0].upper().endswith("EXAMPLE") and "EXAMPLEKEY" not in match[0]:
                yield match.span(match.lastindex or 0)


def _tokens(text: str) -> Found:
    for match in _TOKENS.finditer(text):
        body = match[0].rpartition("_" if "_" in match[0][:12] else "-")[2] or match[0]
        if len(set(body)) > 5 and re.search(r"\d|[a-z][A-Z]", body):  # `sk-learn-contrib-something` is no key
            yield match.span()


def _jwts(text: str) -> Found:
    for match in _JWT.finditer(text):
        head = match[0].partition(".")[0]
        try:
            header = json.loads(base64.urlsafe_b64decode(head + "=" * (-len(head) % 4)))
        except (ValueError, binascii.Error):
            continue
        if isinstance(header, dict) and "alg" in header:
            yield match.span()


def _passwords(text: str) -> Found:
    for match in _URL_PASSWORD.finditer(text):
        if not _PLACEHOLDER.search(match[1]):
            yield match.span(1)
    for match in _PASSWORD.finditer(text):
        value, start, end, quoted = _value(match)
        assigned = text[match.start() : start].endswith("=")  # PASSWORD=sunshine; but not `password: required`
        telling = assigned or quoted or re.search(r"\d|[^\w\s.:'-]", value)
        if len(value) >= 6 and " " not in value and telling and not _PLACEHOLDER.search(value):
            yield start, end


def _high_entropy(text: str) -> Found:
    for match in _NAMED.finditer(text):
        value, start, end, _ = _value(match)
        before = _NAME.search(text, max(0, match.start() - 40), match.start())
        name = (before[0] if before else "") + text[match.start() : start]
        if len(value) < 16 or _NOT_SECRET.search(name) or _PLACEHOLDER.search(value) or _UUID.match(value):
            continue
        is_key = re.fullmatch(r"[A-Za-z0-9+/=_.~-]+", value) and re.search(r"\d", value) and re.search(r"[A-Za-z]", value)
        if is_key and entropy(value) >= MIN_ENTROPY and not re.search(r"[a-z]{11}", value):
            yield start, end


def _value(match: re.Match[str]) -> tuple[str, int, int, bool]:
    """The value of an assignment, its place, and whether it stands in quotes; without the full stop of a sentence."""
    group = match.lastindex or 0
    value = match[group] if group < QUOTED else match[group].rstrip(".!?")
    return value, match.start(group), match.start(group) + len(value), group < QUOTED


def entropy(value: str) -> float:
    """Shannon's, in bits per character."""
    return -sum(n / len(value) * math.log2(n / len(value)) for n in Counter(value).values())


SECRETS: tuple[tuple[str, Callable[[str], Found]], ...] = (
    ("private_key", _private_keys),
    ("jwt", _jwts),
    ("cloud_key", _cloud_keys),
    ("token", _tokens),
    ("password", _passwords),
    ("high_entropy", _high_entropy),
)
