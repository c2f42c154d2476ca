#!/bin/bash
# A language decoder learns to answer questions about images from a student's vision tower: LoRA on the decoder, the tower stays, on one
# node of 8 GPUs. The recipe says what is learned (megakd/recipe/shipped/vqa_lora.toml), the JSON how it runs.
#
#     sbatch slurm/vqa_lora.sh                       # in the repository's folder; the shapes world: megakd shapes data/shapes comes first
#     sbatch slurm/vqa_lora.sh --recipe my_vqa.toml  # a student, a decoder and questions of your own: copy the recipe and change it
#     sbatch slurm/vqa_lora.sh --recipe vqa_alongside
#
# sbatch's own options come before the script's name and win over the lines below; what follows it goes to megakd/train.py.
# What the recipe starts from and names a recipe for (student, decoder, projector) is trained first where it is not there. Check first:
#     python megakd/train.py --recipe vqa_lora --ds_config ds_configs/zero2_bf16.json --dry_run
#
# Stopped by its time limit or by a preemption, the job saves at the step's end, goes back into the queue under its id and goes on from
# there; after the loss of a node, from the last checkpoint. The log is appended to; runs/NAME-JOBID stays the run folder.

#SBATCH --job-name=vqa_lora
#SBATCH --nodes=1
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
    echo "error: $PWD is not megakd's repository: cd there, then sbatch slurm/vqa_lora.sh" >&2
    exit 2
fi
source slurm/job.sh

run=runs/$SLURM_JOB_NAME-$SLURM_JOB_ID
# A rank that dies takes the others along: they would wait for it to the time limit.
srun --kill-on-bad-exit=1 python megakd/train.py --recipe vqa_lora --ds_config ds_configs/zero2_bf16.json --out "$run" "$@"
finish $? "the same command with --out $(out_of "$run" "$@") after the script's name"
