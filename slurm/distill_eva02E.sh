#!/bin/bash
# EVA02-E-14-plus (5.0 billion weights, in 8 bit, shared out by ZeRO-3) teaches a ViT-S/16,
# on 4 nodes of 8 GPUs. The recipe says what is learned (megakd/recipe/shipped/distill_eva02E.toml), the JSON how it runs.
#
#     sbatch slurm/distill_eva02E.sh --set data.train='/data/mine/{00000..09999}.tar'          # in the repository's folder
#     sbatch --partition=gpu --account=me --nodes=2 slurm/distill_eva02E.sh --set optim.lr=5e-4
#
# sbatch's own options come before the script's name and win over the lines below; what follows it goes to megakd/train.py.
# Needs: the path of your shards, in the recipe or by --set, and those of evaluation sets if the student is to be scored; what your site
# wants in slurm/env.sh. Check first, in seconds, on one machine:
#     python megakd/train.py --recipe distill_eva02E --ds_config ds_configs/zero1_bf16.json --dry_run
# Memory: 23.4 GB of 80 a GPU, 22.5 of them the student's activations; the teacher's share 0.17 GB, its gathered blocks 0.24 GB
#         (megakd plan --recipe distill_eva02E --gpus 32 --gpu_memory 80 --ds_config ds_configs/zero1_bf16.json)
#
# Stopped by its time limit or by a preemption, the job saves at the step's end, goes back into the queue under its id and goes on from
# there; after the loss of a node, from the last checkpoint. The log is appended to; runs/NAME-JOBID stays the run folder.

#SBATCH --job-name=distill_eva02E
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
# 180 s before the limit: longer than a step and a checkpoint take.
#SBATCH --signal=USR1@180

set -uo pipefail
cd "${SLURM_SUBMIT_DIR:?start this script with sbatch}" || exit 2
if [ ! -f slurm/job.sh ]; then
    echo "error: $PWD is not megakd's repository: cd there, then sbatch slurm/distill_eva02E.sh" >&2
    exit 2
fi
source slurm/job.sh

run=runs/$SLURM_JOB_NAME-$SLURM_JOB_ID
# A rank that dies takes the others along: they would wait for it to the time limit.
srun --kill-on-bad-exit=1 python megakd/train.py --recipe distill_eva02E --ds_config ds_configs/zero1_bf16.json --out "$run" "$@"
finish $? "the same command with --out $(out_of "$run" "$@") after the script's name"
