"""Whether a chat template can write a character or a word that its messages do not have.

Most templates copy, cut and join what they are given. One that decodes (`striptags` turns `&lt;` into `<`), formats or
substitutes can write a special token of which a message holds no character. Only what is known not to do so is excepted.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache

from jinja2 import Environment, TemplateSyntaxError, nodes

GENERATION = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")  # a tag of transformers, around the answers
HARMLESS = re.compile(r"[A-Za-z0-9\s.,:;'\"\\-]*")  # what may be put between or in the place of parts of a message
SUBSTITUTING = frozenset({"replace", "join"})
FILTERS = frozenset(
    {
        *("abs", "batch", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float", "groupby"),
        *("indent", "int", "items", "last", "length", "list", "lower", "map", "max", "min", "reject", "rejectattr"),
        *("reverse", "round", "safe", "select", "selectattr", "slice", "sort", "string", "sum", "title", "tojson", "trim"),
        *("unique", "upper", "wordcount"),
    }
)
METHODS = frozenset(
    {
        *("append", "capitalize", "count", "endswith", "extend", "find", "get", "index", "insert", "isalnum", "isalpha"),
        *("isdigit", "items", "keys", "lower", "lstrip", "partition", "pop", "removeprefix", "removesuffix", "rfind"),
        *("rpartition", "rsplit", "rstrip", "split", "splitlines", "startswith", "strip", "title", "update", "upper"),
        "values",
    }
)
FUNCTIONS = frozenset({"dict", "namespace", "raise_exception", "range", "strftime_now"})


@lru_cache(maxsize=64)
def writes_others(template: str) -> bool:
    """Whether anything in the template is not known to leave the characters of messages as they are; also where it cannot be
    parsed."""
    environment = Environment(extensions=["jinja2.ext.loopcontrols"], autoescape=False)  # nothing is rendered here
    try:
        tree = environment.parse(GENERATION.sub("", template))
    except TemplateSyntaxError:
        return True
    macros = {macro.name for macro in tree.find_all(nodes.Macro)}
    return any(_unknown(tree, FUNCTIONS | macros))


def _unknown(tree: nodes.Template, functions: frozenset[str]) -> Iterator[bool]:
    for node in tree.find_all(nodes.Filter):
        if node.name == "map" and node.args:  # the name of another filter, and its arguments
            first, *rest = node.args
            name = str(first.value) if isinstance(first, nodes.Const) else ""
            yield not _leaves_characters(name, FILTERS - {"map"}, rest)
        else:
            yield not _leaves_characters(node.name, FILTERS, node.args)
    for call in tree.find_all(nodes.Call):
        if isinstance(call.node, nodes.Getattr):
            yield not _leaves_characters(call.node.attr, METHODS, call.args)
        else:
            yield not (isinstance(call.node, nodes.Name) and call.node.name in functions)
    for mod in tree.find_all(nodes.Mod):  # also of strings, which it formats
        yield isinstance(mod.left, nodes.Const) and isinstance(mod.left.value, str)


def _leaves_characters(name: str, names: frozenset[str], arguments: list[nodes.Expr]) -> bool:
    if name not in SUBSTITUTING:
        return name in names
    written = arguments[-1:] if name == "join" else arguments[1:2]
    return all(isinstance(part, nodes.Const) and HARMLESS.fullmatch(str(part.value)) for part in written)
