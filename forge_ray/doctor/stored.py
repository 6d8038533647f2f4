"""Is the store whole and closed: modes, records, manifests, what its deployments ask for. Writes nothing."""

from __future__ import annotations

import re
import shlex
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from pydantic import ValidationError

from forge_ray.config.release import DeployConfig
from forge_ray.doctor.finding import Finding, Surroundings, is_private, mode_of
from forge_ray.errors import ForgeError
from forge_ray.records import RECORD_TYPES, Deployment, Event, Record, RunRecord
from forge_ray.store import paths
from forge_ray.store.files import Store, verify_files

TYPES = {record.prefix: record for record in RECORD_TYPES}
PLACES = ("models", "datasets", "runs")  # holds weights, rows and pickled checkpoints
SAMPLE_BYTES = 256 << 20
FOR_OTHERS = 0o002


def modes(around: Surroundings, store: Store) -> Iterator[Finding]:
    """Who may write what a later process will believe, and read what is secret."""
    rule = "nobody but its users writes the store; keys are for their owner alone"
    loose, secret = [], []
    if store.is_local and Path(store.root).is_dir():
        root = Path(store.root)
        loose = [path for path in (root, *(root / name for name in PLACES)) if path.is_dir() and _is_loose(path)]
        secret = [path for path in sorted((root / "keys").glob("*")) if path.is_file()]
    if signer := around.environ.get("FORGE_SIGNER", ""):
        secret.append(Path(signer).expanduser())
    for path in loose:
        found = f"{path} has mode {mode_of(path)}: everybody may write it"
        yield Finding("file modes", "fail", found, rule, f"chmod o-w {shlex.quote(str(path))}")
    bad = False
    for path in secret:
        if not path.is_file():
            bad = True
            yield Finding("file modes", "fail", f"FORGE_SIGNER={path} is no file", rule, "unset FORGE_SIGNER")
        elif not is_private(path):
            bad = True
            mend = f"chmod 600 {shlex.quote(str(path))}"
            yield Finding("file modes", "fail", f"{path} has mode {mode_of(path)}", rule, mend)
    if not loose and not bad:
        what = f", {len(secret)} keys private" if secret else ""
        yield Finding("file modes", "ok", f"{store.place}: not writable by everybody{what}", rule)


def _is_loose(path: Path) -> bool:
    mode = path.stat().st_mode
    return bool(mode & FOR_OTHERS)


def health(store: Store) -> Iterator[Finding]:
    """Every record and event parses and is named by its content; a sample of the folders is what its manifest says."""
    rule = "records parse and have the id of their content, manifests verify, the index can be made anew from them"
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
                f"restore the file from a backup; forge catalog rebuild --store {store.place}",
            )
        return
    if not records and not events:
        yield Finding("store", "ok", f"{store.place}: nothing in it yet", rule)
        return
    if index := _index_problem(store, len(records) + events):
        yield Finding("store", "warn", index, rule, f"forge catalog rebuild --store {store.place}")
    try:
        checked = _sample(store)
    except (ForgeError, ValidationError, KeyError) as error:
        found = error.message if isinstance(error, ForgeError) else str(error).partition("\n")[0]
        yield Finding("store", "fail", found, rule, "restore the folder from a backup, or build it again")
        return
    yield Finding("store", "ok", f"{len(records)} records, {events} events; verified {checked} folders", rule)


def _records(store: Store) -> tuple[list[Record], list[str]]:
    found, problems = [], []
    for path in store.list(paths.RECORDS, recursive=True):
        name = path.rsplit("/", 1)[-1].removesuffix(".json")
        kind = TYPES.get(name.partition("_")[0])
        if kind is None:
            problems.append(f"{path} is of no known kind")
            continue
        try:
            record = kind.model_validate(store.read_json(path))
        except (ForgeError, ValidationError, ValueError) as error:
            problems.append(f"{path} does not parse: {str(error).partition(chr(10))[0][:100]}")
            continue
        own = name if isinstance(record, RunRecord) else record.sealed().id  # a run's was fixed before it had a result
        if own != name or record.id != name:
            problems.append(f"{path} was changed: its content is that of {own if own != name else record.id}")
        found.append(record)
    return found, problems


def _events(store: Store) -> tuple[int, list[str]]:
    problems, count = [], 0
    for path in store.list(paths.EVENTS):
        try:
            Event.model_validate(store.read_json(path))
            count += 1
        except (ForgeError, ValidationError, ValueError) as error:
            problems.append(f"{path} does not parse: {str(error).partition(chr(10))[0][:100]}")
    return count, problems


def _index_problem(store: Store, expected: int) -> str:
    """What is wrong with the index of a local store; "" also where there is none, for the next command makes it."""
    path = Path(store.root) / paths.INDEX_FILE
    if not store.is_local or not path.is_file():
        return ""
    try:
        with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as index:
            (count,) = index.execute("select (select count(*) from records) + (select count(*) from events)").fetchone()
    except sqlite3.Error as error:
        return f"{path} is not readable: {error}"
    return f"{path} has {count} entries, the store {expected}" if count > expected else ""


def _sample(store: Store) -> int:
    """The youngest folder of models and datasets each, and more as far as SAMPLE_BYTES go; remote stores their manifests."""
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
    """port → name of the deployments that ask for no key."""
    found = {}
    for path in store.list(paths.of_kind("deployments")):
        try:
            deployment = Deployment.model_validate(store.read_json(path))
            config = DeployConfig.model_validate(deployment.config)
        except (ForgeError, ValidationError):  # told by `health`
            continue
        if not config.needs_keys:
            found[config.port] = deployment.name
    return found


def deployments(store: Store) -> Iterator[Finding]:
    """An endpoint that the network reaches asks for keys."""
    rule = "an endpoint that is not on loopback asks for keys"
    open_ones = []
    for path in store.list(paths.of_kind("deployments")):
        try:
            deployment = Deployment.model_validate(store.read_json(path))
            config = DeployConfig.model_validate(deployment.config)
        except (ForgeError, ValidationError):
            continue
        if not config.needs_keys and not re.fullmatch(r"127(\.\d+){3}|localhost|::1", config.host):
            open_ones.append(f"{deployment.name} ({deployment.id}) on {config.host}:{config.port} has auth: none")
    for found in open_ones:
        yield Finding("deployment", "warn", found, rule, "forge deploy DEPLOY.yaml --set auth=keys")
    if not open_ones:
        yield Finding("deployment", "ok", "none is open to the network without keys", rule)
