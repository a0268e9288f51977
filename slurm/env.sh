# shellcheck shell=bash
# What all jobs of this folder share. They source it, then call:  namr_job RECIPE [--set.section.field value …]
#
#   preflight → staging → training → evaluation → report, and again after a time limit, a preemption or a crash
#
# Choices, by environment variables (docs/slurm.md says more):
#
#   NAMR_RUN_DIR         folder of the run, seen by all nodes (runs/RECIPE); a job goes on with what it finds there
#   NAMR_SHARDS          shard set, a folder seen by all nodes or a URL (shards/RECIPE)
#   NAMR_STAGE           folder on each node's own disk to copy the shards to (none: they are read where they are)
#   NAMR_LAUNCH          torchrun: srun starts it once a node (default); srun: it starts every rank; deepspeed
#   NAMR_RANKS_PER_NODE  (the GPUs that the job has on a node; 1 where it has none)
#   NAMR_PORT            port of the first node at which the ranks meet (a free one; which, depends on the job's number)
#   NAMR_PREFLIGHT_SECONDS   within which all nodes must have answered, imports included (30)
#   NAMR_MAX_RESTARTS    how often a job starts again after crashes with no new checkpoint between them (3)
#   NAMR_ENV             file to source first: modules, conda, NCCL_… (none; .venv of this folder is used if it is there)
#   NAMR_SRUN            more options for each srun, such as --container-image=… of pyxis (none)
#   NAMR_CONTAINER       words before each command, such as: apptainer exec --nv namr.sif (none)
set -euo pipefail

cd "$NAMR_HOME"
# shellcheck source=/dev/null
if [[ ${NAMR_ENV-} ]]; then source "$NAMR_ENV"; fi
if [[ -x .venv/bin/namr ]]; then PATH=$PWD/.venv/bin:$PATH; fi

say() { echo "job $SLURM_JOB_ID: $*" >&2; }

# A signal is only noted; `step` passes it on. USR1 comes ahead of a time limit and of some preemptions (--signal),
# TERM with other preemptions and with scancel.
stop=
trap 'stop=USR1' USR1
trap 'stop=TERM' TERM

# step COMMAND…: run it in the background, where signals reach this shell, and end with its code.
step() {
    "$@" &
    local pid=$!
    while kill -0 $pid 2>/dev/null; do
        # Again and again: ranks that are still starting do not hear. To those that train, USR1 and TERM are the same.
        if [[ $stop ]]; then kill -USR1 $pid 2>/dev/null || true; fi
        sleep 1
    done
    wait $pid
}

# srun_tasks NODES TASKS COMMAND…: so many tasks on each of so many nodes; each may use all that the job has there.
srun_tasks() {
    local nodes=$1 per_node=$2 more
    shift 2
    read -ra more <<<"${NAMR_SRUN-}"
    # Ranks end by themselves when one of them breaks, and say where they were: a minute for that.
    exec srun --nodes="$nodes" --ntasks=$((nodes * per_node)) --ntasks-per-node="$per_node" --overcommit \
        --cpu-bind=none --kill-on-bad-exit=0 --wait=60 "${more[@]}" "$NAMR_HOME/slurm/task.sh" "$@"
}

on_first_node() { step srun_tasks 1 1 "$@"; }
on_every_node() { step srun_tasks "$SLURM_JOB_NUM_NODES" 1 "$@"; }

