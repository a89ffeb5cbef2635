#!/usr/bin/env bash
# Requests a TPU slice as a queued resource and waits until it is active.
#
#     TPU_NAME=boundjax ZONE=us-west4-a ACCELERATOR_TYPE=v5litepod-16 \
#         RUNTIME_VERSION=v2-alpha-tpuv5-lite bash launch/tpu/create.sh --spot
#
#     --spot        cheaper, but may be taken away at any time; a new slice can resume the run
#     --no-wait     do not wait; the request stays in the queue
#     --dry-run     print the commands, run nothing
#     -- FLAG ...   further flags of gcloud, for example -- --reserved
#
# From the moment the slice is ACTIVE it costs money, used or not, until launch/tpu/delete.sh.
# PROJECT replaces gcloud's default project.

set -euo pipefail
# shellcheck source=launch/tpu/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

wait=yes flags=()
while (($#)); do
    case $1 in
        --spot) flags+=(--spot) ;;
        --no-wait) wait=no ;;
        --dry-run) dry_run=yes ;;
        --help) usage && exit 0 ;;
        --) shift && flags+=("$@") && break ;;
        *) unknown_flag "$1" ;;
    esac
    shift
done
read_tpu
: "${ACCELERATOR_TYPE:?type and size of the slice, for example v5litepod-16}"
: "${RUNTIME_VERSION:?image of the workers, for example v2-alpha-tpuv5-lite}"

run gcloud compute tpus queued-resources create "$TPU_NAME" "${place[@]}" \
    "--node-id=$TPU_NAME" "--accelerator-type=$ACCELERATOR_TYPE" \
    "--runtime-version=$RUNTIME_VERSION" ${flags[@]+"${flags[@]}"}
[[ $wait == yes ]] || exit 0

describe() {
    run gcloud compute tpus queued-resources describe "$TPU_NAME" "${place[@]}" \
        "--format=value(state.state)"
}
if [[ $dry_run == yes ]]; then
    describe
    exit 0
fi
while :; do
    state=$(describe)
    echo "$(date +%H:%M:%S) $TPU_NAME is $state"
    case $state in
        ACTIVE) break ;;
        FAILED | SUSPENDED | SUSPENDING | DELETING)
            fail "$TPU_NAME is $state: run launch/tpu/delete.sh, then this script again"
            ;;
    esac
    sleep 30
done
echo "$TPU_NAME costs money from now until: TPU_NAME=$TPU_NAME ZONE=$ZONE launch/tpu/delete.sh"
