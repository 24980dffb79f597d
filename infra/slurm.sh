#!/usr/bin/env bash
# Engram on a Slurm allocation: `ray symmetric-run` starts Ray on every node, runs the training on the first, and ends Ray again.
#   sbatch infra/slurm.sh configs/node_8gpu.yaml output_dir=/shared/runs
#   sbatch --nodes=4 --export=ALL,ENGRAM_VENV=/shared/engram/.venv infra/slurm.sh configs/node_8gpu.yaml output_dir=/shared/runs rollout.workers=12
# Submit it from a checkout on storage that all nodes see, with .venv made there (make setup VARIANT=gpu). Requeued, or submitted again, it goes on
# where it stopped (resume=auto). Ten minutes before the time limit the training is told to save and end, and the job requeues itself,
# at most ENGRAM_REQUEUES times (50). A process that dies on the way is started again three times (--supervise).
#SBATCH --job-name=engram
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=engram-%j.log
set -euo pipefail

if [ "$#" -lt 1 ]; then
    echo "error: give a configuration, e.g. sbatch infra/slurm.sh configs/node_8gpu.yaml output_dir=/shared/runs" >&2
    exit 2
fi
case " $* " in
*" output_dir=/"* | *" store.work_dir=/"*) ;;
*)
    echo "error: give an absolute output_dir on storage that all nodes see, e.g. output_dir=/shared/runs" >&2
    exit 2
    ;;
esac

cd "${SLURM_SUBMIT_DIR:?this is a batch script: submit it with sbatch}"
venv="${ENGRAM_VENV:-$PWD/.venv}"
export PATH="$venv/bin:$PATH"
command -v ray > /dev/null || { echo "error: no ray in $venv/bin; run 'make setup VARIANT=gpu', or set ENGRAM_VENV" >&2; exit 2; }

# One token for this allocation alone, known to its own processes only.
export RAY_AUTH_MODE=token
RAY_AUTH_TOKEN="$(od -An -tx1 -N32 /dev/urandom | tr -d ' \n')"
export RAY_AUTH_TOKEN
export RAY_ENABLE_ZERO_COPY_TORCH_TENSORS=1 # read when Ray starts
export RAY_USAGE_STATS_ENABLED=0
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT="${RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT:-300}"

hosts="$(scontrol show hostnames "$SLURM_JOB_NODELIST")"
head="${hosts%%$'\n'*}"
port=$((20000 + SLURM_JOB_ID % 20000))
temporary="/tmp/ray-$SLURM_JOB_ID" # short: sockets lie below it, whose paths may have 107 bytes
driver="$PWD/.engram-$SLURM_JOB_ID.pid"

# The batch script runs on the first node, as the training does. SIGTERM there: the running step ends, and is saved.
at_limit=
end_training() { [ ! -s "$driver" ] || kill -TERM "$(cat "$driver")" 2> /dev/null || true; }
trap 'at_limit=1; end_training' USR1 # Slurm sends it before the time limit, see --signal above
trap end_training TERM
trap 'rm -f "$driver"' EXIT

status=0
srun --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --kill-on-bad-exit=0 \
    ray symmetric-run --address "$head:$port" --min-nodes "$SLURM_JOB_NUM_NODES" --temp-dir="$temporary" --disable-usage-stats -- \
    bash -c 'echo $$ > "$0" && exec python -m cluster train "$@"' "$driver" "$@" ray.address=auto resume=auto --supervise=3 &
step=$!
while kill -0 "$step" 2> /dev/null; do # a trap ends `wait` early
    wait "$step" && status=0 || status=$?
done
if [ -n "$at_limit" ] && [ "$status" -eq 130 ]; then # it has saved, and is not done
    requeues="${SLURM_RESTART_COUNT:-0}" most="${ENGRAM_REQUEUES:-50}"
    if [ "$requeues" -ge "$most" ]; then
        echo "error: at the time limit after $requeues requeues, ENGRAM_REQUEUES=$most allows no more: submit it again to go on" >&2
    elif scontrol requeue "$SLURM_JOB_ID"; then
        echo "saved at the time limit: job $SLURM_JOB_ID is requeued and goes on where it stopped"
        exit 0
    else
        echo "error: saved at the time limit, but Slurm does not requeue job $SLURM_JOB_ID: submit it again to go on" >&2
    fi
fi
exit "$status"
