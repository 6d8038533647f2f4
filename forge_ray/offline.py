"""The switches that keep everything on the premises (level 0). Set before ray or transformers is imported.

`RAY_USAGE_STATS_ENABLED=0` alone still posts a report that usage is disabled; the address that goes nowhere stops that too.
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
    "DO_NOT_TRACK": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def set_offline_switches() -> None:
    """What the operator has set stays."""
    for name, value in SWITCHES.items():
        os.environ.setdefault(name, value)
