#!/bin/bash
# Several nodes by hand: the same line on each of them. HOST is the first node; all see the folder of the run.
#   NODES=4 GPUS=8 HOST=node1:29500 JOB=ar_large experiments/launch/torchrun.sh experiments/imagenet256/ar_large.yaml [key=value ...]
# A rank that dies is restarted with all others, from the last checkpoint, up to three times. SIGTERM to this script saves
# and ends. The python on the PATH is the one that runs: activate its environment first.
set -euo pipefail
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TORCH_NCCL_ASYNC_ERROR_HANDLING=1
# A signal to torchrun reaches the ranks; they have this long to save (PyTorch 2.9 and later read it).
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${GRACE_SECONDS:-120}"
exec python -m torch.distributed.run --nnodes "${NODES:-1}" --nproc_per_node "${GPUS:-8}" \
  --rdzv_backend c10d --rdzv_endpoint "${HOST:-localhost:29500}" --rdzv_id "${JOB:-train}" --max_restarts 3 \
  -m lit_transdiff train "$@"
