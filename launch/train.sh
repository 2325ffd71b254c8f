#!/usr/bin/env bash
# Runs llada2 train on this host, as one of the processes of a job. The other launchers end here.
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<'EOF'
usage: launch/train.sh [--gpu] [--dry-run] -- --config=configs/NAME.py [...]

Runs `llada2 train --config=...` on this host. Where it is one of several, start it on all: jax
finds the others on TPU slices, GKE, SLURM and Open MPI; elsewhere set JAX_COORDINATOR_ADDRESS
(host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID.

  --gpu       XLA flags for H100 (docs/launching.md); what you set yourself comes last
  --dry-run   print the command instead of running it
EOF
}

# docs/launching.md has the source of each.
GPU_FLAGS=(
  --xla_gpu_enable_latency_hiding_scheduler=true
  --xla_gpu_enable_pipelined_all_gather=true
  --xla_gpu_enable_pipelined_reduce_scatter=true
  --xla_gpu_enable_pipelined_all_reduce=true
  --xla_gpu_enable_while_loop_double_buffering=true
)

options+=([gpu]=no)
parse "$@"

command=(llada2 train "${train_args[@]}")
if [[ ${options[gpu]} == yes ]]; then
  command=(
    env "XLA_FLAGS=${GPU_FLAGS[*]}${XLA_FLAGS:+ $XLA_FLAGS}"
    "XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.9}"
    "${command[@]}"
  )
fi
[[ ${options[dry-run]} == no ]] || { quoted "${command[@]}" && exit; }
exec "${command[@]}"
