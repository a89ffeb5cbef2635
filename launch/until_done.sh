#!/usr/bin/env bash
# Runs a command until FILE exists, which marks it as finished.
#
#     bash launch/until_done.sh --done FILE [--attempts N] [--delay SECONDS] -- COMMAND ...
#
# A training that gets SIGTERM saves and ends with status 0 on all hosts, also on those that got no
# signal; only its summary.json tells a finished run from an interrupted one. Status 0 therefore
# counts only if FILE exists. It has SECONDS to appear, because another host may be writing it.
# The exit status is
#
#     0       FILE exists
#     75      interrupted; the same command continues
#     2       a mistake in the command, which no attempt can correct
#     other   the command's last status, after N attempts (1) with SECONDS (30) between them
#
# SIGTERM and SIGINT are forwarded as SIGTERM and end the attempts.

set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

done_file="" attempts=1 delay=30
while (($#)); do
    case $1 in
        --done) done_file=${2:?a file after --done} && shift ;;
        --attempts) attempts=${2:?a number after --attempts} && shift ;;
        --delay) delay=${2:?seconds after --delay} && shift ;;
        --dry-run) dry_run=yes ;;
        --help) usage && exit 0 ;;
        --) shift && break ;;
        *) unknown_flag "$1" ;;
    esac
    shift
done
[[ -n $done_file ]] || fail "--done is missing: the file that marks the command as finished"
(($#)) || fail "the command is missing: ... --done FILE -- COMMAND ..."
if [[ $dry_run == yes ]]; then
    run "$@"
    exit 0
fi

child="" stopped=no interrupted=no
stop() {
    stopped=yes interrupted=yes
    [[ -z $child ]] || kill -TERM "$child" 2>/dev/null || true
}
trap stop TERM INT

# Waits for the child to end. A trapped signal interrupts `wait` but not the child, so wait again.
# If the signal came after bash had read the status, bash has forgotten the child (127).
wait_for_child() {
    local previous=""
    while :; do
        interrupted=no status=0
        wait "$child" 2>/dev/null || status=$?
        if [[ $status -eq 127 && -n $previous ]]; then
            status=$previous
            break
        fi
        previous=$status
        [[ $interrupted == yes ]] || break
    done
    child=""
}

# Waits up to --delay seconds for the file, in steps that a signal can end.
wait_for_file() {
    local waited
    for ((waited = 0; waited < delay; waited++)); do
        [[ ! -e $done_file && $stopped == no ]] || return 0
        sleep 1 >/dev/null 2>&1 &
        wait $! || true
    done
}

for ((attempt = 1; attempt <= attempts; attempt++)); do
    if [[ -e $done_file ]]; then # another host may have written it while this one waited
        echo "until_done: finished, $done_file exists"
        exit 0
    fi
    "$@" &
    child=$!
    [[ $stopped == no ]] || stop
    wait_for_child
    [[ $status -ne 0 ]] || wait_for_file
    [[ $status -ne 0 || ! -e $done_file ]] || exit 0
    if [[ $stopped == yes || $status -eq 2 ]]; then
        break
    elif ((attempt < attempts)); then
        echo "until_done: ended with status $status without $done_file; again in $delay s" >&2
        wait_for_file
        if [[ $stopped == yes ]]; then
            status=0 # no command was running that could have failed
            break
        fi
    fi
done

case $status in
    0 | 130 | 143) # saved, or stopped before there was anything to save
        echo "until_done: interrupted; the same command continues" >&2
        exit 75
        ;;
    *) exit "$status" ;;
esac
