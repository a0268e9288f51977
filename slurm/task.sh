#!/usr/bin/env bash
# One task of a step, started by env.sh through srun: `task.sh ranks train RECIPE …` and `task.sh ranks evaluate RUN …`
# start the ranks that are this task's, any other command runs as it is.
set -euo pipefail

# srun passes USR1 on to every process of its step. Ranks ask for it once they train; nothing is to die of it before.
trap '' USR1

# On this node's own disk: on a home that nodes share, ranks wait for each other's files, or find halves of them. A
# folder that is not this user's alone could hold anybody's code.
if [[ ! ${TRITON_CACHE_DIR-} ]]; then
    disk=${TMPDIR:-/tmp}
    [[ -d $disk && -w $disk ]] || disk=/tmp # the variable may come from the node that the job was submitted on
    cache=$disk/namr-triton-$UID
    mkdir -m 700 "$cache" 2>/dev/null || true
    [[ -d $cache && -O $cache && ! -L $cache && $(stat -c %a "$cache") == 700 ]] || cache=$(mktemp -d -p "$disk")
    export TRITON_CACHE_DIR=$cache
fi

read -ra inside <<<"${NAMR_CONTAINER-}"
if [[ $1 != ranks ]]; then exec "${inside[@]}" "$@"; fi
verb=$2
shift 2

meet=(--master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT")
case $NAMR_LAUNCH in
    torchrun)
        exec "${inside[@]}" python -m namr_dist.launchers.torchrun "${meet[@]}" --nnodes "$SLURM_NNODES" \
            --node-rank "$SLURM_NODEID" --nproc-per-node "$NAMR_RANKS_PER_NODE" \
            --module "namr_dist.launchers.$verb" "$@"
        ;;
    srun) # the ranks find their places in Slurm's variables
        exec "${inside[@]}" namr "$verb" "$@"
        ;;
    deepspeed)
        exec "${inside[@]}" deepspeed --hostfile "$NAMR_HOSTFILE" --no_ssh --node_rank "$SLURM_NODEID" "${meet[@]}" \
            --module "namr_dist.launchers.$verb" "$@"
        ;;
esac
