# shellcheck shell=bash
# What all jobs of this folder share. They source it, then call:  namr_job RECIPE [--set.section.field value …]
#
#   preflight → staging → training → evaluation → report, and again after a time limit, a preemption or a crash
#
# Choices, by environment variables (docs/slurm.md says more); paths are relative to NAMR_HOME:
#
#   NAMR_RUN_DIR         folder of the run, seen by all nodes (runs/RECIPE); a job goes on with what it finds there
#   NAMR_SHARDS          shard set, a folder seen by all nodes or a URL (shards/RECIPE)
#   NAMR_STAGE           folder on each node's own disk to copy the shards to (none: they are read where they are)
#   NAMR_LAUNCH          torchrun: srun starts it once a node (default); srun: it starts every rank; deepspeed
#   NAMR_RANKS_PER_NODE  (the GPUs that the job has on a node; 1 where it has none)
#   NAMR_PORT            port of the first node at which the ranks meet (a free one)
#   NAMR_PREFLIGHT_SECONDS   within which all nodes must have answered, imports included (30)
#   NAMR_MAX_RESTARTS    how often a job starts again after crashes with no new checkpoint between them (3)
#   NAMR_ENV             file to source first: modules, conda, NCCL_… (none; .venv is used if it is there)
#   NAMR_SRUN            more options for each srun, such as --container-image=… of pyxis (none)
#   NAMR_CONTAINER       words before each command, such as: apptainer exec --nv namr.sif (none)
#
# Words of the last two cannot hold blanks.
set -euo pipefail

# What scontrol calls this job. One job of an array has the number of the whole array.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}

say() { echo "job $job: $*" >&2; }

refuse() {
    say "$*"
    exit 2
}

cd "$NAMR_HOME" || exit 2
NAMR_HOME=$PWD
if [[ ${NAMR_ENV-} ]]; then
    [[ -f $NAMR_ENV && -r $NAMR_ENV ]] ||
        refuse "NAMR_ENV is $NAMR_ENV, no file that $(hostname -s) can read; correct it, or unset it for .venv"
    set +u # conda's and Lmod's own scripts read variables that are not set
    # shellcheck source=/dev/null
    source "$NAMR_ENV" || refuse "NAMR_ENV, $NAMR_ENV, ended with code $?; see above"
    set -u
elif [[ -x .venv/bin/namr ]]; then
    PATH=$PWD/.venv/bin:$PATH
fi

# Refuse a job that would not find the program; what a container holds shows only in it.
need_namr() {
    [[ ${NAMR_CONTAINER-} || ${NAMR_SRUN-} == *container* ]] || command -v namr >/dev/null ||
        refuse "there is no .venv/bin/namr in $NAMR_HOME and no namr on the PATH; run make setup there, or set" \
            "NAMR_ENV to a file that activates an environment with it"
}

# A signal is noted and told; `step` passes it on. USR1 comes ahead of a time limit and of some preemptions (--signal),
# TERM with other preemptions, scancel, the time limit itself, and the failure of another node.
stop=
trap 'stop=USR1; say "asked to stop (USR1)"' USR1
trap 'stop=TERM; say "asked to stop (TERM)"' TERM

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

# srun_tasks NODES TASKS WAIT COMMAND…: so many tasks on each of so many nodes, each with all that the job has there.
# When the first has ended, the others have WAIT seconds, or as long as they need (0).
srun_tasks() {
    local nodes=$1 per_node=$2 wait=$3 more
    shift 3
    read -ra more <<<"${NAMR_SRUN-}"
    # What sbatch was asked for is not what each step asks for.
    unset SLURM_GPUS SLURM_GPUS_PER_NODE SLURM_GPUS_PER_SOCKET SLURM_GPUS_PER_TASK SLURM_GPU_BIND SLURM_GRES \
        SLURM_TRES_PER_TASK SLURM_CPUS_PER_TASK SRUN_CPUS_PER_TASK
    # Of a job that asked for GPUs in all, a step on fewer nodes must say how many it wants.
    if ((nodes == 1)) && [[ ${SLURM_GPUS_ON_NODE-} =~ ^[1-9] ]]; then more+=(--gpus-per-node="$SLURM_GPUS_ON_NODE"); fi
    exec srun --export=ALL --nodes="$nodes" --ntasks=$((nodes * per_node)) --ntasks-per-node="$per_node" \
        --overcommit --cpu-bind=none --kill-on-bad-exit=0 --wait="$wait" "${more[@]}" "$NAMR_HOME/slurm/task.sh" "$@"
}

