#!/usr/bin/env bash
# Cars196:  sbatch slurm/train_cars.sh [--set.section.field value …]
#
# From the folder of the repository, or with NAMR_HOME set to it. sbatch's own options stand before the script, and win:
#     sbatch --nodes=4 --partition=gpu slurm/train_cars.sh --set.data.classes_per_batch 96
#     sbatch --gpus-per-node=0 slurm/train_cars.sh      # on CPUs
#SBATCH --job-name=cars
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32                  # of a node, for its ranks and their data workers
#SBATCH --time=04:00:00                     # then it starts again, where it was
#SBATCH --signal=B:USR1@300                 # seconds ahead of that in which to write a checkpoint
#SBATCH --requeue
#SBATCH --open-mode=append                  # one log for all starts
#SBATCH --output=%x-%j.log

NAMR_SHARDS=${NAMR_SHARDS:-shards/cars}     # made by: namr shards build cars DOWNLOAD --out shards/cars
NAMR_RUN_DIR=${NAMR_RUN_DIR:-runs/cars}     # a job goes on with the run that it finds there
NAMR_LAUNCH=${NAMR_LAUNCH:-torchrun}        # or srun, or deepspeed
NAMR_STAGE=${NAMR_STAGE-}                   # a folder on each node's own disk to copy the shards to
# more of them: env.sh

# Slurm runs a copy of this script, so it finds env.sh by the folder that it was submitted from.
if [[ ! ${SLURM_JOB_ID-} ]]; then
    echo "$0 is a batch job; submit it: sbatch $0" >&2
    exit 2
fi
NAMR_HOME=${NAMR_HOME:-${SLURM_SUBMIT_DIR:-$PWD}}
if [[ ! -r $NAMR_HOME/slurm/env.sh ]]; then
    echo "job $SLURM_JOB_ID: there is no slurm/env.sh in $NAMR_HOME; submit from the folder of the repository," \
        "or set NAMR_HOME to it" >&2
    exit 2
fi
# shellcheck source-path=SCRIPTDIR source=env.sh
source "$NAMR_HOME/slurm/env.sh" || exit 2
namr_job cars "$@"
