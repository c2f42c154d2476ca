#!/bin/bash
# Writes a teacher's embeddings of the training set to a store, on one node of 8 GPUs; training then reads them instead of running the
# teacher, which costs many times the student.
#
#     sbatch slurm/embed.sh                                                              # in the repository's folder
#     sbatch slurm/distill_vitbigG.sh --set teacher.store=stores/distill_vitbigG         # afterwards
#     RECIPE=my.toml STORE=/data/stores/mine VIEWS=4 sbatch --nodes=4 slurm/embed.sh --set data.train='/data/mine/*.tar'
#
# What follows the script's name goes to `megakd embed` (--dtype, --set key=value, --check). Data, views, seed and teacher must be those
# of the training, or it refuses the store.
# Preempted, at its time limit or after the loss of a node, the job goes back into the queue and keeps the parts that are written; one part
# a rank is lost at most. After a crash or scancel the same command goes on from them.

#SBATCH --job-name=embed
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
# To this shell alone (B:): the ranks have nothing to save.
#SBATCH --signal=B:USR1@60

set -uo pipefail
cd "${SLURM_SUBMIT_DIR:?start this script with sbatch}" || exit 2
if [ ! -f slurm/job.sh ]; then
    echo "error: $PWD is not megakd's repository: cd there, then sbatch slurm/embed.sh" >&2
    exit 2
fi
source slurm/job.sh

recipe=${RECIPE:-distill_vitbigG}
store=${STORE:-stores/$(basename "$recipe" .toml)}
trap 'requeue "the same command with STORE=$store"' USR1
srun --kill-on-bad-exit=1 megakd embed --recipe "$recipe" --views "${VIEWS:-1}" --out "$store" "$@" &
wait $!
