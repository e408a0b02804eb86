#!/bin/bash
#SBATCH --job-name=financial-qa
#SBATCH --nodes=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --mem=96G
#SBATCH --time=02:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
# In the project's folder, on a file system that the nodes share:
#
#   sbatch --export=ALL,RECIPE=recipes/mistral-7b.yaml deploy/slurm.sh
#   sbatch --nodes=2 --gpus-per-node=8 --export=ALL,RECIPE=recipes/mistral-7b.yaml deploy/slurm.sh
#
# Before the time is over the stages are told to end; the next job goes on from the last checkpoint.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?}"
exec deploy/job.sh "${RECIPE:?}"
