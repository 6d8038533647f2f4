"""A small HTTP server in a thread that answers as a test says, and keeps what it was asked: a proxy, or Ray's dashboard."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Reply = tuple[int, dict[str, str], bytes]


@dataclass
class Scripted:
    """Where the server listens, and the requests that it got: method and path, or the whole URL where it is a proxy."""

    url: str
    requests: list[str] = field(default_factory=list)


@contextmanager
def scripted(answer: Callable[[str, str], Reply]) -> Iterator[Scripted]:
    class Handler(BaseHTTPRequestHandler):
        def reply(self) -> None:
            self.rfile.read(int(self.headers.get("content-length", "0")))
            server.requests.append(f"{self.command} {self.path}")
            status, headers, body = answer(self.command, self.path)
            self.send_response_only(status)
            for name, value in {**headers, "content-length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = do_PUT = do_CONNECT = reply

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listener:
        server = Scripted(f"http://127.0.0.1:{listener.server_port}")
        threading.Thread(target=listener.serve_forever, daemon=True).start()
        yield server
        listener.shutdown()


def corporate_proxy(method: str, path: str) -> Reply:
    """A proxy that cannot reach what it is asked for."""
    headers = {"content-type": "text/html;charset=utf-8", "server": "squid/6.1", "via": "1.1 proxy.corp (squid/6.1)"}
    return 503, headers, b"<html><head><title>ERROR: The requested URL could not be retrieved</title></head></html>"


def as_json(value: object, status: int = 200) -> Reply:
    return status, {"content-type": "application/json"}, json.dumps(value).encode()
