"""One run on SLURM by way of submitit, requeued until it is done:

    python experiments/launch/submitit_train.py --nodes 4 experiments/imagenet256/ar_large.yaml

Every task starts ``lit-transdiff train`` with the rest of the line. Before the time limit and when the job is
preempted, submitit calls ``checkpoint`` of the first task: all ranks save and end, and the requeued job
continues. Needs ``pip install submitit``; ``--cluster local --gpus 1`` tries it on this machine.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor

import submitit

TRAIN = (sys.executable, "-m", "lit_transdiff", "train")
GRACE_SECONDS = 180  # between submitit's signal and the end of the job


class Training:
    """A task of the job: one process of the run."""

    def __init__(self, command: list[str]) -> None:
        self.command = command

    def __call__(self) -> None:
        """Run the command to its end; an exit code other than 0 is that of the task."""
        # SLURM signals the whole group of the task, and submitit's signal would end the command unsaved.
        self.process = subprocess.Popen(self.command, start_new_session=True)
        signal.signal(signal.SIGTERM, lambda *_: self.process.terminate())
        with ThreadPoolExecutor(1) as pool:
            self.code: Future[int] = pool.submit(self.process.wait)
            if code := self.code.result():
                sys.exit(code)

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """Stop the run, which saves, and return what the requeued job does: the same."""
        self.process.send_signal(signal.SIGUSR1)
        self.code.result()
        return submitit.helpers.DelayedSubmission(Training(self.command))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--cluster", choices=("slurm", "local"), default="slurm")
    parser.add_argument("--folder", default="runs/submitit", help="for logs; all nodes see it")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--gpus", type=int, default=8, help="per node")
    parser.add_argument("--hours", type=int, default=24)
    parser.add_argument("--partition")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of lit-transdiff train")
    args = parser.parse_args()
    executor = submitit.AutoExecutor(args.folder, cluster=args.cluster)
    executor.update_parameters(
        name="lit-transdiff",
        nodes=args.nodes,
        tasks_per_node=args.gpus,
        gpus_per_node=args.gpus,
        timeout_min=60 * args.hours,
        slurm_partition=args.partition,
        slurm_cpus_per_task=12,
        slurm_signal_delay_s=GRACE_SECONDS,
    )
    job = executor.submit(Training([*TRAIN, *args.arguments]))
    print(f"job {job.job_id}: {job.paths.stdout}")


if __name__ == "__main__":
    main()
