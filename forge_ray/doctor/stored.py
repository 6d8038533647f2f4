"""Store checks: file modes, records, manifests, and the keys that deployments require. Writes nothing."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from pydantic import ValidationError

from forge_ray.config.release import DeployConfig
from forge_ray.data.build import kept_tombstones
from forge_ray.doctor.finding import Finding, Surroundings, is_private, mode_of
from forge_ray.errors import ForgeError, first_line
from forge_ray.records import RECORD_TYPES, Deployment, Event, Record, RunRecord
from forge_ray.store import paths
from forge_ray.store.catalog import Catalog
from forge_ray.store.files import Store, verify_files
from forge_ray.store.modes import is_shared

TYPES = {record.prefix: record for record in RECORD_TYPES}
SAMPLE_BYTES = 256 << 20
FOR_OTHERS = 0o002
NAMED_KEYS = ("FORGE_SIGNER", "FORGE_CHECKPOINT_KEY")  # variables that hold paths of keys


def modes(around: Surroundings, store: Store) -> Iterator[Finding]:
    """Permissions of the store's folders and of key files."""
    rule = "only its users can write to the store or read it; only their owner can read keys"
    loose, secret = [], []
    readable = False
    if store.is_local and Path(store.root).is_dir():
        root = Path(store.root)
        places = [root, *_inner(root)]
        loose = [path for path in places if path.is_file() or path.is_dir() if path.stat().st_mode & FOR_OTHERS]
        forbidden = 0o007 if is_shared(root) else 0o077
        readable = bool(root.stat().st_mode & forbidden) and any(path.stat().st_mode & forbidden for path in places[1:])
        secret = [path for path in sorted((root / "keys").glob("*")) if path.is_file()]
    variables = {Path(named).expanduser(): name for name in NAMED_KEYS if (named := around.environ.get(name, ""))}
    secret += variables
    for path in loose:
        observed = f"{path} has mode {mode_of(path)}: everyone can write to it"
        yield Finding("file modes", "fail", observed, rule, f"chmod o-w {shlex.quote(str(path))}")
    bad = False
    for path in secret:
        if not path.is_file():
            bad = True
            name = variables.get(path, "FORGE_SIGNER")
            yield Finding("file modes", "fail", f"{name}={path} is not a file", rule, f"unset {name}")
        elif not is_private(path):
            bad = True
            fix = f"chmod 600 {shlex.quote(str(path))}"
            yield Finding("file modes", "fail", f"{path} has mode {mode_of(path)}", rule, fix)
    if readable and not loose:
        who = "o" if is_shared(Path(store.root)) else "go"
        observed = f"{store.place}: others than its owner{' and group' if who == 'o' else ''} can read it"
        fix = f"chmod -R {who}-rwx {shlex.quote(store.root)}"
        yield Finding("file modes", "warn", observed, rule, fix)
    elif not loose and not bad:
        what = f", {len(secret)} keys private" if secret else ""
        yield Finding("file modes", "ok", f"{store.place}: not writable by everyone{what}", rule)


def _inner(root: Path) -> Iterator[Path]:
    """What lies in the store, two levels deep: whoever can write to a folder there replaces what is in it."""
    for path in sorted(root.iterdir()):
        if path.is_symlink():
            continue
        yield path
        if path.is_dir():
            yield from (inner for inner in sorted(path.iterdir()) if not inner.is_symlink())


def health(store: Store) -> Iterator[Finding]:
    """Every record and event parses and has the id of its content; a sample of the folders matches its manifests."""
    rule = "records parse and have the id of their content, and manifests verify"
    records, problems = _records(store)
    events, more = _events(store)
    problems += more
    if problems:
        for problem in problems[:5]:
            yield Finding(
                "store",
                "fail",
                problem,
                rule,
                "restore the file from a backup",
            )
        return
    if not records and not events:
        yield Finding("store", "ok", f"{store.place}: nothing in it yet", rule)
        return
    try:
        checked = _sample(store)
    except (ForgeError, ValidationError, KeyError) as error:
        observed = error.message if isinstance(error, ForgeError) else first_line(error)
        yield Finding("store", "fail", observed, rule, "restore the folder from a backup, or build it again")
        return
    yield Finding("store", "ok", f"{len(records)} records, {events} events; verified {checked} folders", rule)


