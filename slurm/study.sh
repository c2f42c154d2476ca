#!/bin/bash
# A study, teachers x students x methods x seeds, on one node: a run a GPU, as many at once as the node has.
#
#     sbatch slurm/study.sh my_study.toml                          # in the repository's folder; a shipped study's name does as well
#     sbatch --gpus-per-node=4 slurm/study.sh my_study.toml --small
#
# What follows the study goes to `megakd study` (--out, --small). Runs that need a node or more each are sent as job arrays from the login
# node instead: megakd study my_study.toml --cluster slurm --nodes 2 --gpus_per_node 8.
# Preempted, at its time limit or after the loss of the node, the job goes back into the queue, and the study goes on from its runs' last
# checkpoints. `megakd study my_study.toml --watch` shows how far it is, `megakd report runs/my_study` makes the page.

#SBATCH --job-name=study
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
# To this shell alone (B:), which hands it on to the study.
#SBATCH --signal=B:USR1@180

set -uo pipefail
cd "${SLURM_SUBMIT_DIR:?start this script with sbatch}" || exit 2
if [ ! -f slurm/job.sh ]; then
    echo "error: $PWD is not megakd's repository: cd there, then sbatch slurm/study.sh" >&2
    exit 2
fi
source slurm/job.sh

study=${1:?give a study: sbatch slurm/study.sh my_study.toml}
shift
# No srun: the study starts its runs itself, each of one rank.
megakd study "$study" --at_once "${SLURM_GPUS_ON_NODE:-2}" "$@" &
running=$!
stop() {
    kill -TERM "$running"
    wait "$running"
    requeue "the same command"
    exit 85
}
trap stop USR1 TERM
wait "$running"