# A port of this node, the first, that nothing listens at. Jobs that share the node begin to look in different places.
free_port() {
    local port=$((20000 + SLURM_JOB_ID % 10000))
    while (: <"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do port=$((port + 1)); done
    echo "$port"
}

newest_checkpoint() {
    find "$NAMR_RUN_DIR/checkpoints" -name 'step-*.safetensors' -printf '%f\n' 2>/dev/null | sort | tail -n 1
}

# How often this job has started from what is the newest checkpoint now.
starts_from_here() { grep -cxF "$SLURM_JOB_ID $(newest_checkpoint)" "$NAMR_RUN_DIR/.starts" 2>/dev/null || true; }

preempted() { [[ $(scontrol show job -o "$SLURM_JOB_ID") =~ PreemptTime=[0-9] ]]; }

# after WHAT CODE: end this job, or queue it again, when WHAT has ended with a CODE that is not 0.
after() {
    local what=$1 code=$2 why
    if [[ $stop ]] && preempted; then
        why="$what made way for another job"
        sed -i '$d' "$NAMR_RUN_DIR/.starts" 2>/dev/null || true # that start broke nothing
    elif [[ $stop == USR1 ]]; then
        why="$what stopped ahead of the time limit"
    elif [[ $stop == TERM ]]; then
        say "$what was cancelled; the same sbatch goes on from its newest checkpoint"
        exit "$code"
    elif ((code == 2)); then
        say "$what found something wrong, which another start would find again; see above"
        exit 2
    elif (($(starts_from_here) > NAMR_MAX_RESTARTS)); then
        say "$what ended with code $code, and $NAMR_MAX_RESTARTS more starts brought no new checkpoint; see above"
        exit "$code"
    else
        why="$what ended with code $code"
    fi
    say "$why; starting again, from $(newest_checkpoint)"
    scontrol requeue "$SLURM_JOB_ID" || say "Slurm does not allow that; the same sbatch goes on"
    exit "$code"
}

namr_job() {
    local recipe=$1 data=${NAMR_SHARDS:-shards/$1} ranks_a_task threads
    shift
    NAMR_LAUNCH=${NAMR_LAUNCH:-torchrun} NAMR_RUN_DIR=${NAMR_RUN_DIR:-runs/$recipe}
    NAMR_RANKS_PER_NODE=${NAMR_RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}} NAMR_MAX_RESTARTS=${NAMR_MAX_RESTARTS:-3}
    NAMR_NODES=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | paste -sd' ')
    MASTER_ADDR=${NAMR_NODES%% *} MASTER_PORT=${NAMR_PORT:-$(free_port)}
    threads=$((SLURM_CPUS_ON_NODE / NAMR_RANKS_PER_NODE))
    export NAMR_LAUNCH NAMR_RANKS_PER_NODE NAMR_NODES MASTER_ADDR MASTER_PORT
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
    say "$recipe → $NAMR_RUN_DIR on $SLURM_JOB_NODELIST, $NAMR_RANKS_PER_NODE ranks a node by $NAMR_LAUNCH," \
        "${SLURM_RESTART_COUNT:-0} restarts"

    on_every_node namr preflight "$recipe" --run-dir "$NAMR_RUN_DIR" --ranks-per-node "$NAMR_RANKS_PER_NODE" \
        --limit "${NAMR_PREFLIGHT_SECONDS:-30}" --set.data.path "$data" "$@" || after preflight $?

    mkdir -p "$NAMR_RUN_DIR"
    echo "$SLURM_JOB_ID $(newest_checkpoint)" >>"$NAMR_RUN_DIR/.starts"
    # Slurm starts a job again by itself when a node fails: here is the only place to count those.
    if (($(starts_from_here) > NAMR_MAX_RESTARTS + 1)); then after 'the start before' 1; fi

    if [[ ${NAMR_STAGE-} ]]; then
        on_every_node namr shards stage "$data" "$NAMR_STAGE" >"$NAMR_RUN_DIR/.staged" || after staging $?
        data=$(head -n 1 "$NAMR_RUN_DIR/.staged")
    fi

    ranks_a_task=$NAMR_RANKS_PER_NODE
    if [[ $NAMR_LAUNCH == srun ]]; then ranks_a_task=1; fi
    step srun_tasks "$SLURM_JOB_NUM_NODES" $((NAMR_RANKS_PER_NODE / ranks_a_task)) train "$recipe" \
        --run-dir "$NAMR_RUN_DIR" --resume --set.data.path "$data" "$@" || after training $?
    on_first_node namr evaluate "$NAMR_RUN_DIR" --shards "$data" || after evaluation $?
    on_first_node namr report "$NAMR_RUN_DIR" --shards "$data" || after report $?
}
