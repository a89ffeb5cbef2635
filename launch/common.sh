# Sourced by the launch scripts: what they say, and commands that can be printed instead of run.
# Works with bash 3.2, which is what macOS has.
# shellcheck shell=bash

dry_run=no

# The comment at the head of the script.
usage() {
    sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
}

# One line that says what is wrong; exit status 2, as everywhere in this project.
fail() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

unknown_flag() {
    fail "unknown flag '$1': bash $0 --help shows what there is"
}

# Its arguments as one line that a shell reads back as the same words.
quoted() {
    local LC_ALL=C word line=""
    for word in "$@"; do
        if [[ ! $word =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]]; then
            word="'$(printf '%s' "$word" | sed "s/'/'\"'\"'/g")'"
        fi
        line+="${line:+ }$word"
    done
    printf '%s\n' "$line"
}

# Runs a command; with --dry-run prints it.
run() {
    if [[ $dry_run == yes ]]; then
        quoted "$@"
    else
        "$@"
    fi
}

# Fails unless a flag is a setting of the run. Other flags of experiments.main follow `--`.
check_setting() {
    [[ $1 =~ ^--config\.[A-Za-z0-9_.]+= ]] || unknown_flag "$1"
}
