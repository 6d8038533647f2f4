"""Rows of a `.json` file: elements of a list, one object, or lines after all; a list is never in memory whole."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import chain

from forge_ray.data.read.lines import Damaged, HeldBytes, Raw, lines

BOM = b"\xef\xbb\xbf"
STRING = rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|"'  # a whole one, or the start of one that goes on in the next block
OWN_LEVEL, DEEPER = re.compile(rb"[\[\]{},]|" + STRING, re.S), re.compile(rb"[\[\]{}]|" + STRING, re.S)
INSIDE = re.compile(rb'["\\]')


def read_json(source: Iterator[bytes], limit: int) -> Iterator[Raw]:
    """The bytes of each row of the file's blocks, for the same parser that reads JSONL; `line` counts rows, but in lines."""
    try:
        first = next(source, b"")
    except Damaged as kind:
        yield Raw(1, 0, None, None, "", f"the {kind} stream is damaged or cut off here")
        return
    body = first.removeprefix(BOM).lstrip()
    skipped = len(first) - len(body)
    whole = chain([body], source)
    if body.startswith(b"["):
        yield from _elements(whole, skipped, limit)
    elif _is_lines(body):  # JSONL is often named so
        yield from lines(whole, first[:skipped].count(b"\n") + 1, skipped, limit)
    else:
        held = HeldBytes(limit)
        try:
            for block in whole:
                held.add(block)
        except Damaged as kind:
            yield Raw(1, skipped, None, None, "", f"the {kind} stream is damaged or cut off here")
            return
        if held.size:
            yield held.take(1, skipped)


def _is_lines(body: bytes) -> bool:
    first, newline, _ = body.partition(b"\n")
    try:
        return bool(newline) and isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):
        return False


def _elements(source: Iterator[bytes], position: int, limit: int) -> Iterator[Raw]:
    """Cuts a list at the commas of its own level. Brackets decide, so an unbalanced element takes the rest with it."""
    held = HeldBytes(limit)
    depth, number, start = 0, 1, position
    in_string = escaped = closed = False
    try:
        for block in source:
            at = begin = 0
            if escaped:
                at, escaped = 1, False
            while True:
                token = (INSIDE if in_string else DEEPER if depth > 1 else OWN_LEVEL).search(block, at)
                if token is None:
                    break
                at, mark = token.end(), block[token.start() : token.start() + 1]
                if in_string:
                    if mark == b'"':
                        in_string = False
                    elif at == len(block):
                        escaped = True
                    else:
                        at += 1
                elif closed:
                    continue
                elif mark == b'"':
                    in_string = at - token.start() == 1
                elif depth == 0:  # the list itself opens
                    depth, begin, start = 1, at, position + at
                elif mark in b"[{":
                    depth += 1
                elif depth > 1:
                    depth -= mark in b"]}"
                elif mark in b",]":
                    held.add(block[begin : at - 1])
                    size = held.size
                    row = _stripped(held, number, start)
                    if row is not None:
                        yield row
                        number += 1
                    begin, start, closed = at, start + size + 1, mark == b"]"
            held.add(block[begin:])
            position += len(block)
    except Damaged as kind:
        yield Raw(number, start, None, None, "", f"the {kind} stream is damaged or cut off here")
        return
    rest = _stripped(held, number, start)
    if not closed:
        yield Raw(
            number, start if rest is None else rest.offset, None, None, rest.sha256 if rest else "", "the list does not end"
        )
    elif rest is not None:
        yield Raw(number, rest.offset, None, None, rest.sha256, "there is more behind the end of the list")


def _stripped(held: HeldBytes, number: int, start: int) -> Raw | None:
    """The element without the white space around it; None for white space alone."""
    if held.hasher is None:
        raw = b"".join(held.parts)
        left = raw.lstrip()
        start += len(raw) - len(left)
        held.parts = [left.rstrip()]
        if not left:
            held.size = 0
            return None
    return held.take(number, start)
