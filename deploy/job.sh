#!/usr/bin/env bash
# Run the pipeline as a job on a rented or shared machine, and send what came of it to the DVC remote.
#
#   deploy/job.sh RECIPE [REVISION]
#
# RECIPE becomes params.yaml; REVISION, a commit or tag, is checked out first where the job has a clone of its own.
# From the environment: MLFLOW_TRACKING_URI, DVC_REMOTE_URL and their credentials. Without them MLflow's file is the
# project's own and nothing is sent.
set -euo pipefail
cd "$(dirname "$0")/.."
recipe=${1:?usage: deploy/job.sh RECIPE [REVISION]}
[ -z "${2:-}" ] || git checkout --quiet --detach "$2"
make --silent .venv/bin/ready
export PATH=$PWD/.venv/bin:$PATH
if [ -n "${DVC_REMOTE_URL:-}" ]; then
    dvc remote add --local --force --default job "$DVC_REMOTE_URL"
    dvc fetch --run-cache || echo "nothing of this revision is in the remote yet"
fi
cmp --silent "$recipe" params.yaml || cp "$recipe" params.yaml
if [ "${SLURM_NNODES:-1}" -gt 1 ]; then # one process for each GPU of every machine; what follows runs on this one
    dvc repro format
    srun --ntasks-per-node=1 python -m torch.distributed.run --nnodes "$SLURM_NNODES" \
        --nproc-per-node "${SLURM_GPUS_ON_NODE:?}" --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d \
        --rdzv-endpoint "$(hostname):29500" -m stages.train
    dvc commit --force train
fi
dvc repro
[ -z "${DVC_REMOTE_URL:-}" ] || dvc push --run-cache
