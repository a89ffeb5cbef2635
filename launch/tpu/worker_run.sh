#!/usr/bin/env bash
# Starts the training in a tmux session, or stops it; run.sh runs this on every worker.
#
#     bash launch/tpu/worker_run.sh [--dry-run] CONFIG WORKDIR [FLAG ...]
#     bash launch/tpu/worker_run.sh [--dry-run] --stop

set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

stop=no
while (($#)); do
    case $1 in
        --stop) stop=yes ;;
        --dry-run) dry_run=yes ;;
        --help) usage && exit 0 ;;
        -*) unknown_flag "$1" ;;
        *) break ;;
    esac
    shift
done
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

if [[ $stop == yes ]]; then
    if [[ $dry_run == yes ]]; then
        process=PROCESS
    else
        process=$(tmux list-panes -t boundjax -F '#{pane_pid}') ||
            fail "$(hostname): no training is running; launch/tpu/run.sh starts one"
    fi
    run kill -TERM "$process"
    exit 0
fi
(($# >= 2)) || fail "expected CONFIG WORKDIR [FLAG ...], got $# arguments"
config=$1 workdir=$2
shift 2

# The names of a slice's machines end with their numbers: t1v-n-0123abcd-w-7.
name=$(hostname)
log=$workdir/logs/worker-${name##*-}.log
command=(
    bash launch/until_done.sh --done "$workdir/summary.json" --attempts 1000 --
    "$HOME/boundjax-environment/bin/python" -m experiments.main
    "--config=$config" "--workdir=$workdir" "$@"
)
if [[ $dry_run == no ]] && tmux has-session -t boundjax 2>/dev/null; then
    fail "$name: a training is already running; launch/tpu/run.sh --stop ends it"
fi
run mkdir -p "$workdir/logs"
run tmux new-session -d -s boundjax "exec $(quoted "${command[@]}") >>$(quoted "$log") 2>&1"
