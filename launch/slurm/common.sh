# Functions of the SLURM scripts, which source this file in the root of the checkout.
# shellcheck shell=bash
# shellcheck source=launch/common.sh
source launch/common.sh

# JAX gives each task the GPU with its number on the node, so fewer tasks would leave GPUs idle.
# A single task, which has no others to join, takes all GPUs.
check_one_task_per_gpu() {
    local gpus=${SLURM_GPUS_PER_NODE:-} tasks=${SLURM_NTASKS_PER_NODE:-}
    gpus=${gpus##*:} # h100:8
    if [[ -n $gpus && -n $tasks && $gpus != "$tasks" && ${SLURM_NTASKS:-} != 1 ]]; then
        fail "--ntasks-per-node=$tasks with --gpus-per-node=$gpus: expected one task per GPU"
    fi
}

# Queues this job again for the next part of its run.
requeue() {
    if ((${SLURM_RESTART_COUNT:-0} >= ${MAX_RESTARTS:-100})); then
        fail "not finished after ${MAX_RESTARTS:-100} restarts: not queued again"
    fi
    echo "interrupted: queued again"
    exec scontrol requeue "$SLURM_JOB_ID"
}
