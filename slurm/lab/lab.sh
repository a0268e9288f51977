#!/usr/bin/env bash
# A real Slurm cluster of two nodes on this machine, to try scripts on:  sudo slurm/lab/lab.sh start | stop | status
#
# Both nodes are daemons of this machine, node1 and node2, with 2 CPUs and 2 GPUs each that are there in name only.
# A job in partition high preempts one in partition low, the default. Needs root and the packages slurmctld, slurmd,
# slurm-client and munge of Debian or Ubuntu. start adds a line to /etc/hosts, stop removes it; all else is in LAB.
#
# node K start | kill    kill -9 all that runs on node K, 1 or 2, as when its power fails, or start it again
#
# LAB       folder of the cluster: configuration, state, logs (/tmp/slurm-lab)
# LAB_PORT  the first of three free ports (26817)
set -euo pipefail

LAB=${LAB:-/tmp/slurm-lab}
PORT=${LAB_PORT:-26817}
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
MARK="# slurm-lab in $LAB"
export SLURM_CONF=$LAB/slurm.conf

die() {
    echo "lab.sh: $*" >&2
    exit 2
}

check_machine() {
    ((EUID == 0)) || die "must run as root"
    local program missing=()
    for program in munged mungekey slurmctld slurmd sinfo scontrol; do
        command -v "$program" >/dev/null || missing+=("$program")
    done
    ((${#missing[@]} == 0)) || die "no ${missing[*]} here; apt-get install --no-install-recommends slurmctld slurmd" \
        "slurm-client munge"
}

configure() {
    [[ ! -e $LAB || ! $(ls -A "$LAB") ]] || ours || die "$LAB holds other things; set LAB to another folder"
    mkdir -p "$LAB"/{run,log,state,dev}
    [[ -O $LAB && ! -L $LAB ]] || die "$LAB belongs to somebody else; set LAB to another folder"
    # munged refuses a socket in a folder that others may write to.
    chmod 755 "$LAB" "$LAB"/{run,log,state}
    sed -e "s|@LAB@|$LAB|g" -e "s|@HOST@|$(hostname -s)|g" -e "s|@PORT@|$PORT|g" \
        -e "s|@NODE_PORTS@|$((PORT + 1))-$((PORT + 2))|g" "$HERE/slurm.conf.in" >"$LAB/slurm.conf"
    sed -e "s|@LAB@|$LAB|g" "$HERE/gres.conf.in" >"$LAB/gres.conf"
    : >"$LAB/plugstack.conf"
    local gpu
    for gpu in 0 1; do # files that stand for GPUs: as good as /dev/null
        [[ -e $LAB/dev/gpu$gpu ]] || mknod "$LAB/dev/gpu$gpu" c 1 3
    done
    hosts start
}

# hosts start | stop: our line in /etc/hosts. Other clusters of this machine have theirs; the file may be a mount, so it
# is written in place.
hosts() {
    local others
    exec 9</etc/hosts
    flock 9
    others=$(grep -v "$MARK\$" /etc/hosts)
    if [[ $1 == start ]]; then others+=$'\n'"127.0.0.1 node1 node2 $MARK"; fi
    echo "$others" >/etc/hosts
    exec 9<&-
}

pid_of() { cat "$LAB/run/$1.pid" 2>/dev/null; }

runs() {
    local pid
    pid=$(pid_of "$1") && [[ $pid ]] && kill -0 "$pid" 2>/dev/null
}

# end DAEMON [SIGNAL]: and wait until it has gone
end() {
    runs "$1" || return 0
    kill -"${2:-TERM}" "$(pid_of "$1")"
    local _
    for _ in {1..100}; do
        runs "$1" || return 0
        sleep 0.1
    done
    kill -KILL "$(pid_of "$1")"
}

start_node() {
    mkdir -p "$LAB/spool/$1"
    slurmd -N "$1" -f "$SLURM_CONF"
}

start() {
    check_machine
    runs slurmctld && die "a cluster is running in $LAB already"
    configure
    [[ -s $LAB/munge.key ]] || mungekey --create --keyfile "$LAB/munge.key"
    munged --force --key-file="$LAB/munge.key" --socket="$LAB/run/munge.sock" --pid-file="$LAB/run/munged.pid" \
        --log-file="$LAB/log/munged.log" --seed-file="$LAB/run/munged.seed"
    slurmctld -f "$SLURM_CONF"
    start_node node1
    start_node node2
    local _
    for _ in {1..60}; do
        # slurmctld answers before it has read everything, and may end on what it reads.
        if runs slurmctld && [[ $(states) == "idle idle" ]]; then
            echo "node1 and node2 are up; now: export SLURM_CONF=$SLURM_CONF"
            return
        fi
        # The saved state keeps nodes drained.
        timeout 5 scontrol update nodename=node1,node2 state=resume 2>/dev/null || true
        sleep 0.5
    done
    tail -n 5 "$LAB"/log/*.log >&2
    stop
    die "the nodes did not come up; the ends of their logs are above"
}

states() { timeout 5 sinfo --noheader --Node --partition=low --format=%T 2>/dev/null | paste -sd' '; }

ours() { grep -qsx ClusterName=lab "$LAB/slurm.conf"; }

stop() {
    ours || die "no cluster in $LAB"
    if runs slurmctld; then timeout 10 scancel --quiet --user="$(id -un)" || true; fi
    kill_tasks 'node[12]'
    local daemon
    for daemon in slurmctld slurmd.node1 slurmd.node2 munged; do end "$daemon"; done
    # Each removes the file with its number before it has quite gone.
    while pgrep -f "^slurm(d|ctld) .*-f $SLURM_CONF" >/dev/null; do sleep 0.1; done
    hosts stop
    rm -rf "$LAB"
}

# kill_tasks NODES: all that runs on them, with the daemons of its steps, which outlive that of their node
kill_tasks() {
    local file pid parent
    { grep -slzx "SLURM_CONF=$SLURM_CONF" /proc/[0-9]*/environ || true; } | while read -r file; do
        grep -qszEx "SLURMD_NODENAME=$1" "$file" || continue
        pid=$(basename "$(dirname "$file")")
        parent=$(ps -o ppid= -p "$pid" | tr -d " ") || continue
        if [[ $(ps -o comm= -p "${parent:-1}") == slurmstepd ]]; then kill -KILL "$parent" 2>/dev/null || true; fi
        kill -KILL "$pid" 2>/dev/null || true
    done
}

node() {
    case $2 in
        start) start_node "node$1" ;;
        kill) end "slurmd.node$1" KILL && kill_tasks "node$1" ;;
        *) die "node $1 $2: not start or kill" ;;
    esac
}

case ${1-} in
    start) start ;;
    stop) check_machine && stop ;;
    status) timeout 5 sinfo && timeout 5 squeue ;;
    node) node "${2:?the number of a node}" "${3:?start or kill}" ;;
    *) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; [[ ${1-} == --help ]] || exit 2 ;;
esac
