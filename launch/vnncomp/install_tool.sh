#!/usr/bin/env bash
# Installs boundjax for the competition of neural network verifiers (VNN-COMP).
#
#     bash launch/vnncomp/install_tool.sh v1
#
# It makes a virtual environment beside this file, from this checkout. The other scripts use it where
# it exists, else the python3 of the shell. BOUNDJAX_ACCELERATOR=gpu adds JAX for NVIDIA GPUs.

set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/common.sh
source "$here/../common.sh"

[[ ${1:-} != --help ]] || { usage && exit 0; }
[[ ${1:-} == --dry-run ]] && dry_run=yes && shift
[[ ${1:-} != --* ]] || unknown_flag "$1"
[[ ${1:-v1} == v1 ]] || fail "expected version v1, got '$1'"
extras=vnnlib
[[ ${BOUNDJAX_ACCELERATOR:-cpu} == cpu ]] || extras+=",$BOUNDJAX_ACCELERATOR"
run python3 -m venv "$here/.venv"
run "$here/.venv/bin/python" -m pip install "$here/../..[$extras]"
