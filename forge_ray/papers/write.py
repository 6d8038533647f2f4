"""Write all documents of a version to a folder, and an evidence pack for auditors."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from forge_ray.errors import ConfigError
from forge_ray.papers.bom import bom
from forge_ray.papers.croissant import croissant
from forge_ray.papers.evidence import annex_iv, annex_xi, training_content_summary
from forge_ray.papers.facts import Facts
from forge_ray.papers.markdown import plain, table
from forge_ray.papers.model_card import model_card
from forge_ray.papers.openlineage import openlineage
from forge_ray.papers.provenance import provenance
from forge_ray.store import audit_log, paths
from forge_ray.store.catalog import event_path
from forge_ray.store.files import Store
from forge_ray.store.signing import IN_TOTO, PrivateKey, envelope

INDEX = "INDEX.md"
SUMS = "SHA256SUMS"
LINES = "audit/lines.jsonl"  # only lines about the contents of the pack: the others are about other models and keys
WHAT = {
    "model_card.md": "what the model is, from what, how good; Markdown with Hugging Face's front matter",
    "bom.cdx.json": "bill of materials, CycloneDX 1.6",
    "openlineage.jsonl": "how it came to be, OpenLineage 2-0-2 events",
    "provenance.json": "where the weights came from, in-toto Statement v1 with SLSA provenance v1",
    "provenance.dsse.json": "the same, signed: a DSSE envelope",
    "evidence-annex-xi.md": "evidence for Annex XI of the AI Act",
    "evidence-annex-iv.md": "evidence for Annex IV of the AI Act",
    "training-content-summary.md": "evidence for the training-content summary",
}


def papers(facts: Facts, key: PrivateKey | None = None) -> dict[str, bytes]:
    """File name → content. Equal facts give equal bytes, except for signatures with a P-256 `key`, which are randomised."""
    documents: dict[str, bytes] = {
        "model_card.md": model_card(facts),
        "bom.cdx.json": bom(facts),
        **{f"croissant-{dataset.id}.json": croissant(facts, dataset) for dataset in facts.datasets},
        "openlineage.jsonl": openlineage(facts),
        "provenance.json": provenance(facts),
        "evidence-annex-xi.md": annex_xi(facts),
        "evidence-annex-iv.md": annex_iv(facts),
        "training-content-summary.md": training_content_summary(facts),
    }
    if key is not None:
        documents["provenance.dsse.json"] = (
            json.dumps(envelope(documents["provenance.json"], IN_TOTO, key), indent=1) + "\n"
        ).encode()
    return documents | {INDEX: _index(facts, documents)}


def _index(facts: Facts, documents: Mapping[str, bytes]) -> bytes:
    rows = [
        (f"[{name}]({name})", WHAT.get(name, "a dataset, Croissant 1.1"), f"{len(content):,}", f"`{_sha256(content)}`")
        for name, content in documents.items()
    ]
    parts = [
        f"# Papers of {plain(facts.version.name)} · {facts.version.id}\n",
        f"From records up to {facts.at[:19]} UTC. What no record says is called not recorded.\n",
        table(("paper", "what", "bytes", "sha256"), rows),
    ]
    if facts.missing:
        parts.append(f"Named by a record, but not in this store: {', '.join(facts.missing)}.\n")
    return "\n".join(parts).encode()


def write(folder: Path, documents: Mapping[str, bytes]) -> dict[str, str]:
    """Write the documents to `folder`, creating it; returns file name → sha256. A folder with documents of a different
    version is refused."""
    index = folder / INDEX
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--out {str(folder)!r} is a file", hint="give a folder")
    if index.exists() and index.read_bytes().partition(b"\n")[0] != documents[INDEX].partition(b"\n")[0]:
        raise ConfigError(f"{index} is of a different version: their documents would be mixed", hint="give another folder")
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in documents.items():
        (folder / name).write_bytes(content)
    return {name: _sha256(content) for name, content in documents.items()}


def pack(path: Path, store: Store, facts: Facts, documents: Mapping[str, bytes]) -> str:
    """Write a tar with the documents, their records, events and signatures as in the store, the lines of the audit log about
    them, and instructions for offline verification; returns its sha256. Equal stores give equal bytes."""
    entries = {f"papers/{name}": content for name, content in documents.items()}
    for record in facts.records:
        entries[paths.record(record.kind, record.id)] = store.read(paths.record(record.kind, record.id))
        entries |= {name: store.read(name) for name in store.list(paths.signatures(record.id))}
    for training in facts.trainings:
        lock = paths.environment(training.run.environment_digest)
        if training.run.environment_digest and store.exists(lock):
            entries[lock] = store.read(lock)
    for event in facts.events:
        entries[event_path(event)] = store.read(event_path(event))
    log_lines = [line for line in audit_log.lines(store) if json.loads(line)["path"] in entries]
    if log_lines:
        entries[LINES] = b"".join(line + b"\n" for line in log_lines)
    entries["README.md"] = _readme(facts, entries, audit_log.head(store) if log_lines else "")
    sums = "".join(f"{_sha256(content)}  {name}\n" for name, content in sorted(entries.items()))
    entries[SUMS] = sums.encode()
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in sorted(entries.items()):
            info = tarfile.TarInfo(name)  # without owner and time, so that equal contents give equal bytes
            info.size, info.mode = len(content), 0o644
            archive.addfile(info, io.BytesIO(content))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(buffer.getvalue())
    return _sha256(buffer.getvalue())


def _readme(facts: Facts, entries: Mapping[str, Any], head: str) -> bytes:
    signed = [name for name in entries if name.startswith("signatures/") or name.endswith(".dsse.json")]
    lines = [
        f"# Evidence pack of {plain(facts.version.name)} · {facts.version.id}\n",
        "`papers/` was made from `records/` and `events/`, which are the store's own bytes. Nothing here needs a network.\n",
        "1. Whole and unchanged: `sha256sum -c SHA256SUMS`.",
        "2. The weights: the `sha256` of each file is in `records/models/`; compare with `sha256sum` of yours.",
        "3. The papers: `forge papers` on the store gives them again, byte for byte, while nothing new is on record there.",
    ]
    lines.append(
        f"4. Signatures: {len(signed)} DSSE envelopes; `forge verify FILE --key NAME.pub` for each. Get the keys another"
        " way: a pack cannot vouch for itself."
        if signed
        else "4. Signatures: none on record."
    )
    lines.append(
        f"5. Audit log: `{LINES}` has the lines about what is in here. That the log is whole is shown where it is kept:"
        f" `forge audit verify --head {head}`."
        if head
        else "5. Audit log: none on record."
    )
    return ("\n".join(lines) + "\n").encode()


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
