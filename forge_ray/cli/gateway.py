"""`forge gateway`: one address in front of endpoints, which retries requests on failed replicas."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from forge_ray.cli.terminal import echo
from forge_ray.cli.verbs import verb

if TYPE_CHECKING:
    from collections.abc import Callable

    from forge_ray.serve.gateway_config import GatewayConfig
    from forge_ray.store.files import Store


@click.group()
def top() -> None:
    """Top-level verbs; `forge` registers them."""


@verb(top, "gateway", "forge gateway --to http://127.0.0.1:8000 --port 8080")
@click.option(
    "--to",
    multiple=True,
    required=True,
    metavar="URL",
    help="URL of an endpoint. Repeatable; if one fails, the next is tried.",
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=8080, show_default=True, help="Port to listen on; 0: a free one.")
@click.option("--tls-cert", default="", metavar="FILE", help="TLS certificate with its chain, PEM.")
@click.option("--tls-key", default="", metavar="FILE", help="TLS private key, PEM.")
@click.option("--tries", default=20, show_default=True, help="Attempts per request, including the first.")
@click.option("--retry-s", default=30.0, show_default=True, help="Stop retrying this many seconds after the first failure.")
@click.option("--max-body-bytes", default=16 << 20, show_default=True, help="Answer larger requests with 413.")
@click.option(
    "--max-held-bytes", default=512 << 20, show_default=True, help="Bytes of bodies held at once; a quarter for one caller."
)
@click.option("--max-connections", default=2048, show_default=True, help="Client connections at once.")
@click.option(
    "--max-connections-per-address", default=512, show_default=True, help="Those of one address; raise it behind a proxy."
)
@click.option("--drain-s", default=300.0, show_default=True, help="Seconds for running requests to finish after SIGTERM.")
def gateway(store: Store, as_json: bool, to: tuple[str, ...], **settings: Any) -> Any:
    """Run a reverse proxy that retries requests when replicas fail.

    It runs until SIGTERM or Ctrl-C."""
    import json

    from forge_ray.serve.gateway_config import GatewayConfig

    def announce(url: str) -> None:
        if as_json:
            echo(json.dumps({"url": url, "to": list(to)}))

    run_gateway(GatewayConfig(to=to, **settings), announce)
    sys.exit(0)


def run_gateway(config: GatewayConfig, announce: Callable[[str], None] = lambda url: None) -> None:
    """Run the gateway until SIGINT or SIGTERM, then let running requests finish; `announce` receives its URL."""
    import asyncio
    import logging

    from forge_ray.serve.gateway import run

    logging.basicConfig(stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s")

    def listens(url: str) -> None:
        echo(f"{url} → {', '.join(config.to)} until Ctrl-C", err=True)
        announce(url)

    asyncio.run(run(config, listens))


GATEWAY: tuple[click.Command, ...] = (top.commands["gateway"],)
