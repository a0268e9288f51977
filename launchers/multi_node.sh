#!/usr/bin/env bash
# All machines of a hostfile: launchers/multi_node.sh [--dry-run] [--node-rank K] HOSTFILE RECIPE [--set.field value …]
#
# HOSTFILE has a line `HOST slots=N` for each machine; the first is where all ranks meet. The package, the data and
# this folder are at the same place on every machine, and ssh gets there without a password.
#
# --dry-run        check the configuration for that many ranks and print each machine's command; start nothing
# --node-rank K    start only the ranks of the K-th machine (from 0), which is this one, without ssh: run it on each
# NODE_RANK        the same, from the environment
# NAMR_MASTER_PORT port of the first machine (29500)
#
# NCCL_*, GLOO_*, OMP_* and PYTHONPATH are passed on. When a machine's ranks fail, those of the others are ended, and
# its exit code is this program's. Ctrl-C, a closed terminal (but for nohup), TERM and USR1 make the ranks write a
# checkpoint and end with code 75; a second one before it is written, other than USR1, ends them at once, without it,
# and a third one ends the connections to all machines.
set -euo pipefail

node=${NODE_RANK:-} dry=
words=()
while (($#)); do
    case $1 in
        --dry-run) dry=1 ;;
        --node-rank) node=${2:?--node-rank needs a number}; shift ;;
        -h | --help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; exit ;;
        *) words+=("$1") ;;
    esac
    shift
done
if ((${#words[@]} < 2)); then
    echo "usage: multi_node.sh [--dry-run] [--node-rank K] HOSTFILE RECIPE [--set.field value …]; --help says more" >&2
    exit 2
fi

helper=(python -m namr_dist.launchers.hostfile)
commands=$("${helper[@]}" --port "${NAMR_MASTER_PORT:-29500}" ${node:+--node "$node"} "${words[@]}")
if [[ $dry ]]; then
    ranks=$("${helper[@]}" --ranks "${words[0]}")
    python -m namr_dist.cli train "${words[@]:1}" --dry-run --ranks "$ranks" >&2
    echo "$commands"
    exit
fi
if [[ $node ]]; then eval "exec $commands"; fi

keys=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null || true; wait; rm -rf "$keys"' EXIT
terminals=() asked=0
# stop NUMBER: ssh passes no signal on, but what is typed: Ctrl-C, at each machine's terminal. What a second one means,
# before the checkpoint or after it, the ranks know.
stop() {
    if ((asked && $1 == 10)); then return; fi # a notice, however often
    asked=$((asked + 1))
    if ((asked > 2)); then exit $((128 + $1)); fi
    if ((asked == 1)); then
        echo "multi_node.sh: stopping; the ranks write a checkpoint first, and a second signal ends them at once" >&2
    fi
    local terminal
    for terminal in "${terminals[@]}"; do printf '\3' >&"$terminal"; done
}
trap 'stop 1' HUP
trap 'stop 2' INT
trap 'stop 15' TERM
trap 'stop 10' USR1
mapfile -t lines <<<"$commands"
running=()
for line in "${lines[@]}"; do
    mkfifo "$keys/${#running[@]}"
    exec {terminal}<>"$keys/${#running[@]}" # for reading too: opening it waits for nobody, and it has no end
    terminals+=("$terminal")
    # Of the signals that a terminal sends to all its programs, ssh would die.
    (trap '' HUP INT && eval "exec $line") <&"$terminal" &
    running+=($!)
done
# Not `wait -n`: of two that end at once, it may miss one and then say 127.
while ((${#running[@]})); do
    for place in "${!running[@]}"; do
        kill -0 "${running[place]}" 2>/dev/null && continue
        wait "${running[place]}" || {
            code=$?
            echo "multi_node.sh: a machine's ranks ended with code $code; ending the others" >&2
            exit $code
        }
        unset "running[place]"
    done
    sleep 0.2
done
