#!/usr/bin/env bash
# Stop every Ray process of this user on this host. Running jobs end; a training run goes on from its last checkpoint.
#
#   cluster/bare/stop.sh [--force]
set -euo pipefail
# shellcheck source=environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

ray stop --grace-period 30 "$@"
