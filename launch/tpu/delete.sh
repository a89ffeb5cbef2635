#!/usr/bin/env bash
# Deletes a slice and its request at once, so that it stops costing money, and lists what is left in
# the zone. The share stays and has its own cost.
#
#     TPU_NAME=boundjax ZONE=us-west4-a bash launch/tpu/delete.sh
#
#     --dry-run     print the commands, run nothing
#
# A running training is killed without saving; run launch/tpu/run.sh --stop first to lose nothing.

set -euo pipefail
# shellcheck source=launch/tpu/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

while (($#)); do
    case $1 in
        --dry-run) dry_run=yes ;;
        --help) usage && exit 0 ;;
        *) unknown_flag "$1" ;;
    esac
    shift
done
read_tpu
run gcloud compute tpus queued-resources delete "$TPU_NAME" "${place[@]}" --force --quiet
run gcloud compute tpus queued-resources list "${place[@]}"
