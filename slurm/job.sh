# shellcheck shell=bash
# What the scripts of this folder have in common; nothing here is a site's to change.

# Ranks are SLURM's: sbatch hands on what a shell under torchrun, or in another job, had for them. env.sh may set the last two.
unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT

set +u # what a site sources there, conda or modules, reads variables that may not be set
source slurm/env.sh
set -u

# The log as it really is, also after `sbatch --output=...`: run.json names it, `megakd jobs` shows it.
MEGAKD_LOG=$(readlink -f "/proc/$$/fd/1")
export MEGAKD_LOG
export PYTHONUNBUFFERED=1

# srun hands the batch shell's environment on, also where sbatch was called with --export=NONE.
export SLURM_EXPORT_ENV=ALL
# Since SLURM 22.05 srun no longer takes --cpus-per-task from the job by itself; up to 23.02 it wants it under this name.
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then
    export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"
fi

source megakd/jobs/requeue.sh

# out_of RUN ARGUMENTS: the run folder, which is RUN unless the arguments of the script name another.
out_of() {
    local run=$1 before=''
    shift
    for argument in "$@"; do
        [ "$before" != --out ] || run=$argument
        [[ $argument != --out=* ]] || run=${argument#--out=}
        before=$argument
    done
    echo "$run"
}
