"""What `forge models check` and `forge models import` print of a chat template."""

from __future__ import annotations

from typing import TYPE_CHECKING

from forge_ray.cli.terminal import echo
from forge_ray.data.tokens.lost import AS_TEXT
from forge_ray.errors import ConfigError
from forge_ray.store.home import expanded

if TYPE_CHECKING:
    from forge_ray.data.tokens.support import Support
    from forge_ray.records import ModelVersion
    from forge_ray.store.files import Store


def support_of_model(store: Store, reference: str) -> Support:
    """Of a folder, or of a version of the store. Raises `ConfigError` where there is no chat template."""
    from forge_ray.data.tokens.chat import load_tokenizer_dir
    from forge_ray.data.tokens.support import support_of
    from forge_ray.data.tokens.text_tools import Tools, tools_of
    from forge_ray.models.model_files import refuse_unsafe
    from forge_ray.models.sandbox import refuse_bombs
    from forge_ray.store import paths
    from forge_ray.store.catalog import Catalog

    folder = expanded(reference)
    tools: Tools = "template"
    if folder.is_dir():
        refuse_unsafe(folder)
        refuse_bombs(folder)
    else:
        with Catalog.read_only(store) as catalog:
            version = catalog.model(reference)
            base = version if version.weights == "full" else catalog.model(version.base_model)
        folder = store.fetch_dir(paths.model(base.id), files=base.files)
        if base is not version:
            tools = tools_of(store.fetch_dir(paths.model(version.id), files=version.files))
    tokenizer = load_tokenizer_dir(folder, tools=tools)
    if not tokenizer.has_chat:
        raise ConfigError(
            f"{reference} has no chat template", hint="it learns and continues plain texts; chats need a template of its own"
        )
    return support_of(tokenizer)


def without_tools(support: Support) -> bool:
    """Whether the template lacks a place for some part of a conversation with tools."""
    return any("tool" in name or "call" in name for name in support.reasons)


def print_lines(support: Support) -> None:
    for name in support.supported:
        count = support.documents[name]
        echo(f"  {name:20} yes" + (f", as {count} documents, one per answer" if count > 1 else ""))
    for name, reason in support.reasons.items():
        echo(f"  {name:20} no: {reason}")
    echo(f"ends of a turn: {', '.join(map(repr, support.ends))}")
    echo(f"tool calls: {support.call_style or 'none that serving could read'}")
    if without_tools(support):
        echo(AS_TEXT)
    if support.rendered:
        echo("a conversation, what is trained in ⟦ ⟧:")
        echo(support.rendered)


def print_support(store: Store, version: ModelVersion) -> None:
    """After an import, one line of what would be lost."""
    try:
        support = support_of_model(store, version.id)
    except ConfigError as error:
        echo(f"chat: {error.message}", err=True)
        return
    if support.reasons:
        echo(f"its template has no place for: {', '.join(support.reasons)} (`forge models check {version.id}`)", err=True)
    if without_tools(support):
        echo(AS_TEXT, err=True)
