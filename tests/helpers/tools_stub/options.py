"""The options of the real tools and the fields of their files; ``=`` after an option that takes a value.

From the help of docker 28.2, kubectl 1.32, SkyPilot 0.14, SLURM 22.05, aws-cli 1.45 and pip 26, SkyPilot's
schema of tasks, and Kubeflow's and Kubernetes' models; what this repository will not use is left out.
"""

from __future__ import annotations

from typing import Any


def names(text: str) -> dict[str, Any]:
    return dict.fromkeys(text.split())


DOCKER_BUILD = """
--add-host= --build-arg= --cache-from= --cgroup-parent= --compress --cpu-period= --cpu-quota= -c=
--cpu-shares= --cpuset-cpus= --cpuset-mems= -f= --file= --force-rm --iidfile= --isolation= --label= -m=
--memory= --memory-swap= --network= --no-cache --platform= --pull -q --quiet --rm --security-opt= --shm-size=
-t= --tag= --target= --ulimit="""
DOCKER_RUN = """
--add-host= --cap-add= --cap-drop= --cpus= -d --detach --device= --dns= --entrypoint= -e= --env= --env-file=
--gpus= --group-add= -h= --hostname= --init -i --interactive --ipc= -l= --label= --log-driver= -m= --memory=
--mount= --name= --network= --platform= --privileged -p= --publish= --pull= -q --quiet --read-only --restart=
--rm --runtime= --security-opt= --shm-size= --stop-signal= --stop-timeout= --tmpfs= -t --tty --ulimit= -u=
--user= -v= --volume= -w= --workdir="""
COMPOSE_RUN = """
--build --cap-add= --cap-drop= -d --detach --entrypoint= -e= --env= --env-from-file= -i --interactive -l=
--label= --name= -T --no-TTY --no-deps -p= --publish= --pull= -q --quiet --quiet-build --quiet-pull
--remove-orphans --rm -P --service-ports --use-aliases -u= --user= -v= --volume= -w= --workdir="""
KUBECTL_APPLY = """
--all --cascade= --dry-run= --field-manager= -f= --filename= --force --force-conflicts --grace-period= -k=
--kustomize= -n= --namespace= -o= --output= --overwrite --prune -R --recursive -l= --selector= --server-side
--timeout= --validate= --wait"""
SKY_JOBS_LAUNCH = """
--config= -n= --name= --workdir= --infra= --num-nodes= --cpus= --memory= --disk-size= --disk-tier=
--network-tier= --use-spot --no-use-spot --image-id= --env-file= --env= --secret-file= --secret= --gpus= -t=
--instance-type= --ports= --priority= --async --no-async --job-recovery= -d --detach-run -p= --pool=
--num-jobs= --job-group= --git-url= --git-ref= -w= --workspace= -y --yes"""
AWS_S3 = {
    "sync": "--dryrun --quiet --include= --exclude= --acl= --storage-class= --delete --exact-timestamps",
    "rm": "--dryrun --quiet --recursive --include= --exclude= --only-show-errors",
}
PIP_INSTALL = """
-e= --editable= -r= --requirement= -c= --constraint= -q --quiet -U --upgrade --no-deps --index-url=
--extra-index-url= --pre --user --target="""
OF_A_JOB = """
-A= --account= -c= --cpus-per-task= --comment= -d= --dependency= -D= --chdir= -e= --error= --export= --gres=
-i= --input= -J= --job-name= -k --no-kill -M= --clusters= -m= --distribution= --mem= --mem-per-cpu=
--mem-per-gpu= -n= --ntasks= --ntasks-per-node= -N= --nodes= -o= --output= -O --overcommit -p= --partition=
-q= --qos= -Q --quiet --reservation= --signal= -t= --time= --time-min= -v --verbose -w= --nodelist= -x=
--exclude= --exclusive -C= --constraint= --cpus-per-gpu= -G= --gpus= --gpu-bind= --gpus-per-node=
--gpus-per-task="""
SBATCH = f"""{OF_A_JOB}
-a= --array= -b= --begin= --deadline= --get-user-env -H --hold --mail-type= --mail-user= --nice --open-mode=
--parsable --requeue --no-requeue --test-only -W --wait --wckey= --wrap="""
SRUN = f"{OF_A_JOB} -K= --kill-on-bad-exit= -l --label --mpi= --overlap --pty -u --unbuffered -W= --wait="

SKY_TASK = {
    **names("name num_nodes workdir envs setup run secrets volumes"),
    "resources": names(
        """accelerators any_of autostop cpus disk_size disk_tier image_id infra instance_type job_recovery
        labels memory network_tier ordered ports priority use_spot volumes"""
    ),
    "file_mounts": {"*": names("name source store persistent mode config")},
}
POD = {
    **names("terminationGracePeriodSeconds nodeSelector tolerations affinity securityContext"),
    "containers": {
        **names("name image command args workingDir ports imagePullPolicy securityContext"),
        "env": names("name value valueFrom"),
        "resources": names("limits requests"),
        "volumeMounts": names("name mountPath readOnly subPath"),
    },
    "volumes": {
        "name": None,
        "persistentVolumeClaim": names("claimName readOnly"),
        "emptyDir": names("medium sizeLimit"),
    },
}
PYTORCH_JOB = {
    **names("apiVersion kind"),
    "metadata": names("name namespace labels annotations"),
    "spec": {
        "nprocPerNode": None,
        "elasticPolicy": names(
            """maxReplicas maxRestarts metrics minReplicas rdzvBackend rdzvConf rdzvHost rdzvId rdzvPort
            standalone"""
        ),
        "runPolicy": names(
            """activeDeadlineSeconds backoffLimit cleanPodPolicy schedulingPolicy suspend
            ttlSecondsAfterFinished"""
        ),
        "pytorchReplicaSpecs": {
            "*": {**names("replicas restartPolicy"), "template": {"metadata": None, "spec": POD}}
        },
    },
}
