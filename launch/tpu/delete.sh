#!/usr/bin/env bash
# Deletes a slice and its request, at once, and shows what is left in the zone. Only then does it
# stop to cost money. What lies on the share stays, and costs for itself.
#
#     TPU_NAME=boundjax ZONE=us-west4-a bash launch/tpu/delete.sh
#
#     --dry-run     print the commands, run nothing
#
# What runs is killed, not asked to save: launch/tpu/run.sh --stop before loses nothing.

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
