"""Switches that keep libraries from sending data out, set before ray or transformers is imported.

With `RAY_USAGE_STATS_ENABLED=0` alone, Ray still posts a report that usage is disabled; the unreachable URL stops that too.
No switch stops Ray's requests to the cloud metadata addresses (169.254.169.254, metadata.google.internal), which its process
for usage reports sends before it reads any switch: a local cluster is started without that process (`ray_internals`), and
with `ray start` the file `~/ray_bootstrap_config.yaml` makes the requests unnecessary.
"""

from __future__ import annotations

import os

SWITCHES = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "AWS_EC2_METADATA_DISABLED": "true",
    "RAY_USAGE_STATS_REPORT_URL": "http://127.0.0.1:9/",
    "RAY_DATA_USAGE_DISABLED": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "1",
}
# Read, as those above, once: when the library is loaded
THREADS = {
    "TOKENIZERS_PARALLELISM": "false",  # each worker of a build has a CPU of its own
    "FASTOKENS_BPE_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",  # threads that wait spin otherwise: two runs at once made 0.3 of one alone
}
# Read by the controller and the replicas of Ray Serve when they start
SERVE = {
    # Requests in the replica's one event loop: what may block is in threads of ours, and another is a hand-over per message
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "30",  # after Ray's own 5 s the proxy of a busy machine is killed
}


def set_offline_switches() -> None:
    """Set every switch that the operator has not set; those of threads and of Ray Serve too."""
    for name, value in (SWITCHES | THREADS | SERVE).items():
        os.environ.setdefault(name, value)
