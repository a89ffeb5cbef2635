# Access to the machines of a slice; the TPU scripts source this file.
# shellcheck shell=bash
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

# Names the slice for every gcloud command; without PROJECT, gcloud uses its default project.
read_tpu() {
    : "${TPU_NAME:?name of the TPU slice, for example boundjax}"
    : "${ZONE:?zone of the TPU slice, for example us-west4-a}"
    place=("--zone=$ZONE" ${PROJECT:+"--project=$PROJECT"})
}

# Runs a shell command on one worker (its number) or on all at once.
on_workers() {
    run gcloud compute tpus tpu-vm ssh "$TPU_NAME" "${place[@]}" "--worker=$1" "--command=$2"
}
