"""The store: one concrete class over `pyarrow.fs`.

Paths are relative `str`, with `/`. Local disk, NFS, S3/MinIO, HDFS: whatever `FileSystem.from_uri` knows. Publishing is
atomic: a single object is written aside and moved (local) or put in one call (object stores); a directory gets its
`MANIFEST.json` last, and without a manifest that verifies it does not exist.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow.fs as pafs

from forge_ray.errors import ConfigError, NotFound, StoreError
from forge_ray.records import FileEntry, canonical_json
from forge_ray.store import modes
from forge_ray.store.exact import link_file, others, path_inside, refuse_others, require_same
from forge_ray.store.home import cache_folder, expanded
from forge_ray.store.owner import owner_mark
from forge_ray.store.scratch import scratch_folder
from forge_ray.store.uris import require_storage, shown, why

MANIFEST = "MANIFEST.json"
CHUNK = 1 << 20
READS = 4
RESTORE = "restore the file from a backup, or build it again"


class Store:
    """Bytes and directories under one root URI. Holds only the URI when pickled."""

    def __init__(self, uri: str) -> None:
        self.uri = uri if "://" in uri else str(expanded(uri).absolute())
        if "://" in uri:
            require_storage(uri, "store")
        try:
            self._fs, self.root = pafs.FileSystem.from_uri(self.uri)
        except (ValueError, OSError) as error:
            raise ConfigError(
                f"store {self.place!r} cannot be opened: {why(error, self.uri)}",
                hint="give a folder, or a URI like s3://bucket/folder",
            ) from None
        self.root = self.root.rstrip("/")
        if self.is_local:
            modes.set_umask(Path(self.root))

    def __reduce__(self) -> tuple[type[Store], tuple[str]]:
        return Store, (self.uri,)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Store) and other.uri == self.uri

    def __hash__(self) -> int:
        return hash(self.uri)

    def __repr__(self) -> str:
        return f"Store({self.place!r})"

    @property
    def place(self) -> str:
        """The URI as it may be shown: without the secrets that it can carry."""
        return shown(self.uri)

    @property
    def filesystem(self) -> pafs.FileSystem:
        return self._fs

    @property
    def is_local(self) -> bool:
        return isinstance(self._fs, pafs.LocalFileSystem)

    def path(self, relative: str) -> str:
        """The path that `self.filesystem` understands; refuses to leave the store."""
        parts = PurePosixPath(relative).parts
        if not parts or ".." in parts or relative.startswith("/"):
            raise StoreError(f"{relative!r} is not a path inside the store", hint="use a relative path without `..`")
        return f"{self.root}/{'/'.join(parts)}"

    def local(self, relative: str) -> Path:
        """The same place as a local path; only where the store is a file system that this machine mounts."""
        if not self.is_local:
            raise StoreError(f"{self.place} is not a local or mounted store", hint="use `Store.fetch_dir`")
        return Path(self.path(relative))

    def exists(self, relative: str) -> bool:
        return bool(self._fs.get_file_info(self.path(relative)).type != pafs.FileType.NotFound)

    def size(self, relative: str) -> int:
        """Bytes of a file; -1 where there is none."""
        info = self._fs.get_file_info(self.path(relative))
        return int(info.size) if info.type == pafs.FileType.File else -1

    def read(self, relative: str) -> bytes:
        try:
            with self._fs.open_input_stream(self.path(relative)) as stream:
                return bytes(stream.read())
        except FileNotFoundError:
            raise NotFound(f"{relative!r} is not in the store {self.place}", hint="check --store and the id") from None

    def read_json(self, relative: str) -> Any:
        return json.loads(self.read_json_bytes(relative))

    def read_json_bytes(self, relative: str) -> bytes:
        """A JSON file as it is stored. One on an object store is read again where it is cut off: the client asks its length
        first, and another host may replace it by a longer one before the second request."""
        for _ in range(1 if self.is_local else READS):
            data = self.read(relative)
            with contextlib.suppress(ValueError):
                json.loads(data)
                return data
        raise StoreError(
            f"{relative!r} in {self.place} is not JSON ({len(data)} bytes)", hint="restore the file from a backup"
        )

    def write(self, relative: str, data: bytes) -> None:
        """Publish one object: readers see all of it or none."""
        target = self.path(relative)
        if self.is_local:
            modes.make_root(Path(self.root))
        self._fs.create_dir(target.rsplit("/", 1)[0], recursive=True)
        if self.is_local:
            temporary = f"{target.rsplit('/', 1)[0]}/.tmp-{owner_mark()}-{uuid.uuid4().hex}"
            try:
                with open(temporary, "xb") as stream:  # not mkstemp: a group that shares the store may read the record
                    stream.write(data)
                    stream.flush()
                    os.fsync(stream.fileno())
                os.replace(temporary, target)
                fsync_dir(Path(target).parent)
            except BaseException:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(temporary)
                raise
        else:
            with self._fs.open_output_stream(target) as stream:
                stream.write(data)

    def create(self, relative: str, data: bytes) -> bool:
        """Publish one object unless there is one; returns whether it did. Of two at once, on any hosts, one succeeds."""
        if self.exists(relative):
            return False
        if not self.is_local:
            return self._create_remote(relative, data)
        target = self.path(relative)
        temporary = str(PurePosixPath(relative).with_name(f".new-{owner_mark()}-{uuid.uuid4().hex}"))
        self.write(temporary, data)
        try:
            os.link(self.path(temporary), target)
        except FileExistsError:
            return False
        finally:
            self.delete(temporary)
        fsync_dir(Path(target).parent)
        return True

    def _create_remote(self, relative: str, data: bytes) -> bool:
        from forge_ray.store import conditional  # its library is needed here alone

        if conditional.is_single_writer():
            self.write(relative, data)
            return True
        return conditional.create(self.uri, self.path(relative), data)

    def free_bytes(self) -> int | None:
        """Room for this user where the store lies; None where nobody can tell."""
        if not self.is_local:
            return None
        folder = Path(self.root)
        while not folder.exists():
            folder = folder.parent
        return shutil.disk_usage(folder).free

    def write_once(self, relative: str, data: bytes) -> None:
        """Publish an immutable object: the same bytes again are fine, others are refused."""
        if not self.create(relative, data) and self.read(relative) != data:
            raise StoreError(
                f"{relative!r} exists with other content; records are immutable",
                hint="this is a bug or a tampered store: compare the two",
            )

    def list(self, relative: str, recursive: bool = False) -> list[str]:
        """Sorted files (not folders) below `relative`, as paths of the store; hidden ones are not listed."""
        selector = pafs.FileSelector(self.path(relative), allow_not_found=True, recursive=recursive)
        try:
            infos = self._fs.get_file_info(selector)
        except FileNotFoundError:  # made between pyarrow's two looks: missing when it opened it, there when it checked
            infos = self._fs.get_file_info(selector)
        names = (info.path.removeprefix(self.root + "/") for info in infos if info.type == pafs.FileType.File)
        return sorted(name for name in names if not name.rsplit("/", 1)[-1].startswith("."))

    def delete(self, relative: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._fs.delete_file(self.path(relative))

    def delete_dir(self, relative: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._fs.delete_dir(self.path(relative))

    @contextlib.contextmanager
    def staged_dir(self, relative: str) -> Iterator[Path]:
        """A scratch folder whose content becomes `relative` when the block ends without an error.

        The files get a manifest with sha256 of each; on a local store the folder is moved in one rename.
        """
        if self.is_local:
            target = self.local(relative)
            modes.make_root(Path(self.root))
            target.parent.mkdir(parents=True, exist_ok=True)
            staging = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".tmp-{target.name}-{owner_mark()}-"))
        else:
            staging = scratch_folder("stage")
        try:
            yield staging
            self._publish(staging, relative)
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def _publish(self, staging: Path, relative: str) -> None:
        files = hash_dir(staging)
        manifest = canonical_json({"files": [entry.model_dump() for entry in files]})
        if self.is_local:
            (staging / MANIFEST).write_bytes(manifest)
            sync_tree(staging)
            os.chmod(staging, modes.publish_mode(staging))
            replace_dir(staging, self.local(relative))
            return
        self.delete_dir(relative)
        for entry in files:
            target = self.path(f"{relative}/{entry.path}")
            self._fs.create_dir(target.rsplit("/", 1)[0], recursive=True)
            pafs.copy_files(str(staging / entry.path), target, destination_filesystem=self._fs)
        self.write(f"{relative}/{MANIFEST}", manifest)

    def move_dir(self, staging: str, relative: str) -> None:
        """Make a complete folder of this store, manifest included, into `relative`; what is published there stays."""
        if self.is_published(relative):
            return
        if self.is_local:
            folder = self.local(staging)
            sync_tree(folder)
            with contextlib.suppress(OSError):
                os.rename(folder, self.local(relative))  # refused where another process was faster
            if not self.is_published(relative):
                replace_dir(folder, self.local(relative))
            fsync_dir(self.local(relative).parent)
            return
        for entry in (*self.files(staging), FileEntry(path=MANIFEST, size=0, sha256="")):
            target = self.path(f"{relative}/{entry.path}")
            self._fs.create_dir(target.rsplit("/", 1)[0], recursive=True)
            self._fs.move(self.path(f"{staging}/{entry.path}"), target)

    def link(self, source: str, relative: str) -> None:
        """A second name for one finished object: a hard link where the file system has them, else a copy."""
        target = self.path(relative)
        self._fs.create_dir(target.rsplit("/", 1)[0], recursive=True)
        if self.is_local:
            with contextlib.suppress(OSError):
                os.link(self.path(source), target)
                return
        self._fs.copy_file(self.path(source), target)

    def copy_dir(self, source: str, relative: str) -> None:
        """Publish the published folder `source` under a second name, by hard links where the file system has them."""
        if self.is_published(relative):
            return
        with self.staged_dir(relative) as target:
            folder = self.fetch_dir(source)
            for entry in self.files(source):
                link_file(folder, entry.path, target)

    def files(self, relative: str) -> tuple[FileEntry, ...]:
        """The manifest of a published directory."""
        listed = self.read_json(f"{relative}/{MANIFEST}")
        try:
            return tuple(FileEntry.model_validate(entry) for entry in listed["files"])
        except (LookupError, TypeError, ValueError):
            raise StoreError(f"{relative}/{MANIFEST} is not a list of files", hint=RESTORE) from None

    def is_published(self, relative: str) -> bool:
        return self.exists(f"{relative}/{MANIFEST}")

    def fetch_dir(
        self,
        relative: str,
        verify: bool = True,
        progress: Callable[[int], None] | None = None,
        files: tuple[FileEntry, ...] | None = None,
        tolerated: frozenset[str] = frozenset(),
    ) -> Path:
        """A local folder with exactly the published files, each checked against its sha256. `files` are those of the
        record that the folder belongs to: a manifest that lists others is refused, since nothing else authenticates it.

        On a local store this is the folder itself; else a copy under the user's cache, of the listed files alone.
        """
        listed = self.files(relative)
        if files is not None:
            require_same(f"{relative}/{MANIFEST}", listed, files)
        folder = self.local(relative) if self.is_local else self._download(relative, listed)
        if verify:
            verify_files(folder, listed, progress, tolerated)
        else:
            refuse_others(folder, names_in(listed) | tolerated)
        return folder

    def _download(self, relative: str, files: tuple[FileEntry, ...]) -> Path:
        """The listed files of a remote folder in the user's cache, and nothing else there."""
        cache = cache_folder()
        folder = cache / hashlib.sha256(f"{self.uri}/{relative}".encode()).hexdigest()[:16]
        folder.mkdir(parents=True, exist_ok=True)
        for path in others(folder, names_in(files)):  # of a version that the folder once held
            path.unlink()
        for entry in files:
            target = path_inside(folder, entry.path)
            if target.is_file() and target.stat().st_size == entry.size:
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = cache / f".partial-{folder.name}-{owner_mark()}-{uuid.uuid4().hex[:8]}"
            try:
                pafs.copy_files(self.path(f"{relative}/{entry.path}"), str(partial), source_filesystem=self._fs)
                os.replace(partial, target)
            finally:
                partial.unlink(missing_ok=True)
        return folder


