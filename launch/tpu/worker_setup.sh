#!/usr/bin/env bash
# Mounts the share and installs boundjax; setup.sh runs this on every worker.
#
#     bash launch/tpu/worker_setup.sh [--dry-run] NFS_SHARE MOUNT

set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

while (($#)); do
    case $1 in
        --dry-run) dry_run=yes ;;
        --help) usage && exit 0 ;;
        -*) unknown_flag "$1" ;;
        *) break ;;
    esac
    shift
done
(($# == 2)) || fail "expected NFS_SHARE MOUNT, got $# arguments"
share=$1 mount=$2
checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
python=$HOME/boundjax-environment/bin/python

run sudo apt-get -qq update
run sudo apt-get -qq install -y nfs-common tmux
if [[ $dry_run == yes ]] || ! mountpoint -q "$mount"; then
    run sudo mkdir -p "$mount"
    # With `hard`, writers wait for a server that does not answer and lose nothing.
    run sudo mount -t nfs -o hard "$share" "$mount"
    run sudo chmod 1777 "$mount"
fi
# The workers' own Python may be older than boundjax needs.
run python3 -m pip install --quiet --user uv
if [[ $dry_run == yes || ! -x $python ]]; then
    run "$HOME/.local/bin/uv" venv --python 3.13 "$HOME/boundjax-environment"
fi
run "$HOME/.local/bin/uv" pip install --python "$python" \
    --constraint "$checkout/launch/docker/constraints.txt" --editable "${checkout}[train,tpu]"
