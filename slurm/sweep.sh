#!/usr/bin/env bash
# Losses × ranking weights × seeds, and one table over them:  slurm/sweep.sh RECIPE [--set.section.field value …]
#
# Started like any program, not by sbatch: it submits an array with a job a run, each with preflight, checkpoints and
# restarts as in train_sop.sh, and a last job that writes the table of all that ended well, FOLDER/report.html.
#     LOSSES="triplet margin" SEEDS="0 1" slurm/sweep.sh sop --set.optim.steps 6000
#     NAMR_SBATCH="--partition=gpu --time=6:00:00" slurm/sweep.sh cub      # options of sbatch, for all its jobs
#     slurm/sweep.sh table FOLDER                             # within a job: the table alone
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32                  # of a node, for its ranks and their data workers
#SBATCH --time=24:00:00                     # then a run starts again, where it was
#SBATCH --signal=B:USR1@300                 # seconds ahead of that in which to write a checkpoint
#SBATCH --requeue
#SBATCH --open-mode=append                  # one log for all starts of a run
#SBATCH --output=%x-%A_%a.log
set -euo pipefail

read -ra losses <<<"${LOSSES:-triplet margin multi_similarity proxy_anchor}" # values of loss.metric; preflight knows them
read -ra weights <<<"${WEIGHTS:-0 2}"       # λ of multi-cluster ranking; 0 leaves it out
read -ra seeds <<<"${SEEDS:-0 1 2}"
recipe=${1:?RECIPE, such as sop, is missing; the head of this script says more}
folder=${NAMR_SWEEP_DIR:-runs/sweep-$recipe}

export NAMR_HOME=${NAMR_HOME:-${SLURM_SUBMIT_DIR:-$PWD}}
this=$NAMR_HOME/slurm/sweep.sh
if [[ $recipe != table && ! ${SLURM_ARRAY_TASK_ID-} ]]; then
    last=$((${#losses[@]} * ${#weights[@]} * ${#seeds[@]} - 1))
    read -ra options <<<"${NAMR_SBATCH-}"
    export LOSSES="${losses[*]}" WEIGHTS="${weights[*]}" SEEDS="${seeds[*]}"
    options+=(--export=ALL) # a job finds its run by its number in these lists
    runs=$(sbatch --parsable "${options[@]}" --job-name="sweep-$recipe" --array="0-$last" "$this" "$@")
    table=$(sbatch --parsable "${options[@]}" --job-name="table-$recipe" --dependency="afterany:$runs" \
        --output=%x-%j.log --gpus-per-node=0 --cpus-per-task=1 --time=01:00:00 "$this" table "$folder")
    echo "$((last + 1)) runs: job $runs; then the table: job $table → $folder/report.html"
    exit
fi

# shellcheck source-path=SCRIPTDIR source=env.sh
source "$NAMR_HOME/slurm/env.sh" || exit 2
if [[ $recipe == table ]]; then
    need_namr
    on_first_node namr report "$2"
    exit
fi

loss=${losses[SLURM_ARRAY_TASK_ID % ${#losses[@]}]}
rest=$((SLURM_ARRAY_TASK_ID / ${#losses[@]}))
weight=${weights[rest % ${#weights[@]}]}
seed=${seeds[rest / ${#weights[@]}]}
NAMR_RUN_DIR=$folder/${loss//:/.}-$weight-$seed
shift
namr_job "$recipe" --set.loss.metric "$loss" --set.loss.ranking.weight "$weight" --set.train.seed "$seed" "$@"
