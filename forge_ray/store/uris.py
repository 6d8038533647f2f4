"""URIs of stores and sources: which schemes are storage, and what of a URI may be shown."""

from __future__ import annotations

import re

from forge_ray.errors import ConfigError

SCHEMES = ("file", "s3", "gs", "gcs", "abfs", "abfss", "hdfs", "viewfs")  # a scheme that Arrow does not know it refuses
WEB = {"http", "https", "ftp", "ftps", "hf", "github", "gist", "git", "webhdfs", "dbfs", "jlab", "data"}
# Storage that Arrow knows by way of fsspec; not what fetches pages (http, github, hf …), nor what opens one URI in another
FSSPEC = {"abfs", "abfss", "adl", "az", "gs", "gcs", "s3", "s3a", "oci", "oss", "cos", "obs", "sftp", "ssh", "smb", "memory"}
HARMLESS = {"region", "scheme", "endpoint_override", "allow_bucket_creation", "allow_bucket_deletion", "anonymous"}
SECRETS = re.compile(r"[?&][^=&]*(secret|password|token|access_key|account_key|sig)[^=&]*=", re.I)


def shown(uri: str) -> str:
    """The URI as it may be printed: without user name and password, and without the values of its options."""
    scheme, mark, rest = uri.partition("://")
    if not mark:
        return uri
    before, at, behind = rest.rpartition("@")  # a secret may hold `/`, so the last one counts
    if at and (":" in before or "/" not in before):
        rest = behind
    place, mark, options = rest.partition("?")
    values = [option.partition("=") for option in re.split("[&;]", options)] if mark else []
    parts = [f"{name}={value}" if name in HARMLESS and "@" not in value else f"{name}=…" for name, _, value in values]
    return f"{scheme}://{place}" + ("?" + "&".join(parts) if parts else "")


def why(error: Exception, uri: str) -> str:
    """An error about a URI; libraries repeat the URI, so where that has something to hide, only the kind of error."""
    return str(error) if shown(uri) == uri else f"{type(error).__name__}, whose text is withheld, for it repeats the URI"


def has_secret(uri: str) -> bool:
    rest = uri.partition("://")[2]
    before, at, _ = rest.partition("?")[0].rpartition("@")
    return bool(at and (":" in before or "/" not in before)) or SECRETS.search(uri) is not None


def require_storage(uri: str, key: str) -> None:
    """Refuse a URI that is not of a file system or an object store: pages of the web change, and leave no digest behind."""
    scheme = uri.partition("://")[0]
    kind, plus, protocol = scheme.partition("+")
    is_storage = (kind == "fsspec" and protocol in FSSPEC) if plus else scheme == scheme.lower() and scheme not in WEB
    if not is_storage or "::" in uri.partition("?")[0]:
        raise ConfigError(
            f"{key}: {shown(uri)!r} is not on a file system or object store: the scheme is {scheme!r}",
            hint=f"copy the files first, or use one of {', '.join(SCHEMES)}",
        )