def tombstones(store: Store) -> Iterator[Finding]:
    """Tombstones are those that the audit log tells of: a build would bring erased rows back without them."""
    rule = "the tombstones of erasures are as the audit log has them"
    problems = kept_tombstones.problems(store)
    for problem in problems[:5]:
        yield Finding("tombstones", "fail", problem, rule, "forge data prepare RUN.yaml restores what the audit log has")
    if not problems:
        yield Finding("tombstones", "ok", "none was removed or changed", rule)


def _records(store: Store) -> tuple[list[Record], list[str]]:
    records, problems = [], []
    for path in store.list(paths.RECORDS, recursive=True):
        name = path.rsplit("/", 1)[-1].removesuffix(".json")
        kind = TYPES.get(name.partition("_")[0])
        if kind is None:
            problems.append(f"{path} is of an unknown kind")
            continue
        try:
            record = kind.model_validate(store.read_json(path))
        except (ForgeError, ValidationError, ValueError) as error:
            problems.append(f"{path} does not parse: {str(error).partition(chr(10))[0][:100]}")
            continue
        own = (
            name if isinstance(record, RunRecord) else record.sealed().id
        )  # the id of a run is fixed before it has a result
        if own != name or record.id != name:
            problems.append(f"{path} was changed: its content is that of {own if own != name else record.id}")
        records.append(record)
    return records, problems


def _events(store: Store) -> tuple[int, list[str]]:
    problems, count = [], 0
    for path in store.list(paths.EVENTS):
        try:
            Event.model_validate(store.read_json(path))
            count += 1
        except (ForgeError, ValidationError, ValueError) as error:
            problems.append(f"{path} does not parse: {str(error).partition(chr(10))[0][:100]}")
    return count, problems


def log(store: Store) -> Iterator[Finding]:
    """Lines of the audit log that have no effect: nobody who could signed them, or they hold no event."""
    rule = "the audit log holds, and each of its lines has an effect"
    try:
        with Catalog.read_only(store) as catalog:
            ignored = catalog.standing.all_ignored()
    except ForgeError as error:
        yield Finding("audit log", "fail", error.message, rule, error.hint or "restore audit/ from a backup")
        return
    for line, reason in list(ignored.items())[:5]:
        yield Finding(
            "audit log", "warn", f"line {line} has no effect: {reason}", rule, "forge audit log shows who wrote it"
        )
    if not ignored:
        yield Finding("audit log", "ok", f"{catalog.standing.reader.number} lines", rule)


def _sample(store: Store) -> int:
    """Verify the newest folder of models and of datasets, and further folders up to SAMPLE_BYTES; returns how many. The
    folders of a remote store are not verified."""
    checked, left = 0, SAMPLE_BYTES
    for place in ("models", "datasets"):
        if not store.is_local:
            continue
        folders = sorted(
            (path for path in Path(store.root, place).glob("*_*") if store.is_published(f"{place}/{path.name}")),
            key=lambda path: path.stat().st_mtime,
            reverse=True,
        )
        for number, folder in enumerate(folders):
            files = store.files(f"{place}/{folder.name}")
            size = sum(entry.size for entry in files)
            if number and size > left:
                continue
            left -= size
            verify_files(folder, files)
            checked += 1
    return checked


def keyless(store: Store) -> dict[int, str]:
    """Port → name of the deployments that require no key."""
    names = {}
    for path in store.list(paths.of_kind("deployments")):
        try:
            deployment = Deployment.model_validate(store.read_json(path))
            config = DeployConfig.model_validate(deployment.config)
        except (ForgeError, ValidationError):  # reported by `health`
            continue
        if not config.needs_keys:
            names[config.port] = deployment.name
    return names


def deployments(store: Store) -> Iterator[Finding]:
    """Deployments that are reachable from the network without a key."""
    rule = "an endpoint that does not listen on loopback requires keys"
    open_ones = []
    for path in store.list(paths.of_kind("deployments")):
        try:
            deployment = Deployment.model_validate(store.read_json(path))
            config = DeployConfig.model_validate(deployment.config)
        except (ForgeError, ValidationError):
            continue
        if not config.needs_keys and not re.fullmatch(r"127(\.\d+){3}|localhost|::1", config.host):
            open_ones.append(f"{deployment.name} ({deployment.id}) on {config.host}:{config.port} has auth: none")
    for observed in open_ones:
        yield Finding("deployment", "warn", observed, rule, "forge deploy DEPLOY.yaml --set auth=keys")
    if not open_ones:
        yield Finding("deployment", "ok", "none is reachable from the network without keys", rule)
