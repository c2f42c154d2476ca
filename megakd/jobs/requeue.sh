# shellcheck shell=bash
# How a job's batch shell ends, on the first node and outside any container. slurm/*.sh read this file, `megakd submit` sends its text.
# The whole story of a preemption is told in runtime/preemption.py; this is its fifth step.

# finish CODE HOW: the end of a job whose ranks ended with CODE. 85 says: saved after a signal, to be gone on with. SIGUSR1 and SIGUSR2
# (138, 140) end ranks that have not come to their first line; a preemption's SIGTERM those that still start, which the job's record tells
# from the one that --kill-on-bad-exit sends after a crash.
finish() {
    case $1 in
        85 | 138 | 140) requeue "$2" ;;
        143) [[ $(record) != *' PreemptTime='[0-9]* ]] || requeue "$2" ;;
    esac
    exit "$1"
}

# record: what SLURM knows of this job; nothing, where its controller does not answer for two minutes. It is busy when it preempts many.
# The last task of an array has the array's own number as SLURM_JOB_ID, by which scontrol means all of them.
record() {
    local found
    for _ in {1..24}; do
        if found=$(scontrol --oneliner show job "$SLURM_JOB_ID"); then
            grep "^JobId=$SLURM_JOB_ID " <<<"$found"
            return
        fi
        sleep 5
    done
}

# requeue HOW: send this job back into the queue, under its id, and wait for SLURM to end this shell. Returns when SLURM refuses, having
# said HOW to go on by hand, and when the job is known to be ending anyway: one that its user cancelled gets SIGTERM as well, and must not
# come back. During a preemption's grace a job still counts as running; SLURM's own requeue finds nothing left to do then.
requeue() {
    local found job=$SLURM_JOB_ID state='' refused=0
    found=$(record)
    if [[ $found =~ \ ArrayJobId=([0-9]+)\ ArrayTaskId=([0-9]+)\  ]]; then
        job=${BASH_REMATCH[1]}_${BASH_REMATCH[2]}
    elif [ -z "$found" ] && [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then # which a job has too that was submitted from such a task
        job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
    fi
    [[ $found =~ \ JobState=([A-Z_]+) ]] && state=${BASH_REMATCH[1]}
    if [ "${state:-RUNNING}" != RUNNING ]; then
        echo "job $job is ending by itself (JobState=$state), it is not requeued"
        return
    fi
    echo "requeueing job $job"
    for _ in {1..24}; do
        scontrol requeue "$job" && sleep 600
        # From a controller that answers it was a refusal.
        ! scontrol show job "$job" >/dev/null 2>&1 || refused=$((refused + 1))
        [ "$refused" -lt 3 ] || break
        sleep 5
    done
    echo "SLURM did not requeue job $job; $1 goes on from what was saved"
}
