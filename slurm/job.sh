# shellcheck shell=bash
# What teacher.sbatch and distill.sbatch share: source it, then  kd_run MODULE RUN [OPTIONS...]
#
# On every node srun starts one torchrun, which starts one rank for each GPU. Slurm's warning (USR2, two minutes before the
# time limit or at preemption) comes to this script, which passes it on: all ranks finish their step and save together,
# and the job is requeued. scancel's SIGTERM reaches the ranks through srun: they save and end, and nobody requeues.

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
# Since Slurm 22.05 srun does not take this from sbatch.
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"

kd_run() {
    local module=$1 run=$2 port host ranks status journal
    shift 2
    host=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    port=$((20000 + SLURM_JOB_ID % 12000))
    ranks=${KD_RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(((SRUN_CPUS_PER_TASK + ranks - 1) / ranks))}"
    if [ -n "$SITE_SCRATCH" ]; then
        set -- --pixels-dir "$(eval "echo $SITE_SCRATCH")/kd_dist-pixels" "$@"
    fi
    journal="$run.job-$SLURM_JOB_ID.jsonl"

    python -m launch.restarts begin "$journal" "$run" "$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *StdOut=//p')" || return
    srun --kill-on-bad-exit=1 python -m launch.meeting "$host" "$port" "$journal.meeting" || return

    warned=
    trap 'warned=yes; kill -USR2 "$torchrun" 2>/dev/null' USR2
    srun --kill-on-bad-exit=1 torchrun \
        --nnodes="$SLURM_JOB_NUM_NODES" --nproc_per_node="$ranks" \
        --rdzv_backend=c10d --rdzv_endpoint="$host:$port" --rdzv_id="$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" \
        --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR2 --shutdown-timeout=90 \
        -m "$module" --out "$run" "$@" &
    torchrun=$!
    # A trapped signal ends `wait` early, so wait until srun itself is gone.
    while :; do
        wait "$torchrun"
        status=$?
        kill -0 "$torchrun" 2>/dev/null || break
    done
    if [ "$status" -ne 0 ] && [ -n "$warned" ]; then
        python -m launch.restarts requeue "$journal" "$run" "${KD_MAX_TIMEOUTS:-3}"
        status=$?
    fi
    return "$status"
}
