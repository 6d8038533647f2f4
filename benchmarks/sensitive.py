"""How well the rules `personal_data` and `secrets` find what they look for: precision and recall on a seeded set.

    python benchmarks/sensitive.py [--seed 0] [--records 20000] [--json]

Positives are made from the definitions of the formats, with check digits computed here, in several ways of writing each,
some of which the rules are known to miss (an address spelt out, a number without its word). Negatives look alike: order
numbers, dates, digests, prices, numbers whose check digit is wrong. Each stands in a line of a ticket, a log or a letter.
A span counts as found when one of the same kind covers half of it, or the eight characters that tell (six of a password).
"""

from __future__ import annotations

import argparse
import base64
import json
import string
import time
import uuid
from collections import Counter
from collections.abc import Callable
from random import Random
from typing import Any, get_args

from forge_ray.config.curate import PersonalData, Secret
from forge_ray.data.curate.sensitive import personal_data, secrets

Sample = tuple[str, str]  # kind ('' for a negative) and text
FRAMES = [
    "Customer wrote: {}. Please call back today.",
    "Sehr geehrte Damen und Herren, bitte ändern Sie {} in unseren Unterlagen.",
    "Bonjour, merci de corriger {} dans mon dossier.",
    "Buenos días, el dato correcto es {}, gracias.",
    "2024-03-01T10:00:00Z INFO handler=ticket value={} status=200",
    "  - field: {}\n    source: import\n",
    "{}",
    'print("{}")  # seen in production',
    "| 17 | {} | open | high |",
]


def digits(random: Random, count: int) -> str:
    return "".join(random.choices(string.digits, k=count))


def luhn_digit(body: str) -> str:
    total = sum(sum(divmod(int(digit) * (2 if place % 2 == 0 else 1), 10)) for place, digit in enumerate(reversed(body)))
    return str(-total % 10)


def grouped(text: str, sizes: list[int], separator: str) -> str:
    parts, start = [], 0
    for size in sizes:
        parts.append(text[start : start + size])
        start += size
    return separator.join(parts)


def email(random: Random) -> Sample:
    user = random.choice(["jane.doe", "j_smith99", "müller", "info+invoices", "o'brien", "x"]) + random.choice(
        ["", "2", "-de"]
    )
    host = random.choice(["example.com", "mail.acme-bank.co.uk", "firma.de", "uni-köln.de", "a1.io"])
    text = random.choices([f"{user}@{host}", f"{user} at {host.replace('.', ' dot ')}", f"{user}(at){host}"], [90, 5, 5])[0]
    return "email", text


def phone(random: Random) -> Sample:
    tail = digits(random, 7)
    forms = [
        f"+49 {random.choice(['30', '89', '171'])} {tail}",
        f"+1-{random.randint(201, 989)}-{random.randint(200, 999)}-{tail[:4]}",
        f"+33 {random.randint(1, 7)} " + grouped(digits(random, 8), [2, 2, 2, 2], " "),
        f"({random.randint(201, 989)}) {random.randint(200, 999)}-{tail[:4]}",
        f"0{random.choice(['30', '89', '171', '221'])}/{tail}",
        f"0{random.choice(['30', '40'])} {tail[:3]} {tail[3:]}",
        f"020 7{tail[:3]} {digits(random, 4)}",
        f"0{random.randint(1, 6)} " + grouped(digits(random, 8), [2, 2, 2, 2], " "),
        f"Tel.: {digits(random, 9)}",
        f"00{random.choice(['44', '49', '34'])} {digits(random, 10)}",
        f"0{random.randint(150, 179)}{tail}",  # run together, with no word before it
    ]
    return "phone", random.choice(forms)


