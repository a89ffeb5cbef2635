#!/usr/bin/env bash
# Starts or resumes a training on all workers of a slice; it does not need this terminal to run on.
#
#     TPU_NAME=boundjax ZONE=us-west4-a CONFIG=experiments/configs/cifar10_crown.py \
#         WORKDIR=/mnt/shared/runs/crown bash launch/tpu/run.sh [--config.key=value ...]
#
#     --stop        save and stop: SIGTERM to all workers
#     --dry-run     print the commands, run nothing
#     -- FLAG ...   further flags of experiments.main
#
# WORKDIR lies in the folder that setup.sh mounted. A worker whose training ends before the run has
# finished starts it again after 30 seconds. launch/tpu/logs.sh shows the output in WORKDIR/logs.

set -euo pipefail
# shellcheck source=launch/tpu/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

stop=no flags=()
while (($#)); do
    case $1 in
        --stop) stop=yes ;;
        --dry-run) dry_run=yes ;;
        --help) usage && exit 0 ;;
        --) shift && flags+=("$@") && break ;;
        *) check_setting "$1" && flags+=("$1") ;;
    esac
    shift
done
read_tpu
if [[ $stop == yes ]]; then
    on_workers all "bash boundjax/launch/tpu/worker_run.sh --stop"
    exit 0
fi
: "${CONFIG:?the experiment, for example experiments/configs/cifar10_crown.py}"
: "${WORKDIR:?the run folder on the share, for example /mnt/shared/runs/crown}"
[[ $WORKDIR == /* ]] || fail "WORKDIR=$WORKDIR: must be an absolute path in the mounted folder"
on_workers all "bash boundjax/launch/tpu/worker_run.sh \
$(quoted "$CONFIG" "$WORKDIR" ${flags[@]+"${flags[@]}"})"
