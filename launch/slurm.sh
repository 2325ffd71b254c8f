#!/usr/bin/env bash
# Trains on GPU nodes under SLURM, one process a GPU. Submits itself: the part below the line runs
# in the job.
root=${LLADA2_ROOT:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}
# shellcheck source=launch/common.sh
source "$root/launch/common.sh"

usage() {
  cat <<'EOF'
usage: launch/slurm.sh --nodes=N [options] -- --config=configs/NAME.py [...]

Submits `llada2 train` to SLURM, from a checkout with its .venv on a file system that the nodes
share. SLURM queues it again when it asks for it or was preempted, and not after a mistake.

  --nodes=N           GPU nodes
  --gpus=N            GPUs a node (default: 8)
  --name=NAME         of the job (default: llada2)
  --partition=NAME, --account=NAME, --time=HH:MM:SS   as sbatch takes them
  --grace=SECONDS     SIGTERM so long before the time is up (default: 120); must be more than
                      config.checkpoint.preemption_seconds
  --restarts=N        how often to start again (default: 100)
  --dry-run           print what would be run
EOF
}

options+=([nodes]="" [gpus]=8 [name]=llada2 [partition]="" [account]="" [time]="" [grace]=120 [restarts]=100)
required=(nodes)
parse "$@"
for name in nodes gpus grace restarts; do check_number "$name"; done

submit() {
  local optional=() arguments=() name argument
  for name in partition account time; do
    [[ ${options[$name]} ]] && optional+=("--$name=${options[$name]}")
  done
  for argument; do
    [[ $argument == --dry-run ]] || arguments+=("$argument")
  done
  run sbatch "--job-name=${options[name]}" "--nodes=${options[nodes]}" \
    "--ntasks-per-node=${options[gpus]}" "--gpus-per-node=${options[gpus]}" --exclusive --requeue \
    "--signal=TERM@${options[grace]}" --open-mode=append --output=%x-%j.log \
    "--export=ALL,LLADA2_ROOT=$root" "${optional[@]}" "$root/launch/slurm.sh" "${arguments[@]}"
}

# One that fails takes the others with it, so that srun ends when the first does.
train() {
  cd "$root"
  PATH=$root/.venv/bin:$PATH run srun --kill-on-bad-exit=1 --label \
    launch/train.sh --gpu -- "${train_args[@]}"
}

if [[ ! -v SLURM_JOB_ID || ${options[dry-run]} == yes ]]; then
  submit "$@"
  [[ ${options[dry-run]} == no ]] || train
  exit
fi

# ---- in the job ----------------------------------------------------------------------------------

status=0
train || status=$?
if restarts "$status" && ((${SLURM_RESTART_COUNT:-0} < options[restarts])); then
  echo "ended with status $status: queued again" >&2
  exec scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