def iban(random: Random) -> Sample:
    country, body = random.choice(
        [
            ("DE", digits(random, 18)),
            ("FR", digits(random, 20) + "".join(random.choices(string.ascii_uppercase, k=1)) + digits(random, 2)),
            ("GB", "".join(random.choices(string.ascii_uppercase, k=4)) + digits(random, 14)),
            ("ES", digits(random, 20)),
            ("NL", "".join(random.choices(string.ascii_uppercase, k=4)) + digits(random, 10)),
            ("NO", digits(random, 11)),
        ]
    )
    number = int("".join(str(string.digits.find(c) if c.isdigit() else ord(c) - 55) for c in f"{body}{country}00"))
    text = f"{country}{98 - number % 97:02d}{body}"
    spaced = " ".join(text[i : i + 4] for i in range(0, len(text), 4))
    return "iban", random.choices([text, spaced, spaced.replace(" ", "-"), text.lower()], [45, 45, 5, 5])[0]


def card(random: Random) -> Sample:
    prefix, length = random.choice([("4", 16), ("51", 16), ("2221", 16), ("37", 15), ("6011", 16), ("3566", 16)])
    body = prefix + digits(random, length - len(prefix) - 1)
    text = body + luhn_digit(body)
    sizes = [4, 6, 5] if length == 15 else [4, 4, 4, 4]
    return "card", random.choices(
        [text, grouped(text, sizes, " "), grouped(text, sizes, "-"), grouped(text, sizes, ".")], [4, 4, 2, 1]
    )[0]


def national_id(random: Random) -> Sample:
    def weighted(body: str, weights: list[int]) -> int:
        return sum(int(a) * b for a, b in zip(body, weights, strict=True))

    def bsn() -> str:
        while True:
            body = digits(random, 8)
            check = weighted(body, [9, 8, 7, 6, 5, 4, 3, 2]) % 11
            if check < 10:
                return f"BSN {body}{check}"

    def cpf() -> str:
        body = digits(random, 9)
        for length in (10, 11):
            body += str(weighted(body, list(range(length, 1, -1))) * 10 % 11 % 10)
        return f"{body[:3]}.{body[3:6]}.{body[6:9]}-{body[9:]}"

    def nir() -> str:
        born = f"{random.randint(1, 2)}{random.randint(50, 99)}{random.randint(1, 12):02d}"
        body = f"{born}{random.randint(1, 95):02d}{digits(random, 6)}"
        text = f"{body}{97 - int(body) % 97:02d}"
        return random.choice([text, grouped(text, [1, 2, 2, 2, 3, 3, 2], " ")])

    def pesel() -> str:
        body = f"{random.randint(50, 99)}{random.randint(1, 12):02d}{random.randint(1, 28):02d}{digits(random, 4)}"
        return f"PESEL: {body}{-weighted(body, [1, 3, 7, 9] * 2 + [1, 3]) % 10}"

    def personnummer() -> str:
        body = f"{random.randint(50, 99)}{random.randint(1, 12):02d}{random.randint(1, 28):02d}{digits(random, 3)}"
        return f"{body[:6]}-{body[6:]}{luhn_digit(body)}"

    number, pairs = random.randint(10_000_000, 99_999_999), [digits(random, 2) for _ in range(3)]
    forms = [
        f"{random.randint(1, 665):03d}-{random.randint(1, 99):02d}-{random.randint(1, 9999):04d}",  # US
        f"{random.choice('ABCEH')}{random.choice('ABCEH')} {' '.join(pairs)} A",  # GB
        f"{number}{'TRWAGMYFPDXBNJZSQVHLCKE'[number % 23]}",  # ES
        bsn(),
        bsn().removeprefix("BSN "),  # without its word
        cpf(),
        nir(),
        pesel(),
        personnummer(),
    ]
    return "national_id", random.choice(forms)


def ip(random: Random) -> Sample:
    v4 = ".".join(str(random.randint(1, 223)) for _ in range(4)).removeprefix("127.")
    v6 = "2001:db8:" + ":".join(f"{random.randint(1, 65535):x}" for _ in range(6))
    return "ip", random.choices([v4 if v4.count(".") == 3 else "8.8.8.8", v6, f"{v4.replace('.', '[.]')}"], [6, 3, 1])[0]


