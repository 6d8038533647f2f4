"""YAML → values, with bounds on size, nesting, aliases and numbers; and values in an error, cut where they are long."""

from __future__ import annotations

import re
from typing import Any

import yaml

MAX_BYTES = 1 << 20
MAX_ALIASES = 32
MAX_VALUES = 100_000  # with each alias as what it stands for
MAX_DEPTH = 64
MAX_DIGITS = 400  # no setting needs more; of floats the largest has 309
LONGEST = 200  # characters of a value in an error
MOST = 20  # items of a value in an error

# As YAML 1.2 has them: in YAML 1.1 also 59:59 is a number, to the base of sixty
INTEGER = re.compile(r"^(?:[-+]?0b[0-1_]+|[-+]?0[0-7_]+|[-+]?(?:0|[1-9][0-9_]*)|[-+]?0x[0-9a-fA-F_]+)$")
FLOAT = re.compile(
    r"^(?:[-+]?(?:[0-9][0-9_]*)\.[0-9_]*(?:[eE][-+][0-9]+)?|\.[0-9][0-9_]*(?:[eE][-+][0-9]+)?"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)
SIXTIES = {"tag:yaml.org,2002:int": INTEGER, "tag:yaml.org,2002:float": FLOAT}


def read_yaml(text: str) -> Any:
    """The value of one YAML document; raises `ValueError` with the reason."""
    if len(text) > MAX_BYTES:
        raise ValueError(f"more than {MAX_BYTES >> 20} MiB")
    try:
        loader = _Loader(text)  # which refuses characters that YAML has not
    except yaml.YAMLError as error:
        raise ValueError(cut(str(error), 600)) from None
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _check_extent(node)
        return loader.construct_document(node)
    except RecursionError:
        raise ValueError(f"nested more than {MAX_DEPTH} deep") from None
    except yaml.YAMLError as error:
        raise ValueError(cut(str(error), 600)) from None
    except (ValueError, TypeError, AttributeError, OverflowError, KeyError) as error:  # a date of month 13, !!int of a word
        raise ValueError(f"a value cannot be read: {cut(str(error))}") from None
    finally:
        loader.dispose()


class _Loader(yaml.SafeLoader):
    """Refuses a key that occurs twice in a section, where PyYAML would silently use the last one, and more than MAX_ALIASES
    aliases."""

    num_aliases = 0
    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.depth > MAX_DEPTH:
            raise ValueError(f"nested more than {MAX_DEPTH} deep")
        self.depth += 1
        if self.check_event(yaml.AliasEvent):
            self.num_aliases += 1
            if self.num_aliases > MAX_ALIASES:
                mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
                raise yaml.composer.ComposerError(None, None, f"more than {MAX_ALIASES} aliases", mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key is a list or a section", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{cut(key.value)!r} is written twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    letter: [(tag, SIXTIES.get(tag, pattern)) for tag, pattern in resolvers]
    for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _check_extent(root: yaml.Node) -> None:
    """Raise `ValueError` where nested aliases stand for too many values, an alias for itself, or a number for too many
    digits."""
    sizes: dict[int, int] = {}
    open_nodes: set[int] = set()

    def size(node: yaml.Node, depth: int) -> int:
        if id(node) in open_nodes:
            raise ValueError("an alias stands for what it is a part of")
        if depth > MAX_DEPTH:
            raise ValueError(f"nested more than {MAX_DEPTH} deep")
        if isinstance(node, yaml.ScalarNode):
            if node.tag in SIXTIES and len(node.value) > MAX_DIGITS:
                raise ValueError(f"line {node.start_mark.line + 1}: a number of {len(node.value)} digits")
            return 1
        if id(node) not in sizes:
            open_nodes.add(id(node))
            parts = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
            sizes[id(node)] = 1 + sum(size(part, depth + 1) for part in parts)
            open_nodes.remove(id(node))
        if sizes[id(node)] > MAX_VALUES:
            raise ValueError(f"more than {MAX_VALUES:,} values, with each alias as what it stands for")
        return sizes[id(node)]

    size(root, 0)


def cut(text: str, longest: int = LONGEST) -> str:
    """The beginning of a long text."""
    return text if len(text) <= longest else f"{text[:longest]}… ({len(text):,} characters)"


def brief(value: Any) -> str:
    """`repr` of a value, of which a long one is cut; one that aliases make large is never written out."""
    budget = MOST

    def written(item: Any, depth: int) -> str:
        nonlocal budget
        if isinstance(item, str):
            return repr(item) if len(item) <= LONGEST else f"{item[:LONGEST]!r}… ({len(item):,} characters)"
        if not isinstance(item, dict | list | tuple) or not item:
            return cut(repr(item))
        if depth > 3:
            return "…"
        parts = []
        for part in item.items() if isinstance(item, dict) else item:
            if budget <= 0:
                parts.append("…")
                break
            budget -= 1
            if isinstance(item, dict):
                parts.append(f"{written(part[0], depth + 1)}: {written(part[1], depth + 1)}")
            else:
                parts.append(written(part, depth + 1))
        inside = ", ".join(parts)
        if isinstance(item, dict):
            return f"{{{inside}}}"
        return f"[{inside}]" if isinstance(item, list) else f"({inside}{',' if len(item) == 1 else ''})"

    return written(value, 0)
