"""Stand-ins for programs that a single machine lacks: they start the ranks here, as the real ones
would elsewhere.

`srun` sets what Slurm 22.05 sets for a step of one task a node (seen on a real cluster of two
nodes), and `ssh` runs its command in a shell of its own. Everything they start is real.
"""

from __future__ import annotations

from pathlib import Path

_SRUN = r"""#!/usr/bin/env bash
# Both names lead to this machine, so that two tasks are two nodes.
set -euo pipefail
nodes=(127.0.0.1 localhost)
while [[ $1 == -* ]]; do
    case $1 in
        -n | --ntasks) tasks=$2; shift ;;
        --export=ALL* | --kill-on-bad-exit=1) ;;
        *) echo "srun: unknown option $1" >&2; exit 1 ;;
    esac
    shift
done
started=()
list=$(IFS=,; echo "${nodes[*]:0:tasks}")
for ((task = 0; task < tasks; task++)); do
    SLURM_JOB_ID=$STANDIN_JOB SLURM_JOB_NODELIST=$list SLURM_JOB_NUM_NODES=$tasks SLURM_NODELIST=$list \
        SLURM_NNODES=$tasks SLURM_NTASKS=$tasks SLURM_NPROCS=$tasks SLURM_PROCID=$task SLURM_LOCALID=0 \
        SLURM_NODEID=$task SLURM_GTIDS=$task SLURM_STEP_ID=0 SLURM_STEPID=0 SLURM_STEP_NODELIST=$list \
        SLURM_STEP_NUM_NODES=$tasks SLURM_STEP_NUM_TASKS=$tasks SLURM_STEP_TASKS_PER_NODE="1(x$tasks)" \
        SLURM_TASKS_PER_NODE="1(x$tasks)" SLURMD_NODENAME=${nodes[task]} "$@" &
    started+=($!)
done
for task in "${started[@]}"; do wait "$task"; done  # `wait -n` may miss one of two that end at once
"""

_SSH = r"""#!/usr/bin/env bash
# A host called "broken" fails; every other one is this machine.
set -euo pipefail
while [[ $1 == -* ]]; do
    if [[ $1 == -o ]]; then shift; fi
    shift
done
if [[ $1 == broken ]]; then
    until [[ -s $STANDIN_PIDS/127.0.0.1 ]]; do sleep 0.05; done
    exit 7
fi
echo $$ >"$STANDIN_PIDS/$1"
# With -tt, the other machine starts it at a terminal, with no signal ignored.
exec python3 -c '
import os, pty, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
sys.exit(os.waitstatus_to_exitcode(pty.spawn(["bash", "-c", sys.argv[1]])))
' "$2"
"""


def make_standins(folder: Path) -> None:
    """Write srun, sinfo (deepspeed looks whether it is there) and ssh into `folder`."""
    folder.mkdir()
    for name, text in (("srun", _SRUN), ("sinfo", "#!/bin/sh\nexit 0\n"), ("ssh", _SSH)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
