"""Run files, --set and URIs: bounded in size, exact about numbers, silent about secrets."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from forge_ray.config.base import apply_overrides, load, parse
from forge_ray.config.data import DataConfig
from forge_ray.config.run import RunConfig
from forge_ray.config.yaml_text import brief, read_yaml
from forge_ray.data.read.sources import expand
from forge_ray.errors import ConfigError, NotFound
from forge_ray.machine.offline import SWITCHES
from forge_ray.store.files import Store
from forge_ray.store.uris import shown

pytestmark = [pytest.mark.unit, pytest.mark.timeout(60)]

LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{number}: &a{number} [{', '.join([f'*a{number - 1}'] * 3)}]\n" for number in range(1, 11)
)
HOSTILE = {
    "aliases that multiply": LAUGHS,
    "aliases that multiply in merges": "a: &a {b: 1}\n" + "".join(f"c{n}: {{<<: *a}}\n" for n in range(40)),
    "an alias for itself": "a: &a [*a]",
    "nested deeply": "a: " + "[" * 5000 + "]" * 5000,
    "a long number": "name: " + "9" * 100_000,
    "a long hexadecimal number": "name: 0x" + "f" * 100_000,
    "a date that is none": "name: 2024-13-45",
    "an int that is none": "name: !!int abc",
    "a list as a key": "{[a, b]: c}",
    "a large file": "a: " + "x" * (2 << 20),
    "a long key twice": f"{'k' * 900}: 1\n{'k' * 900}: 2\n",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_yaml_is_refused_shortly(name: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(HOSTILE[name])
    began = time.process_time()
    for attempt in (
        lambda: load(RunConfig, tmp_path / "run.yaml"),
        lambda: apply_overrides({}, (f"data={'{' + HOSTILE[name] + '}' if ': ' not in HOSTILE[name] else HOSTILE[name]}",)),
    ):
        with pytest.raises(ConfigError) as error:
            attempt()
        assert len(str(error.value)) < 2000
    assert time.process_time() - began < 10


def test_an_error_never_writes_out_what_aliases_multiply() -> None:
    value: list[object] = ["x" * 1000] * 10
    for _ in range(40):
        value = [value] * 10
    assert len(brief(value)) < 10_000
    with pytest.raises(ConfigError) as error:
        parse(DataConfig, {"sources": value, **{f"k{number}": 1 for number in range(5000)}})
    assert len(str(error.value)) < 10_000


def test_small_values_are_written_as_ever() -> None:
    for value in ("a", 1, 1.5, None, True, [], {}, (), [1, "a"], {"a": [1, {"b": 2}]}, (1,), (1, 2)):
        assert brief(value) == repr(value)


@pytest.mark.parametrize("text", ["59:59", "1:30", "59:59:59.5", "-1:00:00", "190:20:30"])
def test_sixties_are_no_numbers(text: str) -> None:
    assert read_yaml(f"a: {text}") == {"a": text}
    assert apply_overrides({}, (f"a={text}",)) == {"a": text}


def test_other_numbers_are_as_ever() -> None:
    import yaml

    for text in [
        "0",
        "-7",
        "1_000",
        "010",
        "0x1f",
        "0b11",
        "1.5",
        ".5",
        "1e-5",
        "1.0e+3",
        ".inf",
        "6.",
        "true",
        "2024-01-02",
    ]:
        assert read_yaml(text) == yaml.safe_load(text), text


def test_override_names_are_bounded() -> None:
    for override in (".".join("a" * 100_000) + "=1", "a" * 1_000_000, "=" + "a" * 1_000_000):
        with pytest.raises(ConfigError) as error:
            apply_overrides({}, (override,))
        assert len(str(error.value)) < 1000


SECRET = "SEC"
URIS = [
    "s3://KEY:SEC/RET@bucket/path",
    "s3://KEY:SEC@bucket",
    "s3://SEC@bucket",
    "s3://KEY:a@SEC@bucket/x",
    "s3://bucket/x?secret_key=SEC",
    "s3://bucket/x?u=SEC",
    "s3://bucket/x?endpoint_override=http://u:SEC@host",
    "s3://bucket/x?region=eu&x=SEC;y=SEC",
    "abfs://container:SEC@account/path?sas=SEC",
    "nosuch://user:SEC/@host/x?u=SEC",
]


def texts_of(uri: str) -> str:
    """Every text of a store and of rows that could show the URI."""
    texts = [shown(uri)]
    try:
        texts += [repr(Store(uri)), Store(uri).place]
    except ConfigError as error:
        texts += [error.message, error.hint]
    with pytest.raises((ConfigError, NotFound)) as raised:
        expand(DataConfig.model_validate({"sources": [{"path": f"nosuch{uri}"}]}))
    return "".join([*texts, raised.value.message])


@pytest.mark.slow
def test_no_uri_shows_a_secret() -> None:
    """All at once: S3 is asked for the regions of buckets, which takes seconds where there is no network."""
    with ThreadPoolExecutor(len(URIS)) as pool:
        texts = dict(zip(URIS, pool.map(texts_of, URIS), strict=True))
    assert not [uri for uri, text in texts.items() if SECRET in text]


def test_uris_without_secrets_are_shown_whole() -> None:
    for uri in ("s3://bucket/a@v1/b?region=eu&scheme=http&endpoint_override=127.0.0.1:9", "/mnt/a:b@c", "file:///a/b"):
        assert shown(uri) == uri


def test_no_cloud_metadata_is_asked_for_credentials() -> None:
    assert SWITCHES["AWS_EC2_METADATA_DISABLED"] == "true"
