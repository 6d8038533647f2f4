#!/usr/bin/env bash
# Start the head of a cluster on this host. The first start makes the token that every other host needs.
#
#   cluster/bare/start_head.sh --ip 10.0.0.1 [--dashboard-host 127.0.0.1] [--temp-dir DIR] [-- further `ray start` options]
set -euo pipefail
# shellcheck source=environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

ip="" dashboard_host=127.0.0.1 insecure=no temp_dir="$RAY_TMPDIR/ray"
options=()
while (($#)); do
    case "$1" in
        --ip) ip="${2:?--ip needs an address}" && shift 2 ;;
        --dashboard-host) dashboard_host="${2:?--dashboard-host needs an address}" && shift 2 ;;
        --temp-dir) temp_dir="${2:?--temp-dir needs a folder}" && shift 2 ;;
        --insecure) insecure=yes && shift ;;
        --) shift && options+=("$@") && break ;;
        *) fail "unknown option $1" "see the top of $0" ;;
    esac
done

[[ -n "$ip" ]] || fail "--ip is missing" "give the address of the private interface; Ray would otherwise guess one"
if [[ "$ip" == 0.0.0.0 || "$ip" == :: ]]; then
    fail "--ip $ip is not an address that others can reach" "give the address of the private interface"
fi
if [[ "$insecure" == no && ("$dashboard_host" == 0.0.0.0 || "$dashboard_host" == ::) ]]; then
    fail "--dashboard-host $dashboard_host shows the Jobs API to every network of this host" \
        "give one private address, or forward the port: ssh -L 8265:127.0.0.1:8265 HEAD; --insecure overrides"
fi

if [[ ! -e "$RAY_AUTH_TOKEN_PATH" ]]; then
    (
        umask 077
        mkdir -p "$(dirname "$RAY_AUTH_TOKEN_PATH")"
        od -An -N32 -tx1 /dev/urandom | tr -d ' \n' >"$RAY_AUTH_TOKEN_PATH.new"
        mv "$RAY_AUTH_TOKEN_PATH.new" "$RAY_AUTH_TOKEN_PATH"
    )
    echo "made the cluster's token: $RAY_AUTH_TOKEN_PATH (copy it to every other host, mode 600)" >&2
fi
require_private_token

without_proxy "$ip"
ray start --head \
    --node-ip-address="$ip" \
    --port="$GCS_PORT" \
    --dashboard-host="$dashboard_host" \
    --dashboard-port=8265 \
    --ray-client-server-port=10001 \
    --temp-dir="$temp_dir" \
    --disable-usage-stats \
    "${NODE_PORTS[@]}" \
    ${NODE_CPUS[@]+"${NODE_CPUS[@]}"} \
    ${options[@]+"${options[@]}"}
