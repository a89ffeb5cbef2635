#!/usr/bin/env bash
# Decides an instance of VNN-COMP.
#
#     bash launch/vnncomp/run_instance.sh v1 CATEGORY NET.onnx PROP.vnnlib RESULT TIMEOUT
#
# RESULT gets sat, unsat, unknown, timeout or error, and after sat the values of all variables. The
# command ends half a second before TIMEOUT (in seconds), or at half of a shorter one.

set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/common.sh
source "$here/../common.sh"

[[ ${1:-} != --help ]] || { usage && exit 0; }
[[ ${1:-} == --dry-run ]] && dry_run=yes && shift
[[ ${1:-} != --* ]] || unknown_flag "$1"
(($# == 6)) || fail "expected v1 CATEGORY NET.onnx PROP.vnnlib RESULT TIMEOUT, got $# arguments"
[[ $1 == v1 ]] || fail "expected version v1, got '$1'"
python=python3
[[ ! -x $here/.venv/bin/python ]] || python=$here/.venv/bin/python
seconds=$(awk -v limit="$6" 'BEGIN { print (limit > 1 ? limit - 0.5 : limit / 2) }')
# Should the machine stop the command before it writes, the result is this.
[[ $dry_run == yes ]] || echo timeout >"$5"
if ! run "$python" -m boundjax.verify --onnx "$3" --vnnlib "$4" --timeout "$seconds" \
    --results "$5"; then
    echo error >"$5"
fi
