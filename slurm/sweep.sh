#!/bin/bash
# One run for each combination of teachers, seeds and weights of the similarity loss, as a job array: one node of 8 GPUs a run, at most
# four runs at once.
#
#     sbatch slurm/sweep.sh                                                              # in the repository's folder
#     TEACHERS='ViT-L-14@laion2b_s32b_b82k' SEEDS='0 1 2' WEIGHTS='1.0' sbatch --array=0-2 slurm/sweep.sh --set optim.steps=5000
#     sbatch --array=3 slurm/sweep.sh                                                    # one of them alone
#
# --array is to match the number of combinations, which counts teachers slowest and weights fastest. To sweep over another setting, replace
# a list below and its --set. What follows the script's name goes to megakd/train.py, in every run. Each run is resumed like
# slurm/distill_vitbigG.sh's; `megakd jobs runs/sweep-JOBID` shows them together.

#SBATCH --job-name=sweep
#SBATCH --array=0-7%4
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --output=%x-%A_%a.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=USR1@180

set -uo pipefail
cd "${SLURM_SUBMIT_DIR:?start this script with sbatch}" || exit 2
if [ ! -f slurm/job.sh ]; then
    echo "error: $PWD is not megakd's repository: cd there, then sbatch slurm/sweep.sh" >&2
    exit 2
fi
source slurm/job.sh

# MODEL@PRETRAINED; names with weights of their own (hf-hub:ORG/NAME, local-dir:FOLDER) stand without @. MODE is their teacher.mode.
read -ra teachers <<<"${TEACHERS:-ViT-L-14@laion2b_s32b_b82k ViT-H-14@laion2b_s32b_b79k}"
read -ra seeds <<<"${SEEDS:-0 1}"
read -ra weights <<<"${WEIGHTS:-0.5 1.0}"

count=$((${#teachers[@]} * ${#seeds[@]} * ${#weights[@]}))
index=${SLURM_ARRAY_TASK_ID:?start this script with sbatch --array}
if [ "$index" -ge "$count" ]; then
    echo "error: task $index of the array: there are $count combinations, so sbatch --array=0-$((count - 1)) slurm/sweep.sh" >&2
    exit 2
fi
weight=${weights[index % ${#weights[@]}]}
seed=${seeds[index / ${#weights[@]} % ${#seeds[@]}]}
teacher=${teachers[index / ${#weights[@]} / ${#seeds[@]}]}

mode=${MODE:-zero3_int8}
table="model = '${teacher%%@*}', mode = '$mode'"
if [[ $mode == *int8 ]]; then
    table+=", calibration = 64" # in 8 bit alone, where outliers would cost much
fi
if [[ $teacher == *@* ]]; then
    table+=", pretrained = '${teacher#*@}'"
fi
run=runs/$SLURM_JOB_NAME-$SLURM_ARRAY_JOB_ID/$index
echo "task $index of $count: teacher $teacher, seed $seed, similarity $weight, run folder $run"
srun --kill-on-bad-exit=1 python megakd/train.py --recipe "${RECIPE:-distill_vitbigG}" --ds_config ds_configs/zero1_bf16.json \
    --out "$run" --set "teacher={ $table }" --set "seed=$seed" --set "objectives.similarity=$weight" "$@"
finish $? "the same command with sbatch --array=$index"