def sha256_file(path: Path, progress: Callable[[int], None] | None = None) -> str:
    hasher = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            hasher.update(chunk)
            if progress:
                progress(len(chunk))
    return hasher.hexdigest()


def hash_dir(folder: Path) -> tuple[FileEntry, ...]:
    """Every file below `folder` but the manifest, sorted by path."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    return tuple(
        FileEntry(path=path.relative_to(folder).as_posix(), size=path.stat().st_size, sha256=sha256_file(path))
        for path in paths
    )


def names_in(files: tuple[FileEntry, ...]) -> set[str]:
    """What a published folder of these files holds."""
    return {MANIFEST, *(entry.path for entry in files)}


def verify_files(
    folder: Path,
    files: tuple[FileEntry, ...],
    progress: Callable[[int], None] | None = None,
    tolerated: frozenset[str] = frozenset(),
) -> None:
    """Raise `StoreError` unless each file is there with the size and sha256 that its entry says, and nothing else is."""
    refuse_others(folder, names_in(files) | tolerated)
    for entry in files:
        path = path_inside(folder, entry.path)
        size = path.stat().st_size if path.is_file() else -1
        if size != entry.size:
            raise StoreError(f"{path} has {size} bytes, its manifest says {entry.size}", hint=RESTORE)
        sha256 = sha256_file(path, progress)
        if sha256 != entry.sha256:
            raise StoreError(
                f"{path} has sha256 {sha256}, its manifest says {entry.sha256}", hint="restore the file, or rebuild"
            )


def replace_dir(staging: Path, target: Path) -> None:
    """Rename `staging` to `target`; an older `target` is moved aside first, then removed."""
    old = target.with_name(f".old-{target.name}-{owner_mark()}")
    if target.exists():
        os.rename(target, old)
    os.rename(staging, target)
    fsync_dir(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def sync_tree(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        fsync_dir(path)


def fsync_dir(path: Path) -> None:
    """fsync a file or a folder by its path."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
