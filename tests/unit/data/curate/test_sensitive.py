"""Personal data and secrets: what is found, what only looks like it, and masks."""

from __future__ import annotations

import base64
import json
import random
import string
from itertools import pairwise
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forge_ray.config.curate import PersonalData, Secret
from forge_ray.data.curate.national_ids import verhoeff
from forge_ray.data.curate.sensitive import masked, personal_data, secrets

pytestmark = pytest.mark.unit

PERSONAL, SECRETS = frozenset(get_args(PersonalData)), frozenset(get_args(Secret))
SEEDED = random.Random(0)


def token(length: int, alphabet: str = string.ascii_letters + string.digits) -> str:
    return "".join(SEEDED.choices(alphabet, k=length))


def jwt() -> str:
    parts = [{"alg": "HS256", "typ": "JWT"}, {"sub": "1234567890"}]
    return ".".join([*(base64.urlsafe_b64encode(json.dumps(p).encode()).decode().rstrip("=") for p in parts), token(43)])


def test_verhoeff_check_digit() -> None:
    assert verhoeff("2363")  # 236 with its check digit
    assert not verhoeff("2364")
    assert not verhoeff("2633"), "two digits that changed places"


@pytest.mark.parametrize(
    ("kind", "text", "detected"),
    [
        ("email", "write to jane.doe+x@mail.acme-bank.co.uk, please", "jane.doe+x@mail.acme-bank.co.uk"),
        ("email", "<mailto:jörg@müller.de>", "jörg@müller.de"),
        ("iban", "IBAN: DE89 3704 0044 0532 0130 00 UND", "DE89 3704 0044 0532 0130 00"),
        ("iban", "GB29NWBK60161331926819.", "GB29NWBK60161331926819"),
        ("iban", "NO93 8601 1117 947", "NO93 8601 1117 947"),
        ("card", "Visa 4111 1111 1111 1111 exp 12/27", "4111 1111 1111 1111"),
        ("card", "5500-0000-0000-0004", "5500-0000-0000-0004"),
        ("card", "amex 378282246310005", "378282246310005"),
        ("national_id", "SSN 536-22-8726", "536-22-8726"),
        ("national_id", "NI number AB 12 34 56 C", "AB 12 34 56 C"),
        ("national_id", "NHS no. 943 476 5919", "943 476 5919"),
        ("national_id", "Steuer-ID: 86095742719", "86095742719"),
        ("national_id", "NIR 2 55 08 14 168 025 38", "2 55 08 14 168 025 38"),
        ("national_id", "DNI 12345678Z", "12345678Z"),
        ("national_id", "NIE X1234567L", "X1234567L"),
        ("national_id", "CF RSSMRA85T10A562S", "RSSMRA85T10A562S"),
        ("national_id", "BSN 111222333", "111222333"),
        ("national_id", "85.07.30-033.28", "85.07.30-033.28"),
        ("national_id", "PESEL 44051401359", "44051401359"),
        ("national_id", "811218-9876", "811218-9876"),
        ("national_id", "131052-308T", "131052-308T"),
        ("national_id", "CPF 111.444.777-35", "111.444.777-35"),
        ("ip", "from 203.0.113.7 to", "203.0.113.7"),
        ("ip", "host 2001:db8:85a3::8a2e:370:7334 down", "2001:db8:85a3::8a2e:370:7334"),
        ("phone", "+49 (0)30 123456-78", "+49 (0)30 123456-78"),
        ("phone", "Tel. 0171/1234567", "0171/1234567"),
        ("phone", "call (555) 234-5678 now", "(555) 234-5678"),
        ("phone", "020 7946 0958", "020 7946 0958"),
        ("phone", "01 23 45 67 89", "01 23 45 67 89"),
        ("phone", "0044 20 7946 0958", "0044 20 7946 0958"),
        ("phone", "phone: 5552345678", "5552345678"),
    ],
)
def test_personal_data_is_detected(kind: str, text: str, detected: str) -> None:
    assert [(span.kind, text[span.start : span.end]) for span in personal_data(text, PERSONAL)] == [(kind, detected)]
    assert personal_data(text, PERSONAL - {kind}) == [] or kind in ("iban", "card", "national_id", "ip")


@pytest.mark.parametrize(
    "text",
    [
        "DE88 3704 0044 0532 0130 00",  # wrong check digits
        "XX89 3704 0044 0532 0130 00",
        "4111 1111 1111 1112",
        "0000 0000 0000 0000",
        "order 20240131-000123 of 2024-01-31T12:30:45.123Z",
        "due on 01.02.2024, 01/02/2024 or 2024/02/01",
        "01-02-2024 12:30",
        "version 1.2.3.4 and v10.0.19041.1",
        "127.0.0.1 and 0.0.0.0 and 255.255.255.0 and ::1",
        "256.1.1.1 and 1.2.3 and 1.2.3.4.5",
        "std::vector a::b dead::beef 12:30:45",
        "$1,234,567.89 or 1 234 567,89",
        "commit 9f86d081884c7d659a2feaa0c55ad015a3bf4f1b",
        "550e8400-e29b-41d4-a716-446655440000",
        "ISBN 978-3-16-148410-0",
        "user@localhost and @decorator(x) and a@b",
        "https://user:pass@example.com/x",
        "000-12-3456 and 666-12-3456 and 123-00-4567",
        "86095742719",  # a tax number, but nothing says so
        "52.520008, 13.404954",
    ],
)
def test_lookalikes_of_personal_data_are_ignored(text: str) -> None:
    assert personal_data(text, PERSONAL) == []


