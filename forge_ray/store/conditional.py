"""Create-if-absent on object stores, which pyarrow's file systems lack: a PUT with `If-None-Match: *` on S3 (RFC 9110
section 13.1.2; AWS, MinIO and Ceph honour it), of which exactly one of two that come at once succeeds.

Whether a server honours the header is tried once per process, on an object that means nothing. Where it does not, and on
storage that has no such request here, nothing that another host may write at the same time is written: the operator either
chooses another storage, or says with FORGE_SINGLE_WRITER=1 that one host at a time writes to this store.
"""

from __future__ import annotations

import configparser
import functools
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote, urlsplit

from obstore import put
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import S3Store

from forge_ray.errors import ConfigError, StoreError
from forge_ray.store.uris import shown

if TYPE_CHECKING:
    from obstore.store import ClientConfig

SINGLE_WRITER = "FORGE_SINGLE_WRITER"
PROBE = "audit/create-only.json"
WEB_IDENTITY = "AWS_WEB_IDENTITY_TOKEN_FILE"
CONTAINER_PATH, CONTAINER_URI = "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "AWS_CONTAINER_CREDENTIALS_FULL_URI"
CONTAINER_TOKEN = "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE"
AMAZON = ".amazonaws.com"
ECS = "169.254.170.2"  # serves CONTAINER_PATH; in EKS, CONTAINER_URI names the host (169.254.170.23, or its IPv6 address)


def create(uri: str, path: str, data: bytes) -> bool:
    """Write `data` to `path` (`bucket/key`) unless there is an object; returns whether it did. `uri` is the store's."""
    _require_honoured(uri)
    return _created(uri, path, data)


def is_single_writer() -> bool:
    """Whether the operator answers for it that one host at a time writes to the store."""
    text = os.environ.get(SINGLE_WRITER, "")
    if text not in ("", "0", "1"):
        raise ConfigError(f"{SINGLE_WRITER} is {text!r}", hint="set it to 1, or leave it unset")
    return text == "1"


@functools.cache
def _require_honoured(uri: str) -> None:
    root = f"{urlsplit(uri).netloc.rpartition('@')[2]}{urlsplit(uri).path}".rstrip("/")
    if _created(uri, f"{root}/{PROBE}", b"{}") and _created(uri, f"{root}/{PROBE}", b"{}"):
        raise StoreError(
            f"the object store of {shown(uri)} overwrites an object though the request forbids it (If-None-Match): two hosts"
            " that write at once would lose one of two lines of the log",
            hint=f"use a server that honours it, or set {SINGLE_WRITER}=1 where one host at a time writes to this store",
        )


def _created(uri: str, path: str, data: bytes) -> bool:
    bucket, _, key = path.partition("/")
    try:
        put(_bucket(uri, bucket), key, data, mode="create")
    except AlreadyExistsError:
        return False
    except BaseError as error:
        raise StoreError(
            f"{key!r} could not be created in the store {shown(uri)}: {str(error).splitlines()[0]}",
            hint="check the connection and the credentials; a certificate authority of your own is named by SSL_CERT_FILE",
        ) from None
    return True


@functools.cache
def _bucket(uri: str, name: str) -> S3Store:
    """The bucket as pyarrow would open it: credentials, region and endpoint of the URI before those of the environment, no
    proxy, and never the metadata address of a cloud."""
    parts = urlsplit(uri)
    if parts.scheme != "s3":
        raise StoreError(
            f"the store {shown(uri)} is on {parts.scheme}://, where an object cannot be created only if there is none: two"
            " hosts that write at once could lose one of two lines of the log",
            hint=f"use s3:// or a file system, or set {SINGLE_WRITER}=1 where one host at a time writes to this store",
        )
    options = {name: values[-1] for name, values in parse_qs(parts.query).items()}
    config: dict[str, Any] = _credentials(parts.username, parts.password)
    if region := options.get("region") or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION"):
        config["region"] = region
    endpoint = options.get("endpoint_override", "")
    if endpoint:
        endpoint = endpoint if "://" in endpoint else f"{options.get('scheme', 'https')}://{endpoint}"
        config["endpoint"] = endpoint
    endpoint = endpoint or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL", "")
    hosts = [urlsplit(endpoint).hostname or AMAZON, *_credential_hosts()]
    client: ClientConfig = {
        "proxy_url": "http://127.0.0.1:9",  # else those of the environment hold
        "proxy_excludes": ",".join(dict.fromkeys(hosts)),
        "allow_http": endpoint.startswith("http://"),
    }
    return S3Store(name, client_options=client, **config)


def _credential_hosts() -> list[str]:
    """Where the library asks for the credentials of a web identity or of a container, if the environment says so."""
    hosts = []
    if os.environ.get(WEB_IDENTITY):
        hosts.append(urlsplit(os.environ.get("AWS_ENDPOINT_URL_STS", "")).hostname or AMAZON)
    if os.environ.get(CONTAINER_PATH):
        hosts.append(ECS)
    if full := urlsplit(os.environ.get(CONTAINER_URI, "")).hostname:
        hosts.append(full)
    return hosts


def _credentials(user: str | None, secret: str | None) -> dict[str, str]:
    """The URI's, the environment's, else the profile's of AWS's shared credentials file."""
    if user and secret:
        return {"access_key_id": unquote(user), "secret_access_key": unquote(secret)}
    if os.environ.get("AWS_ACCESS_KEY_ID") or any(map(os.environ.get, (WEB_IDENTITY, CONTAINER_PATH))):
        return {}  # the library reads them itself
    if os.environ.get(CONTAINER_URI):
        if os.environ.get(CONTAINER_TOKEN):
            return {}
        raise ConfigError(  # the library would ask the metadata address of a cloud instead
            f"{CONTAINER_URI} is set without {CONTAINER_TOKEN}, the token that its credentials are asked for with",
            hint="set both, as EKS does; elsewhere name the credentials in the store's URI or in AWS_ACCESS_KEY_ID",
        )
    path = Path(os.environ.get("AWS_SHARED_CREDENTIALS_FILE") or "~/.aws/credentials").expanduser()
    profiles = configparser.ConfigParser(interpolation=None)
    profiles.read(path)
    profile = os.environ.get("AWS_PROFILE") or "default"
    values = profiles[profile] if profiles.has_section(profile) else {}
    if "aws_access_key_id" not in values or "aws_secret_access_key" not in values:
        raise ConfigError(
            "no credentials for the object store: none in the store's URI, in AWS_ACCESS_KEY_ID, or under"
            f" [{profile}] of {path}",
            hint="name them in one of the three, or give a web identity (AWS_WEB_IDENTITY_TOKEN_FILE)",
        )
    token = values.get("aws_session_token")
    credentials = {"access_key_id": values["aws_access_key_id"], "secret_access_key": values["aws_secret_access_key"]}
    return credentials | ({"session_token": token} if token else {})
