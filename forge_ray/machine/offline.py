"""What keeps everything on the premises: switches that are set before ray or transformers is imported.

`RAY_USAGE_STATS_ENABLED=0` alone still posts a report that usage is disabled; the address that goes nowhere stops that too.
No switch stops Ray's question to the cloud metadata addresses (169.254.169.254, metadata.google.internal), which its process
for usage reports asks before it looks at any switch: a local cluster is started without that process
(`ray_internals`), and for `ray start` the file `~/ray_bootstrap_config.yaml` answers in the addresses' place.
"""

from __future__ import annotations

import os

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
