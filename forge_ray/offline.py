"""What keeps everything on the premises (level 0): switches that are set before ray or transformers is imported.

`RAY_USAGE_STATS_ENABLED=0` alone still posts a report that usage is disabled; the address that goes nowhere stops that too.
No switch stops Ray's question to the cloud metadata addresses (169.254.169.254, metadata.google.internal), which its process
for usage reports asks before it looks at any switch: a local cluster is started without that process
(`without_usage_reports`), and for `ray start` the file `~/ray_bootstrap_config.yaml` answers in the addresses' place.
"""

from __future__ import annotations

import os
from typing import Any

SWITCHES = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_USAGE_STATS_REPORT_URL": "http://127.0.0.1:9/",
    "RAY_DATA_USAGE_DISABLED": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def set_offline_switches() -> None:
    """What the operator has set stays."""
    for name, value in SWITCHES.items():
        os.environ.setdefault(name, value)


def without_usage_reports() -> None:
    """The next local cluster of this process has no process for usage reports. Without its dashboard Ray 2.60 starts the
    dashboard's process for these reports alone, so nothing else is lost."""
    from ray._private.node import Node

    start = Node.start_api_server
    if getattr(start, "asks_nobody", False):
        return

    def start_api_server(self: Any, *, include_dashboard: bool | None, raise_on_failure: bool) -> None:
        if include_dashboard is not False:
            start(self, include_dashboard=include_dashboard, raise_on_failure=raise_on_failure)

    start_api_server.asks_nobody = True  # type: ignore[attr-defined]
    setattr(Node, "start_api_server", start_api_server)  # noqa: B010 (mypy forbids the plain assignment to a method)
