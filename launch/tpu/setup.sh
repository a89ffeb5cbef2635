#!/usr/bin/env bash
# Sends the last commit of this checkout to all workers of a slice, installs it there and mounts the
# shared folder. Run it again to send a newer commit.
#
#     TPU_NAME=boundjax ZONE=us-west4-a NFS_SHARE=10.0.0.2:/share bash launch/tpu/setup.sh
#
#     --dry-run     print the commands, run nothing
#
# NFS_SHARE is a share in the slice's network, such as a Filestore instance; MOUNT (/mnt/shared) is
# where the workers see it. Uncommitted changes are not sent.

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
: "${NFS_SHARE:?the NFS share of the work folder, for example 10.0.0.2:/share}"
mount=${MOUNT:-/mnt/shared}
archive=${TMPDIR:-/tmp}/boundjax-$TPU_NAME.tar.gz

cd "$(dirname "${BASH_SOURCE[0]}")/../.."
if [[ $dry_run == no && -n $(git status --porcelain) ]]; then
    echo "note: there are uncommitted changes, which are not sent" >&2
fi
run git archive --format=tar.gz "--output=$archive" HEAD
run gcloud compute tpus tpu-vm scp "$archive" "$TPU_NAME:boundjax.tar.gz" "${place[@]}" --worker=all
# A running training would continue with half of the old code, so refuse to replace it.
on_workers all "if tmux has-session -t boundjax 2>/dev/null; \
then echo 'error: a training is running: launch/tpu/run.sh --stop first' >&2; exit 1; fi; \
rm -rf boundjax && mkdir boundjax && tar -xzf boundjax.tar.gz -C boundjax && \
bash boundjax/launch/tpu/worker_setup.sh $(quoted "$NFS_SHARE" "$mount")"