def lookalike(random: Random) -> Sample:
    forms = [
        f"order {digits(random, 8)}-{digits(random, 4)}",
        f"invoice {random.randint(2015, 2026)}-{digits(random, 6)}",
        f"{random.randint(1, 28):02d}.{random.randint(1, 12):02d}.{random.randint(1950, 2030)}",
        f"{random.randint(1950, 2030)}-{random.randint(1, 12):02d}-{random.randint(1, 28):02d} 12:{digits(random, 2)}:07",
        f"{random.getrandbits(160):040x}",
        f"sha256:{random.getrandbits(256):064x}",
        str(uuid.UUID(int=random.getrandbits(128), version=4)),
        f"version {random.randint(0, 9)}.{random.randint(0, 30)}.{random.randint(0, 30)}.{random.randint(0, 9999)}",
        f"${random.randint(1, 999)},{digits(random, 3)}.{digits(random, 2)}",
        f"{random.random() * 90:.6f}, {random.random() * 180:.6f}",
        f"978-3-{digits(random, 2)}-{digits(random, 6)}-{digits(random, 1)}",
        f"part no. {''.join(random.choices(string.ascii_uppercase, k=3))}-{digits(random, 7)}",
        f"DE{digits(random, 20)}",
        f"4{digits(random, 15)}",
        f"{digits(random, 9)} bytes in {digits(random, 4)} ms",
        f"room {digits(random, 3)}, floor {digits(random, 1)}, ext {digits(random, 4)}",
        f"127.0.0.1:{digits(random, 4)} and 255.255.255.0",
        f"@app.route({digits(random, 3)}) user@localhost",
        f"{digits(random, 10)}",
        f"p. {digits(random, 3)}-{digits(random, 3)}, vol. {digits(random, 2)}",
    ]
    return "", random.choice(forms)


def secret(random: Random) -> Sample:
    word = string.ascii_letters + string.digits

    def some(count: int, alphabet: str = word) -> str:
        return "".join(random.choices(alphabet, k=count))

    header = base64.urlsafe_b64encode(b'{"alg":"RS256","typ":"JWT"}').decode().rstrip("=")
    claims = base64.urlsafe_b64encode(json.dumps({"sub": some(8)}).encode()).decode().rstrip("=")
    forms = [
        ("cloud_key", "AKIA" + some(16, string.ascii_uppercase + "234567")),
        ("cloud_key", "AIza" + some(35)),
        ("cloud_key", f"AccountKey={base64.b64encode(random.randbytes(64)).decode()}"),
        ("token", "ghp_" + some(36)),
        ("token", "glpat-" + some(20)),
        ("token", f"xoxb-{digits(random, 12)}-{some(24)}"),
        ("token", "hf_" + some(34)),
        ("token", "sk-proj-" + some(48)),
        ("token", "sk_live_" + some(24)),
        ("token", "npm_" + some(36)),
        ("jwt", f"{header}.{claims}.{some(86)}"),
        ("private_key", f"-----BEGIN PRIVATE KEY-----\n{some(64)}\n{some(40)}\n-----END PRIVATE KEY-----"),
        ("password", f"postgres://app:{some(12)}@db.internal:5432/prod"),
        ("password", f'password = "{some(6)}!{digits(random, 3)}"'),
        ("password", f"the password is {some(10)}"),  # in prose
        ("password", f"PASSWORD={random.choice(['sunshine', 'dragon', 'letmein'])}"),  # a plain word
        ("high_entropy", f'api_key: "{random.getrandbits(128):032x}"'),
        ("high_entropy", f"CLIENT_SECRET={some(40)}"),
        ("high_entropy", f"X-Auth-Token: {some(32)}"),
    ]
    return random.choice(forms)


