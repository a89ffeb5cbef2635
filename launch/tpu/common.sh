# Sourced by the TPU scripts: how the machines of a slice are reached.
# shellcheck shell=bash
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

# Names the slice in every gcloud command; PROJECT is gcloud's own default where it is not given.
read_tpu() {
    : "${TPU_NAME:?name of the TPU slice, for example boundjax}"
    : "${ZONE:?zone of the TPU slice, for example us-west4-a}"
    place=("--zone=$ZONE" ${PROJECT:+"--project=$PROJECT"})
}

# Runs a shell command on one worker (its number) or on all of them at once.
on_workers() {
    run gcloud compute tpus tpu-vm ssh "$TPU_NAME" "${place[@]}" "--worker=$1" "--command=$2"
}
