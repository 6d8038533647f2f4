"""The lineage graph: what a record was derived from and what was derived from it, as a tree, a path or text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from forge_ray.errors import NotFound
from forge_ray.records import DatasetManifest, Record
from forge_ray.store.catalog import Catalog
from forge_ray.store.resolve import resolve

ORDER = ("runs", "datasets", "models", "evals", "deployments", "missing")  # of siblings in a lineage


def tree(catalog: Catalog, record_id: str, towards: str = "origins") -> dict[str, Any]:
    """The lineage of one record as nested nodes: `origins` follows parents, `uses` follows children. A node that occurs
    several times has its branches at its first occurrence only, so that a long chain of versions stays short."""
    follow = catalog.parents if towards == "origins" else catalog.children
    seen: set[str] = set()

    def node(identifier: str) -> dict[str, Any]:
        kind, label = described(catalog, identifier)
        subtree: dict[str, Any] = {"id": identifier, "kind": kind, "label": label, towards: []}
        if identifier not in seen:
            seen.add(identifier)
            near = sorted(follow(identifier), key=lambda one: (ORDER.index(described(catalog, one)[0]), one))
            subtree[towards] = [node(one) for one in near]
        return subtree

    return node(record_id)


def described(catalog: Catalog, identifier: str) -> tuple[str, str]:
    """Kind and label of a node; the kind is `missing` where the store has no record of it."""
    record = catalog.get(identifier) if catalog.has(identifier) else None
    label = "not finished" if record is None and catalog.events("run", identifier) else _label(record)
    return record.kind if record else "missing", label


def walk(catalog: Catalog, start: str, goal: str) -> list[str]:
    """The shortest chain of ids from `start` to `goal`, along edges in either direction; empty if there is none."""
    frontier, came_from = [start], {start: ""}
    while frontier and goal not in came_from:
        reached = []
        for identifier in frontier:
            for near in (*catalog.parents(identifier), *catalog.children(identifier)):
                if near not in came_from:
                    came_from[near] = identifier
                    reached.append(near)
        frontier = reached
    if goal not in came_from:
        return []
    return list(reversed(list(_back(came_from, goal))))


def _back(came_from: dict[str, str], identifier: str) -> Iterator[str]:
    while identifier:
        yield identifier
        identifier = came_from[identifier]


def _label(record: Record | None) -> str:
    if record is None:
        return "not in this store"
    data = record.model_dump()
    match record.prefix:
        case "ds":
            return f"{data['name']}: {sum(s['num_records'] for s in data['splits'].values())} records"
        case "run":
            return f"{data['name']}: {data['method']}, {data['num_steps']} steps, {data['samples_seen']} samples"
        case "ev":
            scores = ", ".join(f"{key} {value:.3g}" for key, value in list(data["metrics"].items())[:3])
            checkpoint = f"checkpoint of step {data['step']}: " if data["step"] else ""
            asked = f"{data['subject']} on " if data["endpoint"] else ""
            return f"{checkpoint}{asked}{data['split']} of {data['dataset']}: {scores}"
        case "er":
            return f"{data['num_records']} records by {data['asked_by']}: {data['why'] or 'no reason given'}"
        case "mv":
            step = f", step {data['step']}" if data["step"] else ""
            return f"{data['name']} ({data['status']}, {data['weights']}{step})"
        case _:
            return f"{data['name']} → {data['model']}"


def lineage(catalog: Catalog, text: str, num_rows: int) -> dict[str, Any]:
    """Origins (down to the first `num_rows` rows of each dataset) and uses of a record; for a `rec_…` id, its uses."""
    if text.startswith("rec_"):
        return _of_record(catalog, text)
    identifier = resolve(catalog, text)
    origins = tree(catalog, identifier, "origins")
    _add_rows(catalog, origins, num_rows)
    uses = tree(catalog, identifier, "uses")
    return origins | {"uses": uses["uses"]}


def _add_rows(catalog: Catalog, node: dict[str, Any], num_rows: int) -> None:
    """Add the first rows of each dataset to its node, with source file and line."""
    from forge_ray.data.dataset.version import first_records

    if node["kind"] == "datasets":
        manifest = catalog.get_as(DatasetManifest, node["id"])
        node["sources"] = [source.model_dump() for source in manifest.sources]
        node["rows"] = first_records(catalog.store, manifest, "train", num_rows)
        node["num_rows"] = manifest.splits["train"].num_records
    for below in node["origins"]:
        _add_rows(catalog, below, num_rows)


def _of_record(catalog: Catalog, record: str) -> dict[str, Any]:
    from forge_ray.data.dataset.version import find_record

    trees: list[dict[str, Any]] = []
    row: dict[str, Any] = {}
    for manifest in catalog.all(DatasetManifest):
        try:
            row = find_record(catalog.store, manifest, record)
        except NotFound:
            continue
        trees.append(tree(catalog, manifest.id, "uses") | {"split": row["split"]})
    if not trees:
        raise NotFound(f"{record} is in no dataset of this store", hint="`forge data show ds_…` prints record ids")
    return {"id": record, "label": f"{row['file']}:{row['line']}", "row": row, "uses": trees}


def path(catalog: Catalog, start: str, goal: str) -> list[str]:
    """The chain of ids that connects two records; raises `NotFound` if there is none."""
    chain = walk(catalog, resolve(catalog, start), resolve(catalog, goal))
    if not chain:
        raise NotFound(f"{start} and {goal} are not connected", hint="`forge lineage` on each shows what they came from")
    return chain


WORDS = {"evals": "judged by", "runs": "trained by", "datasets": "from rows", "models": "from model"}


def draw(value: dict[str, Any]) -> list[str]:
    """The tree as lines of text; a node that was drawn before is marked with ↑ and not drawn again."""
    lines = [f"{value['id']}  {value['label']}"]
    if value.get("row"):
        lines.append(f"│  {_excerpt(value['row']['content'])}")
    drawn: set[str] = set()
    branches = [("", node) for node in _ordered(value.get("origins", []))]
    branches += [("used by", node) for node in _ordered(value.get("uses", []))]
    lines += _rows(value, "", is_last=not branches)
    for number, (word, node) in enumerate(branches):
        lines += _branch(node, word, "", number == len(branches) - 1, drawn)
    return lines


def _ordered(nodes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(nodes, key=lambda node: (ORDER.index(node["kind"]), node["id"]))


def _branch(node: dict[str, Any], word: str, indent: str, is_last: bool, drawn: set[str]) -> list[str]:
    seen = node["id"] in drawn
    drawn.add(node["id"])
    split = f"  [{node['split']}]" if "split" in node else ""
    head = f"{indent}{'└─' if is_last else '├─'} {word or WORDS.get(node['kind'], 'from')} {node['id']}"
    if seen:
        return [f"{head}  ↑"]
    lines = [f"{head}  {node['label']}{split}"]
    inner = indent + ("   " if is_last else "│  ")
    below = _ordered(node.get("origins", []) + node.get("uses", []))
    lines += _rows(node, inner, is_last=not below)
    for number, child in enumerate(below):
        lines += _branch(child, word, inner, number == len(below) - 1, drawn)
    return lines


def _rows(node: dict[str, Any], indent: str, is_last: bool) -> list[str]:
    rows = node.get("rows", [])
    lines = [f"{indent}├─ {row['record']}  {row['file']}:{row['line']}  {_excerpt(row['content'])}" for row in rows]
    if rows:
        lines.append(f"{indent}{'└─' if is_last else '├─'} … {node['num_rows']} training rows in all")
    return lines


def _excerpt(content: dict[str, Any], width: int = 90) -> str:
    """A row as one line: the last question and its answer."""
    if "text" in content:
        text = content["text"]
    else:
        spoken = [m for m in content["messages"] if m["role"] in ("user", "assistant")]
        text = " → ".join(str(message.get("content", "")) for message in spoken[-2:])
    text = " ".join(text.split())
    return f"“{text[: width - 1]}…”" if len(text) > width else f"“{text}”"