on_first_node() { step srun_tasks 1 1 0 "$@"; }
on_every_node() { step srun_tasks "$SLURM_JOB_NUM_NODES" 1 0 "$@"; }

# on_all_ranks train|evaluate …: the ranks of the job. They end by themselves when one of them breaks, and say where they
# were: a minute for that.
on_all_ranks() {
    local per_node=1
    if [[ $NAMR_LAUNCH == srun ]]; then per_node=$NAMR_RANKS_PER_NODE; fi
    step srun_tasks "$SLURM_JOB_NUM_NODES" "$per_node" 60 ranks "$@"
}

# GPUs that the job has on this node; 1 if it has none.
ranks_of_gpus() {
    local gpus
    IFS=, read -ra gpus <<<"${SLURM_JOB_GPUS-}"
    if [[ ${SLURM_GPUS_ON_NODE-} =~ ^[1-9][0-9]*$ ]]; then
        echo "$SLURM_GPUS_ON_NODE"
    else
        echo $((${#gpus[@]} > 0 ? ${#gpus[@]} : 1))
    fi
}

# A port of this node, the first, that nothing listens at. Jobs that share the node begin to look in different places.
free_port() {
    local port=$((20000 + SLURM_JOB_ID % 10000))
    while (: <"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do port=$((port + 1)); done
    echo "$port"
}

newest_checkpoint() {
    find "$NAMR_RUN_DIR/checkpoints" -maxdepth 1 -name 'step-*' -printf '%f\n' 2>/dev/null | sort | tail -n 1
}

# How often this job has started from what is the newest checkpoint now.
starts_from_here() {
    local starts
    starts=$(grep -cxF "$job $(newest_checkpoint)" "$NAMR_RUN_DIR/.starts" 2>/dev/null) || true
    echo "${starts:-0}"
}

slurm_says() { [[ $(scontrol show job -o "$job") =~ $1 ]]; }
preempted() { slurm_says 'PreemptTime=[0-9]'; }
out_of_time() { [[ $stop == USR1 ]] || slurm_says 'Reason=TimeLimit'; }

# after WHAT CODE: end this job, or queue it again, when WHAT has ended with a CODE that is not 0.
after() {
    local what=$1 code=$2 why
    if [[ $stop ]] && preempted; then
        why="$what made way for another job"
        # That start broke nothing.
        if [[ $counted ]]; then sed -i '$d' "$NAMR_RUN_DIR/.starts" || true; fi # its disk may be full
    elif [[ $stop ]] && ! out_of_time; then
        say "$what was ended by scancel, or by a node that failed; what was saved stays"
        exit "$code"
    elif ((code == 2)); then
        say "$what refused to go on, see above, and would again"
        exit 2
    elif [[ ! $counted ]]; then
        say "$what ended with code $code; see above"
        exit "$code"
    elif (($(starts_from_here) > NAMR_MAX_RESTARTS)); then
        say "$what ended with code $code, and $NAMR_MAX_RESTARTS more starts brought no new checkpoint; see above"
        exit "$code"
    elif [[ $stop ]]; then
        why="$what stopped for the time limit"
    else
        why="$what ended with code $code"
    fi
    say "$why; starting again, from $(newest_checkpoint)"
    trap '' TERM # which Slurm sends at once
    scontrol requeue "$job" || say "Slurm refuses to start it again; the same sbatch goes on"
    exit "$code"
}

# allowed_code WORD…: for each loss or backbone that the words of `namr train` name as module:NAME, the option by which
# the commands that read the run may import it too; a line a word.
allowed_code() {
    local word before=
    for word in "$@"; do
        if [[ $word =~ ^(--set\.(loss\.metric|model\.backbone))=(.*) ]]; then
            before=${BASH_REMATCH[1]} word=${BASH_REMATCH[3]}
        fi
        if [[ $before =~ ^--set\.(loss\.metric|model\.backbone)$ && $word == *:* && $word != timm:* ]]; then
            printf '%s\n' --allow-code "$word"
        fi
        before=$word
    done
}

namr_job() {
    local recipe=$1 data=${NAMR_SHARDS:-shards/$1} threads allow
    shift
    need_namr
    mapfile -t allow < <(allowed_code "$@")
    NAMR_LAUNCH=${NAMR_LAUNCH:-torchrun} NAMR_RUN_DIR=${NAMR_RUN_DIR:-runs/$recipe}
    NAMR_RANKS_PER_NODE=${NAMR_RANKS_PER_NODE:-$(ranks_of_gpus)} NAMR_MAX_RESTARTS=${NAMR_MAX_RESTARTS:-3}
    [[ $NAMR_LAUNCH =~ ^(torchrun|srun|deepspeed)$ ]] ||
        refuse "NAMR_LAUNCH is $NAMR_LAUNCH; set it to torchrun, srun or deepspeed"
    [[ $NAMR_RANKS_PER_NODE =~ ^[1-9][0-9]*$ ]] ||
        refuse "NAMR_RANKS_PER_NODE is $NAMR_RANKS_PER_NODE; set it to a number from 1"
    [[ $NAMR_MAX_RESTARTS =~ ^[0-9]+$ ]] ||
        refuse "NAMR_MAX_RESTARTS is $NAMR_MAX_RESTARTS; set it to a number from 0"
    MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1) MASTER_PORT=${NAMR_PORT:-$(free_port)}
    NAMR_HOSTFILE=$NAMR_RUN_DIR/.hostfile
    threads=$((SLURM_CPUS_ON_NODE / NAMR_RANKS_PER_NODE))
    export NAMR_LAUNCH NAMR_RANKS_PER_NODE NAMR_HOSTFILE MASTER_ADDR MASTER_PORT
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
    say "$recipe → $NAMR_RUN_DIR on $SLURM_JOB_NODELIST, $NAMR_RANKS_PER_NODE ranks a node by $NAMR_LAUNCH," \
        "${SLURM_RESTART_COUNT:-0} restarts"

    counted=
    on_every_node namr preflight "$recipe" --run-dir "$NAMR_RUN_DIR" --ranks-per-node "$NAMR_RANKS_PER_NODE" \
        --limit "${NAMR_PREFLIGHT_SECONDS:-30}" --set.data.path "$data" "$@" || after preflight $?

    mkdir -p "$NAMR_RUN_DIR"
    scontrol show hostnames "$SLURM_JOB_NODELIST" | sed "s/$/ slots=$NAMR_RANKS_PER_NODE/" >"$NAMR_HOSTFILE"
    echo "$job $(newest_checkpoint)" >>"$NAMR_RUN_DIR/.starts"
    counted=1
    # When a node fails, Slurm starts the job again by itself: those starts can be counted here alone.
    if (($(starts_from_here) > NAMR_MAX_RESTARTS + 1)); then after 'the start before' 1; fi

    if [[ ${NAMR_STAGE-} ]]; then
        on_every_node namr shards stage "$data" "$NAMR_STAGE" >"$NAMR_RUN_DIR/.staged" || after staging $?
        data=$(head -n 1 "$NAMR_RUN_DIR/.staged")
        [[ $data ]] || refuse "staging named no folder"
    fi

    if [[ $stop ]] && ! preempted; then refuse 'no time left to train; raise --time, or lower --signal'; fi
    on_all_ranks train "$recipe" --run-dir "$NAMR_RUN_DIR" --resume --set.data.path "$data" "$@" || after training $?
    on_all_ranks evaluate "$NAMR_RUN_DIR" --shards "$data" "${allow[@]}" || after evaluation $?
    on_first_node namr report "$NAMR_RUN_DIR" --shards "$data" "${allow[@]}" || after report $?
}
