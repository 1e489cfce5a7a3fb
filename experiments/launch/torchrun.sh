#!/bin/bash
# Several nodes without a scheduler: start the same line on each of them. HOST is the first node; all must see the run folder.
#   NODES=4 GPUS=8 HOST=node1:29500 JOB=ar_large experiments/launch/torchrun.sh experiments/imagenet256/ar_large.yaml [key=value ...]
# If a rank dies, all ranks restart from the last checkpoint, up to three times. SIGTERM to this script saves
# and ends. The script uses the python on the PATH: activate its environment first.
set -euo pipefail
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TORCH_NCCL_ASYNC_ERROR_HANDLING=1
# torchrun forwards signals to the ranks, which then have this time to save (read by PyTorch 2.9 and later).
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${GRACE_SECONDS:-120}"
exec python -m torch.distributed.run --nnodes "${NODES:-1}" --nproc_per_node "${GPUS:-8}" \
  --rdzv_backend c10d --rdzv_endpoint "${HOST:-localhost:29500}" --rdzv_id "${JOB:-train}" --max_restarts 3 \
  -m lit_transdiff train "$@"
