#!/usr/bin/env bash
# Prepares an instance of VNN-COMP: compiles the programs of its network into the cache.
#
#     bash launch/vnncomp/prepare_instance.sh v1 CATEGORY NET.onnx PROP.vnnlib
#
# A short search, in which compilation does not count, meets most programs that a long one needs.
# Status 0 even if it decides nothing: run_instance.sh says what is wrong with an instance.

set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/common.sh
source "$here/../common.sh"

[[ ${1:-} != --help ]] || { usage && exit 0; }
[[ ${1:-} == --dry-run ]] && dry_run=yes && shift
[[ ${1:-} != --* ]] || unknown_flag "$1"
(($# == 4)) || fail "expected v1 CATEGORY NET.onnx PROP.vnnlib, got $# arguments"
[[ $1 == v1 ]] || fail "expected version v1, got '$1'"
python=python3
[[ ! -x $here/.venv/bin/python ]] || python=$here/.venv/bin/python
run "$python" -m boundjax.verify --onnx "$3" --vnnlib "$4" --timeout 2 --exclude-compilation \
    >/dev/stderr || true
