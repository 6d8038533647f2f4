"""The lineage graph as SVG and as a self-contained HTML page.

A layered drawing (Sugiyama, Tagawa, Toda 1981): a node's column is the length of the longest path from an origin; an edge
over several columns has a bend in each; inside a column nodes are ordered by the mean position of their neighbours.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from html import escape
from itertools import pairwise
from typing import Any

from forge_ray.governance.lineage import described
from forge_ray.records import ModelVersion
from forge_ray.store.catalog import Catalog
from forge_ray.store.endpoint_state import state_of

BOX_W, BOX_H, GAP_X, GAP_Y, BEND_H, MARGIN = 264, 64, 72, 18, 10, 24
CHARS = 36  # of a monospaced font of 11 pixels, 6.6 wide, that fit into a box
SWEEPS = 8
COLOURS = {
    "datasets": "#2563eb",
    "runs": "#d97706",
    "models": "#059669",
    "evals": "#7c3aed",
    "deployments": "#dc2626",
    "record": "#0f172a",
    "missing": "#64748b",
}
WORDS = {"datasets": "dataset", "runs": "run", "models": "version", "evals": "report", "deployments": "deployment"}


@dataclass(frozen=True)
class Node:
    id: str
    kind: str
    label: str
    status: str


@dataclass
class Graph:
    """A lineage graph. `edges` go from parent to child; `focus` is the id that was asked about."""

    focus: str
    nodes: dict[str, Node] = field(default_factory=dict)
    edges: set[tuple[str, str]] = field(default_factory=set)


def graph_of(catalog: Catalog, tree: dict[str, Any]) -> Graph:
    """The graph of everything that `tree` (of `lineage.lineage`) was derived from and everything derived from it."""
    graph = Graph(tree["id"])
    pointing: dict[str, list[str]] = {}
    for alias, version in sorted(catalog.aliases().items()):
        pointing.setdefault(version, []).append(f"alias {alias}")
    archived = catalog.archived()

    def add(identifier: str, *status: str) -> None:
        kind, label = described(catalog, identifier)
        if kind == "models":
            status = (*status, catalog.get_as(ModelVersion, identifier).status)
        if kind == "deployments":
            status = (*status, *filter(None, [state_of(catalog, identifier).state]))
        else:
            status = (*status, *(str(event.data["state"]) for event in catalog.events("run", identifier)[-1:]))
        status = (*status, *pointing.get(identifier, ()))
        status = (*status, "archived") if identifier in archived else status
        graph.nodes[identifier] = Node(identifier, kind, label, " · ".join(status))

    def follow(start: str, upwards: bool) -> None:
        waiting = [start]
        while waiting:
            identifier = waiting.pop()
            for near in catalog.parents(identifier) if upwards else catalog.children(identifier):
                graph.edges.add((near, identifier) if upwards else (identifier, near))
                if near not in graph.nodes:
                    add(near)
                    waiting.append(near)

    if "row" in tree:
        graph.nodes[tree["id"]] = Node(tree["id"], "record", tree["label"], "")
        for dataset in tree["uses"]:
            graph.edges.add((tree["id"], dataset["id"]))
            add(dataset["id"], f"in {dataset['split']}")
            follow(dataset["id"], upwards=False)
        return graph
    add(tree["id"])
    follow(tree["id"], upwards=True)
    follow(tree["id"], upwards=False)
    return graph


# ---------------------------------------------------------------- layout


def columns(graph: Graph) -> list[list[str]]:
    """Ids per column, in drawing order, including the bends of long edges as `parent>child>column`."""
    level = _levels(graph)
    placed: list[list[str]] = [[] for _ in range(max(level.values()) + 1)]
    near: dict[str, list[str]] = {}
    for identifier in sorted(graph.nodes, key=lambda name: (graph.nodes[name].kind, name)):
        placed[level[identifier]].append(identifier)
    for parent, child in sorted(graph.edges):
        way = way_of(parent, child, level)
        for number, bend in enumerate(way[1:-1], start=level[parent] + 1):
            placed[number].append(bend)
        for left, right in pairwise(way):
            near.setdefault(left, []).append(right)
            near.setdefault(right, []).append(left)
    for sweep in range(SWEEPS):
        order = range(1, len(placed)) if sweep % 2 == 0 else range(len(placed) - 2, -1, -1)
        for number in order:
            other = placed[number - 1 if sweep % 2 == 0 else number + 1]
            where = {name: place / max(1, len(other) - 1) for place, name in enumerate(other)}
            own = {name: place / max(1, len(placed[number]) - 1) for place, name in enumerate(placed[number])}

            def middle(name: str, where: dict[str, float] = where, own: dict[str, float] = own) -> float:
                joined = [where[other] for other in near.get(name, ()) if other in where]
                return sum(joined) / len(joined) if joined else own[name]

            placed[number].sort(key=middle)
    return placed


def way_of(parent: str, child: str, level: dict[str, int]) -> list[str]:
    """The nodes of an edge: parent, a bend in each column between, child."""
    between = range(level[parent] + 1, level[child])
    return [parent, *(f"{parent}>{child}>{number}" for number in between), child]


def _levels(graph: Graph) -> dict[str, int]:
    """Length of the longest path to each node from one without origins. There are no cycles, because ids are hashes."""
    level = dict.fromkeys(graph.nodes, 0)
    for _ in graph.nodes:
        for parent, child in graph.edges:
            level[child] = max(level[child], level[parent] + 1)
    return level


def places(graph: Graph) -> tuple[dict[str, tuple[float, float]], float, float]:
    """(x, y) of the upper left corner of each box and bend; width and height of the drawing."""
    stacks = columns(graph)
    heights = [sum(_height(graph, name) + GAP_Y for name in stack) - GAP_Y for stack in stacks]
    tallest = max(heights)
    positions: dict[str, tuple[float, float]] = {}
    for number, (stack, height) in enumerate(zip(stacks, heights, strict=True)):
        y = MARGIN + (tallest - height) / 2
        for name in stack:
            positions[name] = (MARGIN + number * (BOX_W + GAP_X), y)
            y += _height(graph, name) + GAP_Y
    return positions, 2 * MARGIN + len(stacks) * (BOX_W + GAP_X) - GAP_X, 2 * MARGIN + tallest


def _height(graph: Graph, name: str) -> int:
    return BOX_H if name in graph.nodes else BEND_H


# ---------------------------------------------------------------- drawing


def svg(graph: Graph) -> str:
    """The graph as SVG; texts are cut to the width of their box."""
    positions, width, height = places(graph)
    level = _levels(graph)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}"'
        f' viewBox="0 0 {width:.0f} {height:.0f}" font-family="ui-monospace, DejaVu Sans Mono, Menlo, monospace"'
        ' font-size="11">',
        f'<rect width="{width:.0f}" height="{height:.0f}" fill="#ffffff"/>',
    ]
    for parent, child in sorted(graph.edges):
        lines.append(f'<path d="{_path(graph, way_of(parent, child, level), positions)}" fill="none" stroke="#94a3b8"/>')
    for node in graph.nodes.values():
        lines += _box(node, *positions[node.id], node.id == graph.focus)
    return "\n".join([*lines, "</svg>", ""])


def _path(graph: Graph, way: list[str], positions: dict[str, tuple[float, float]]) -> str:
    d = ""
    for left, right in pairwise(way):
        x1, y1 = positions[left][0] + BOX_W, positions[left][1] + _height(graph, left) / 2
        x2, y2 = positions[right][0], positions[right][1] + _height(graph, right) / 2
        d += f"M{x1:.1f} {y1:.1f}" if not d else f"L{x1:.1f} {y1:.1f}"
        half = (x2 - x1) / 2
        d += f"C{x1 + half:.1f} {y1:.1f} {x2 - half:.1f} {y2:.1f} {x2:.1f} {y2:.1f}"
    return d


def _box(node: Node, x: float, y: float, focus: bool) -> Iterator[str]:
    colour = COLOURS.get(node.kind, COLOURS["missing"])
    full = escape(" — ".join(part for part in (node.id, node.label, node.status) if part))
    yield f"<g><title>{full}</title>"
    yield (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{BOX_W}" height="{BOX_H}" rx="5" fill="{"#fef9c3" if focus else "#f8fafc"}"'
        f' stroke="{colour}" stroke-width="{2.5 if focus else 1}"/>'
    )
    word = WORDS.get(node.kind, node.kind)
    id_width = CHARS - len(word) - 2
    rows = ((node.id, "#0f172a", id_width), (node.label, "#334155", CHARS), (node.status, colour, CHARS))
    for number, (text, ink, width) in enumerate(rows):
        if text:
            weight = ' font-weight="bold"' if number == 0 else ""
            at = f'x="{x + 12:.1f}" y="{y + 19 + 18 * number:.1f}"'
            yield f'<text {at} fill="{ink}"{weight}>{escape(cut(text, width))}</text>'
    yield f'<text x="{x + BOX_W - 12:.1f}" y="{y + 19:.1f}" fill="{colour}" text-anchor="end">{escape(word)}</text></g>'


def cut(text: str, limit: int) -> str:
    """The text cut to at most `limit` columns of a monospaced font; wide letters take two."""
    text = "".join(letter if letter.isprintable() else " " for letter in text)
    widths = [2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in text]
    if sum(widths) <= limit:
        return text
    used = 0
    for number, width in enumerate(widths):
        if used + width > limit - 1:
            return text[:number] + "…"
        used += width
    return text


def page(graph: Graph) -> str:
    """An HTML page with the drawing and a table of all nodes; it has no scripts and loads nothing."""
    rows = "\n".join(
        f"<tr><td>{escape(WORDS.get(node.kind, node.kind))}</td><td><code>{escape(node.id)}</code></td>"
        f"<td>{escape(node.label)}</td><td>{escape(node.status)}</td></tr>"
        for node in sorted(graph.nodes.values(), key=lambda node: (node.kind, node.id))
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Lineage of {escape(graph.focus)}</title>
<style>body{{font:14px system-ui,sans-serif;margin:2em;color:#0f172a}}.graph{{overflow-x:auto;border:1px solid #e2e8f0}}
table{{border-collapse:collapse;margin-top:1.5em}}td,th{{text-align:left;padding:.3em .8em;border-bottom:1px solid #e2e8f0}}
</style></head><body>
<h1>Lineage of <code>{escape(graph.focus)}</code></h1>
<p>To the left of a box is what it was derived from, to the right what was derived from it.</p>
<div class="graph">
{svg(graph)}</div>
<table><tr><th>kind</th><th>id</th><th>what it is</th><th>status</th></tr>
{rows}
</table></body></html>
"""
