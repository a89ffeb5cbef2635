# Messages and dry runs; the launch scripts source this file. It works with bash 3.2, which macOS
# has.
# shellcheck shell=bash

dry_run=no

# Prints the comment at the head of the script.
usage() {
    sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
}

# Reports a mistake in one line; exit status 2, as everywhere in this project.
fail() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

unknown_flag() {
    fail "unknown flag '$1': bash $0 --help lists the flags"
}

# Prints its arguments as one line that a shell reads back as the same words.
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

# Runs a command, or prints it with --dry-run.
run() {
    if [[ $dry_run == yes ]]; then
        quoted "$@"
    else
        "$@"
    fi
}

# Fails unless a flag is a setting of the run; other flags of experiments.main follow `--`.
check_setting() {
    [[ $1 =~ ^--config\.[A-Za-z0-9_.]+= ]] || unknown_flag "$1"
}
