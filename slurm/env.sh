# shellcheck shell=bash
# What a site changes. Every script here reads this file in the batch shell, in the repository's folder, before it starts the ranks;
# what is exported reaches all of them. `megakd submit --setup 'source slurm/env.sh'` reads it as well.

# Modules, where the system's compilers and drivers are not enough (DeepSpeed compiles its operators on first use):
# module purge
# module load cuda/12.8 gcc/13

# The environment that `make install` made; without it, whatever `python` and `megakd` the PATH has (a conda environment, a container's).
if [ -f .venv/bin/activate ]; then
    # shellcheck source=/dev/null
    source .venv/bin/activate
fi

# Each rank decodes in data.workers processes; threads beyond that fight over its CPUs.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

# Caches lie in the home folder. Where that is small, slow or not on the compute nodes, name a folder that all nodes share:
# export HF_HOME=/shared/huggingface                      # teachers that are downloaded; without a network: teacher.pretrained=FILE
# export TORCH_EXTENSIONS_DIR=/shared/torch_extensions    # DeepSpeed's compiled operators: 50 s once, then 3 s a start
# export HF_HUB_OFFLINE=1                                 # compute nodes without a network

# NCCL, where it does not choose the right network by itself:
# export NCCL_SOCKET_IFNAME=ib0
# export NCCL_IB_HCA=mlx5
# export NCCL_DEBUG=INFO

# A container by pyxis: srun reads these.
# export SLURM_CONTAINER_IMAGE=/shared/megakd.sqsh
# export SLURM_CONTAINER_MOUNTS=/data:/data,/shared:/shared,$PWD:$PWD SLURM_CONTAINER_WORKDIR=$PWD
