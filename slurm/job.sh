# shellcheck shell=bash
# What teacher.sbatch and distill.sbatch share: source it, then  kd_run KIND RUN [OPTIONS...]
#
# On every node srun starts one supervisor for each GPU, and each supervisor a rank: the same ones that launch.submit starts.
# Slurm's warning (USR2, two minutes before the time limit or at preemption) comes to them: all ranks finish their step and save
# together, and the job is requeued. scancel's SIGTERM comes to them too: they save and end, and nobody requeues.

if [ ! -d kd_dist ]; then
    echo "kd_dist is not in $PWD: type sbatch in the folder that holds kd_dist/ and slurm/." >&2
    exit 2
fi
# shellcheck source=slurm/site.conf
. slurm/site.conf
if [ -n "$SITE_ACTIVATE" ]; then
    eval "$SITE_ACTIVATE"
fi
if [ -x .venv/bin/python ]; then
    PATH="$PWD/.venv/bin:$PATH"
fi
if [ -n "$SITE_INTERFACE" ]; then
    export GLOO_SOCKET_IFNAME="$SITE_INTERFACE" NCCL_SOCKET_IFNAME="$SITE_INTERFACE"
fi

kd_run() {
    local kind=$1 run=$2 ranks cpus limit
    shift 2
    ranks=${KD_RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
    cpus=$(((${SLURM_CPUS_PER_TASK:-1} + ranks - 1) / ranks))
    limit=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/.*TimeLimit=\([^ ]*\).*/\1/p')
    export SUBMITIT_EXECUTOR=slurm OMP_NUM_THREADS="${OMP_NUM_THREADS:-$cpus}"
    if [ -n "$SITE_SCRATCH" ]; then
        set -- --pixels-dir "$SITE_SCRATCH/kd_dist-pixels" "$@"
    fi
    # Until Python has put up its handlers the warning would kill a supervisor, and with it the job's next start.
    # shellcheck disable=SC2016
    exec srun --kill-on-bad-exit=1 --ntasks="$((SLURM_JOB_NUM_NODES * ranks))" --ntasks-per-node="$ranks" \
        --cpus-per-task="$cpus" --overcommit \
        sh -c 'trap "" USR2; exec "$0" "$@"' python -u -m launch.supervisor "$kind" "$run" --time-limit "$limit" \
        --signal-before 120 --max-timeouts "${KD_MAX_TIMEOUTS:-3}" -- "$@"
}
