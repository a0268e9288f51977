#!/usr/bin/env bash
# Stanford Online Products:  sbatch slurm/train_sop.sh [--set.section.field value …]
#
# From the repository's folder, or with NAMR_HOME set to it. Options of sbatch go before the script, and win:
#     sbatch --nodes=4 --partition=gpu slurm/train_sop.sh --set.optim.steps 20000
#     sbatch --gpus-per-node=0 slurm/train_sop.sh                                   # on CPUs
#SBATCH --job-name=sop
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32      # of a node, for all its ranks and their data workers
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300     # so many seconds ahead, write a checkpoint; the job then starts again
#SBATCH --requeue
#SBATCH --open-mode=append      # all starts in one log
#SBATCH --output=%x-%j.log

NAMR_SHARDS=${NAMR_SHARDS:-shards/sop}      # from: namr shards build sop DOWNLOAD --out shards/sop
NAMR_RUN_DIR=${NAMR_RUN_DIR:-runs/sop}      # a job goes on with the run that it finds there
NAMR_LAUNCH=${NAMR_LAUNCH:-torchrun}        # or srun, or deepspeed
NAMR_STAGE=${NAMR_STAGE-}                   # folder on each node's own disk to copy the shards to

NAMR_HOME=${NAMR_HOME:-$SLURM_SUBMIT_DIR}
# shellcheck source-path=SCRIPTDIR source=env.sh
source "$NAMR_HOME/slurm/env.sh" || exit 2  # says what else can be chosen
namr_job sop "$@"