SECRET_TEXTS = [
    ("private_key", "-----BEGIN RSA PRIVATE KEY-----\nMIIE\nabc\n-----END RSA PRIVATE KEY-----"),
    ("cloud_key", "AKIA" + token(16, string.ascii_uppercase + "234567")),
    ("cloud_key", "AIza" + token(35)),
    ("token", "ghp_" + token(35) + "1"),
    ("token", "glpat-" + token(19) + "1"),
    ("token", "sk-ant-api03-" + token(40) + "1"),
    ("token", "sk-proj-" + token(40) + "1"),
    ("token", "xoxb-123456789012-" + token(24)),
    ("token", "hf_" + token(33) + "1"),
    ("jwt", jwt()),
]


@pytest.mark.parametrize(("kind", "secret"), SECRET_TEXTS, ids=[f"{kind}-{n}" for n, (kind, _) in enumerate(SECRET_TEXTS)])
def test_secrets_of_known_formats_are_detected(kind: str, secret: str) -> None:
    text = f"see {secret} here"
    assert [(span.kind, text[span.start : span.end]) for span in secrets(text, SECRETS)] == [(kind, secret)]
    assert masked(text, secrets(text, SECRETS)) == f"see <{kind.upper()}> here"


@pytest.mark.parametrize(
    ("kind", "text", "detected"),
    [
        ("password", "postgres://app:s3cr3t!pw@db:5432/x", "s3cr3t!pw"),
        ("password", 'password = "Tr0ub4dor&3"', "Tr0ub4dor&3"),
        ("password", "PASSWD: hunter2x", "hunter2x"),
        ("high_entropy", 'api_key="' + "9f86d081884c7d659a2feaa0c55ad015" + '"', "9f86d081884c7d659a2feaa0c55ad015"),
        ("high_entropy", "client_secret: Zk3pQ9vT7mXw2LrB8nYc", "Zk3pQ9vT7mXw2LrB8nYc"),
    ],
)
def test_named_secrets_are_detected(kind: str, text: str, detected: str) -> None:
    assert [(span.kind, text[span.start : span.end]) for span in secrets(text, SECRETS)] == [(kind, detected)]


@pytest.mark.parametrize(
    "text",
    [
        "AKIAIOSFODNN7EXAMPLE",
        "password = ${DB_PASSWORD}",
        "password: ********",
        "password: <your password>",
        "password = os.environ['PW']",
        "the password is required: enter it twice",
        "api_key = your_api_key_goes_here_123",
        "public_key = 9f86d081884c7d659a2feaa0c55ad015",
        "commit 9f86d081884c7d659a2feaa0c55ad015a3bf4f1b",
        "key: 550e8400-e29b-41d4-a716-446655440000",
        "eyJub3QiOiJhIGp3dCJ9.eyJ4IjoxfQ.0123456789ab",
        "sk-learn-contrib-something-longer-than-that",
        "https://example.com/path:with@sign",
        "tokenizer=HuggingFaceTB/SmolLM2-135M-Instruct",
    ],
)
def test_lookalikes_of_secrets_are_ignored(text: str) -> None:
    assert secrets(text, SECRETS) == []


def test_overlapping_recognisers_give_one_span() -> None:
    text = "IBAN DE89370400440532013000, card 4111111111111111"
    assert [span.kind for span in personal_data(text, PERSONAL)] == ["iban", "card"]


ALPHABET = st.text(st.sampled_from("ab1 29+-.@:/()=\"'DEgk_\n"), max_size=80)


@given(st.lists(st.one_of(ALPHABET, st.sampled_from(["a.b@c.de", "+49 30 1234567", "password=x1y2z3", "203.0.113.9"]))))
def test_masking_changes_only_the_spans(parts: list[str]) -> None:
    text = " ".join(parts)
    for find, kinds in ((personal_data, PERSONAL), (secrets, SECRETS)):
        spans = find(text, kinds)
        assert all(a.end <= b.start for a, b in pairwise(spans))
        rest, last = masked(text, spans), 0
        for span in spans:
            outside = text[last : span.start]
            assert rest.startswith(outside + f"<{span.kind.upper()}>")
            rest = rest[len(outside) + len(span.kind) + 2 :]
            last = span.end
        assert rest == text[last:]


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "unit",
    [
        "1",
        "1 ",
        "a@",
        "a.",
        "a@a.",
        "0 1/",
        "+1 ",
        "::",
        "1.",
        "DE89 ",
        "A1",
        "key=",
        "key",
        "eyJ.",
        "://a:",
        "-----BEGIN ",
        "(1)",
    ],
)
def test_detection_time_is_bounded(unit: str) -> None:
    text = unit * (200_000 // len(unit))
    personal_data(text, PERSONAL)
    secrets(text, SECRETS)
