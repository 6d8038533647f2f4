"""Proxies in the environment: loopback and the cluster's hosts are asked directly."""

from __future__ import annotations

import os

import pytest

from forge_ray.machine.proxies import bypass, host_of
from tests.scripted_http import as_json, corporate_proxy, scripted

pytestmark = pytest.mark.unit
NAMES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*NAMES, *map(str.upper, NAMES)):
        monkeypatch.setenv(name, "")  # so that what `bypass` sets is taken back
        monkeypatch.delenv(name)


@pytest.mark.parametrize(("address", "host"), [
    ("http://head:8265", "head"), ("https://[fd00::1]:8265/x", "fd00::1"), ("10.0.0.1:6379", "10.0.0.1"),
    ("ray://head:10001", "head"), ("auto", ""), ("local", ""), ("", ""), ("http://[nonsense", ""),
])  # fmt: skip
def test_hosts_of_addresses(address: str, host: str) -> None:
    assert host_of(address) == host


def test_nothing_changes_without_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", ".corp")
    bypass("http://head:8265")
    assert (os.environ["no_proxy"], os.environ.get("NO_PROXY")) == (".corp", None)


@pytest.mark.parametrize(("before", "after"), [
    ({}, "127.0.0.1,localhost,::1,head"),
    ({"NO_PROXY": ".corp, 127.0.0.1"}, ".corp,127.0.0.1,localhost,::1,head"),
    ({"no_proxy": ".low", "NO_PROXY": ".high"}, ".low,127.0.0.1,localhost,::1,head"),  # as libraries read them
])  # fmt: skip
def test_hosts_are_added(before: dict[str, str], after: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"HTTPS_PROXY": "http://127.0.0.1:9", **before}.items():
        monkeypatch.setenv(name, value)
    for _ in range(2):
        bypass("http://head:8265", "auto")
        assert os.environ["no_proxy"] == os.environ["NO_PROXY"] == after


def test_who_excludes_every_host_keeps_that(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "*")
    bypass("http://head:8265")
    assert os.environ["no_proxy"] == "*"


def test_requests_of_rays_libraries_go_directly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray asks with `requests`, which reads the environment at each request."""
    import requests

    with scripted(corporate_proxy) as proxy, scripted(lambda *_: as_json({"ray_version": "2.60.0"})) as dashboard:
        monkeypatch.setenv("http_proxy", proxy.url)
        assert requests.get(f"{dashboard.url}/api/version", timeout=10).status_code == 503
        bypass(dashboard.url)
        assert requests.get(f"{dashboard.url}/api/version", timeout=10).json() == {"ray_version": "2.60.0"}
        assert len(proxy.requests) == 1
