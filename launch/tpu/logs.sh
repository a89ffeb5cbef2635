#!/usr/bin/env bash
# Shows the last lines that the workers of a slice printed.
#
#     TPU_NAME=boundjax ZONE=us-west4-a WORKDIR=/mnt/shared/runs/crown bash launch/tpu/logs.sh
#
#     --worker N    only this worker (from 0); by default all
#     --lines N     number of lines of each worker (20)
#     --follow      show new lines until Ctrl-C
#     --dry-run     print the command, run nothing

set -euo pipefail
# shellcheck source=launch/tpu/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

worker='*' lines=20 follow=""
while (($#)); do
    case $1 in
        --worker) worker=${2:?a number after --worker} && shift ;;
        --lines) lines=${2:?a number after --lines} && shift ;;
        --follow) follow=" -F" ;;
        --dry-run) dry_run=yes ;;
        --help) usage && exit 0 ;;
        *) unknown_flag "$1" ;;
    esac
    shift
done
[[ $worker == '*' || $worker =~ ^[0-9]+$ ]] || fail "--worker $worker: must be a number"
[[ $lines =~ ^[0-9]+$ ]] || fail "--lines $lines: must be a number"
read_tpu
: "${WORKDIR:?the run folder on the share, for example /mnt/shared/runs/crown}"
# The share has the logs of all workers, so one worker can show them.
on_workers 0 "tail -n $lines$follow $(quoted "$WORKDIR")/logs/worker-$worker.log"
