#!/usr/bin/env bash
# Join this host to a cluster. Needs the head's token in ~/.ray/auth_token, mode 600.
#
#   cluster/bare/start_worker.sh --head 10.0.0.1 [--ip 10.0.0.2] [--temp-dir DIR] [-- further `ray start` options]
set -euo pipefail
# shellcheck source=environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

head="" ip="" temp_dir="$RAY_TMPDIR/ray"
options=()
while (($#)); do
    case "$1" in
        --head) head="${2:?--head needs an address}" && shift 2 ;;
        --ip) ip="${2:?--ip needs an address}" && shift 2 ;;
        --temp-dir) temp_dir="${2:?--temp-dir needs a folder}" && shift 2 ;;
        --) shift && options+=("$@") && break ;;
        *) fail "unknown option $1" "see the top of $0" ;;
    esac
done

[[ -n "$head" ]] || fail "--head is missing" "give the address that start_head.sh was given as --ip"
if [[ ! -e "$RAY_AUTH_TOKEN_PATH" ]]; then
    fail "no token at $RAY_AUTH_TOKEN_PATH" "scp -p $head:.ray/auth_token $RAY_AUTH_TOKEN_PATH"
fi
require_private_token
if [[ -z "$ip" ]]; then # the address from which this host reaches the head; Ray itself would ask a public one
    ip="$(ip -o route get "$head" 2>/dev/null | sed -n 's/.* src \([^ ]*\).*/\1/p')" || true
    [[ -n "$ip" ]] || fail "cannot tell this host's own address" "give it as --ip"
fi

without_proxy "$head" "$ip"
ray start \
    --address="$head:$GCS_PORT" \
    --node-ip-address="$ip" \
    --temp-dir="$temp_dir" \
    --disable-usage-stats \
    "${NODE_PORTS[@]}" \
    ${NODE_CPUS[@]+"${NODE_CPUS[@]}"} \
    ${options[@]+"${options[@]}"}
