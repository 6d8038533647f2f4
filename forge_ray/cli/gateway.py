"""`forge gateway`: one address in front of endpoints, which loses no request."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from forge_ray.cli.verbs import verb

if TYPE_CHECKING:
    from forge_ray.store.files import Store


@click.group()
def top() -> None:
    """Holds the verb that `forge` itself takes."""


@verb(top, "gateway")
@click.option("--to", multiple=True, required=True, metavar="URL", help="An endpoint; several: the next one is tried.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Where to listen.")
@click.option("--port", default=8080, show_default=True, help="0: a free one.")
@click.option("--tls-cert", default="", metavar="FILE", help="PEM, with its chain.")
@click.option("--tls-key", default="", metavar="FILE", help="PEM.")
@click.option("--tries", default=20, show_default=True, help="Of one request, the first included.")
@click.option("--retry-s", default=30.0, show_default=True, help="No new try so long after a request's first failure.")
@click.option("--max-body-bytes", default=16 << 20, show_default=True, help="A larger request is answered 413.")
@click.option("--drain-s", default=300.0, show_default=True, help="For what runs at SIGTERM.")
def gateway(store: Store, as_json: bool, to: tuple[str, ...], **settings: Any) -> Any:
    """A reverse proxy that sends a request again when its replica died; until SIGTERM or Ctrl-C."""
    import asyncio
    import json
    import logging

    from forge_ray.serve.gateway import GatewayConfig, run

    config = GatewayConfig(to=to, **settings)
    logging.basicConfig(stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s")

    def announce(url: str) -> None:
        click.echo(f"{url} → {', '.join(to)} until Ctrl-C", err=True)
        if as_json:
            click.echo(json.dumps({"url": url, "to": list(to)}))

    asyncio.run(run(config, announce))
    sys.exit(0)


GATEWAY: tuple[click.Command, ...] = (top.commands["gateway"],)
