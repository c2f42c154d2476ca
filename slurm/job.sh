# shellcheck shell=bash
# What the scripts of this folder have in common; nothing here is a site's to change.

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

# finish CODE RUN: the end of a batch script whose ranks ended with CODE. 85 says: saved after a signal, to be gone on with. SIGUSR1 and
# SIGUSR2 (138, 140) end ranks that have not come to their first line; a preemption's SIGTERM those that still start, which the job's record
# tells from the one that --kill-on-bad-exit sends after a crash.
finish() {
    case $1 in
        85 | 138 | 140) requeue "$2" ;;
        143) ! scontrol --oneliner show job "$SLURM_JOB_ID" | grep --quiet ' PreemptTime=[0-9]' || requeue "$2" ;;
    esac
    exit "$1"
}

# requeue RUN: send this job back into the queue, under its id, and wait for SLURM to end this shell. Returns when SLURM refuses, and when
# the job is ending anyway: one that its user cancelled gets SIGTERM as well, and must not come back. During a preemption's grace a job
# still counts as running; SLURM's own requeue finds nothing left to do then.
requeue() {
    local state
    state=$(scontrol --oneliner show job "$SLURM_JOB_ID" | grep --only-matching ' JobState=[A-Z_]*')
    if [ "$state" != " JobState=RUNNING" ]; then
        echo "job $SLURM_JOB_ID is ending by itself ($state ), it is not requeued"
        return
    fi
    echo "requeueing job $SLURM_JOB_ID"
    scontrol requeue "$SLURM_JOB_ID" && sleep 600
    echo "SLURM did not requeue job $SLURM_JOB_ID; the same sbatch command writing to $1 (--out, after the script) goes on from what was saved"
}