def no_secret(random: Random) -> Sample:
    forms = [
        f"commit {random.getrandbits(160):040x}",
        f"checksum: {random.getrandbits(256):064x}",
        f"key: {uuid.UUID(int=random.getrandbits(128), version=4)}",
        "password = os.environ['DB_PASSWORD']",
        "password: ********",
        "api_key = <your-api-key>",
        f"public_key = {random.getrandbits(256):064x}",
        "the token is passed in the Authorization header",
        f"primary_key=user_{digits(random, 6)}",
        "password policy: at least twelve characters",
        "AKIAIOSFODNN7EXAMPLE",
        f"data:image/png;base64,{base64.b64encode(random.randbytes(60)).decode()}",
        "tokenizer=HuggingFaceTB/SmolLM2-135M-Instruct",
        "secret=${VAULT_SECRET}",
        f"https://host/path/{random.getrandbits(64):x}?page={digits(random, 2)}",
        "keyboard_layout=qwertz_deutschland_105",
        "auth: LDAPAuthenticationProviderFactory2",
    ]
    return "", random.choice(forms)


Makers = list[Callable[[Random], Sample]]
POSITIVES: Makers = [email, phone, iban, card, national_id, ip]


def evaluate(
    random: Random,
    count: int,
    makers: Makers,
    negative: Callable[[Random], Sample],
    find: Callable[..., list[Any]],
    kinds: frozenset[str],
) -> tuple[dict[str, dict[str, float]], float]:
    """Scores by kind, and records per second."""
    texts, expected = [], []
    for _ in range(count):
        kind, sample = random.choice(makers)(random) if random.random() < 0.5 else negative(random)
        before, _, after = random.choice(FRAMES).partition("{}")
        texts.append(f"{before}{sample}{after}")
        expected.append((kind, len(before), len(before) + len(sample)))
    started = time.perf_counter()
    detections = [find(text, kinds) for text in texts]
    rate = count / (time.perf_counter() - started)
    hits: Counter[str] = Counter()
    missed: Counter[str] = Counter()
    wrong: Counter[str] = Counter()
    for text, (kind, start, end), spans in zip(texts, expected, detections, strict=True):
        right = [s for s in spans if s.kind == kind and start <= s.start and s.end <= end]
        # a number may stand behind its word, a password inside its URL
        least = min(0.5 * (end - start), 6 if kind == "password" else 8)
        enough = kind and sum(s.end - s.start for s in right) >= least
        if kind:
            hits[kind] += bool(enough)
            missed[kind] += not enough
        for span in spans:
            if not enough or span not in right:
                wrong[span.kind] += 1
        del text
    scores = {}
    for kind in sorted(hits | missed | wrong):
        precision = hits[kind] / max(1, hits[kind] + wrong[kind])
        recall = hits[kind] / max(1, hits[kind] + missed[kind])
        scores[kind] = {"positives": hits[kind] + missed[kind], "precision": precision, "recall": recall}
    return scores, rate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--records", type=int, default=20_000)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    random = Random(options.seed)
    report: dict[str, Any] = {}
    secret_makers: Makers = [secret]
    for rule, makers, negative, find, kinds in (
        ("personal_data", POSITIVES, lookalike, personal_data, frozenset(get_args(PersonalData))),
        ("secrets", secret_makers, no_secret, secrets, frozenset(get_args(Secret))),
    ):
        scores, rate = evaluate(random, options.records, makers, negative, find, kinds)
        clean = [
            "A ticket of the usual kind, without anything that a rule looks for, some three hundred letters long. " * 3
        ] * 20_000
        started = time.perf_counter()
        for text in clean:
            find(text, kinds)
        report[rule] = {
            "kinds": scores,
            "records_per_s": rate,
            "clean_records_per_s": len(clean) / (time.perf_counter() - started),
        }
    if options.json:
        print(json.dumps(report))
        return
    print("| rule | kind | positives | precision | recall |\n| --- | --- | ---: | ---: | ---: |")
    for rule, values in report.items():
        for kind, score in values["kinds"].items():
            print(f"| {rule} | {kind} | {score['positives']:,} | {score['precision']:.1%} | {score['recall']:.1%} |")
    for rule, values in report.items():
        print(
            f"\n{rule}: {values['records_per_s']:,.0f} records/s of these, {values['clean_records_per_s']:,.0f} records/s of"
            " 300 characters without a hit, one core"
        )


if __name__ == "__main__":
    main()
