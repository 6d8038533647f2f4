# shellcheck shell=bash disable=SC2034
# Sourced by start_head.sh, start_worker.sh and stop.sh: what every Ray process of the cluster inherits.

# Nothing leaves the premises. RAY_USAGE_STATS_ENABLED=0 alone is not enough: Ray then still posts a "disabled" report,
# so the report goes to a closed loopback port. The bootstrap file keeps Ray from asking cloud metadata addresses.
export RAY_USAGE_STATS_ENABLED=0
export RAY_USAGE_STATS_REPORT_URL=http://127.0.0.1:9/
export RAY_DATA_USAGE_DISABLED=1
export HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 VLLM_NO_USAGE_STATS=1 MLFLOW_DISABLE_TELEMETRY=true DO_NOT_TRACK=1

fail() {
    printf 'error: %s\nhint: %s\n' "$1" "$2" >&2
    exit 2
}

# Ray makes its folders of sessions writable by everyone. They lie in a folder that only this user can enter; RAY_TMPDIR is
# where every `ray` command of these scripts looks for them.
uid="$(id -u)"
tmp="${RAY_TMPDIR:-${TMPDIR:-/tmp}}"
[[ "$(basename "$tmp")" == "forge-$uid" ]] || tmp="$tmp/forge-$uid"
export RAY_TMPDIR="$tmp"
(umask 077 && mkdir -p "$RAY_TMPDIR")
if [[ -L "$RAY_TMPDIR" || "$(stat -c %u "$RAY_TMPDIR")" != "$uid" ]]; then
    fail "$RAY_TMPDIR is not a folder of this user: Ray's sessions in it would be open to whoever made it" \
        "remove it, or set RAY_TMPDIR to a folder of your own with a short path"
fi
chmod 700 "$RAY_TMPDIR"

# A user without a home that it can write to (OpenShift's ids have HOME=/) gets one next to Ray's folder, for as long as the
# host or container lives. A token that the old one holds still counts.
if [[ -z "${HOME:-}" ]] || ! mkdir -p "$HOME" 2>/dev/null || [[ ! -w "$HOME" ]]; then
    [[ ! -r "${HOME:-}/.ray/auth_token" ]] || RAY_AUTH_TOKEN_PATH="${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}"
    export FORGE_HOME_REPLACED="${HOME:-}" HOME="$RAY_TMPDIR/home"
    (umask 077 && mkdir -p "$HOME")
fi
export USER="${USER:-$(id -un 2>/dev/null || echo "$uid")}" # torch's compiler asks for a name
if [[ ! -e "$HOME/ray_bootstrap_config.yaml" ]]; then
    echo '{}' >"$HOME/ray_bootstrap_config.yaml"
fi

# One shared token guards every port of Ray. The file is the one truth: a token in the environment would show in `ps e`.
unset RAY_AUTH_TOKEN
export RAY_AUTH_MODE=token
export RAY_AUTH_TOKEN_PATH="${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}"

# Ray's processes ask each other over HTTP, and read proxies from the environment: never for addresses of the cluster.
without_proxy() {
    local hosts
    hosts="127.0.0.1,localhost,::1$(printf ',%s' "$@")"
    NO_PROXY="${no_proxy:-${NO_PROXY:-}}"
    export NO_PROXY="${NO_PROXY:+$NO_PROXY,}$hosts"
    export no_proxy="$NO_PROXY"
}

require_private_token() {
    local mode
    mode="$(stat -c %a "$RAY_AUTH_TOKEN_PATH")"
    if [[ "$mode" != 600 && "$mode" != 400 ]]; then
        fail "the token $RAY_AUTH_TOKEN_PATH has mode $mode: others can read it" "chmod 600 $RAY_AUTH_TOKEN_PATH"
    fi
    [[ -s "$RAY_AUTH_TOKEN_PATH" ]] || fail "the token $RAY_AUTH_TOKEN_PATH is empty" "remove it and start the head again"
}

# Fixed, so that a firewall rule can be written; cluster/README.md lists them. The worker range lies below Linux's
# ephemeral ports (32768 and up), which NCCL, gloo and outgoing connections take from.
GCS_PORT=6379
export AUTOSCALER_METRIC_PORT=6386 DASHBOARD_METRIC_PORT=6387
NODE_PORTS=(
    --object-manager-port=6380
    --node-manager-port=6381
    --runtime-env-agent-port=6382
    --dashboard-agent-grpc-port=6383
    --dashboard-agent-listen-port=6384
    --metrics-export-port=6385
    --min-worker-port=20000
    --max-worker-port=29999
)

# Ray from PATH, else from the environment that `make venv` made.
if ! command -v ray >/dev/null; then
    PATH="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)/.venv/bin:$PATH"
    command -v ray >/dev/null || fail "no ray on PATH and no .venv in the project" "make venv"
fi

# Ray itself counts the CPUs of the whole machine, and reads limits of the root control group alone: under Slurm or taskset
# the ones of this process are fewer. Options after `--` override it.
NODE_CPUS=()
python="$(dirname "$(command -v ray)")/python"
if usable="$("$python" -c 'from forge_ray.machine.hardware import cpus; print(cpus())' 2>/dev/null)"; then
    NODE_CPUS=(--num-cpus="$usable")
fi
