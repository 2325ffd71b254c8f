#!/usr/bin/env bash
# Trains on a GKE cluster through xpk.
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<'EOF'
usage: launch/gke.sh --name=NAME --cluster=CLUSTER --type=v5litepod-16 --zone=ZONE --image=IMAGE
                     [options] -- --config=... [...]

Submits `llada2 train` as a workload to a cluster that xpk made. GKE restarts it when it asks for it
or its machines are preempted, and not after a mistake.

  --name=NAME         of the workload: lower-case letters, digits and dashes
  --cluster=CLUSTER   from `xpk cluster create` (docs/launching.md)
  --type=TYPE         device type of the cluster, e.g. v5litepod-16, v6e-64, h100-mega-80gb-8
  --zone=ZONE         of the cluster
  --image=IMAGE       container with the project installed (docs/launching.md)
  --project=PROJECT   default: gcloud's
  --slices=N          TPU slices, or nodes of GPUs (default: 1)
  --restarts=N        how often to start again (default: 100)
  --grace=SECONDS     from the notice of preemption to the kill (default: 60); must be more than
                      config.checkpoint.preemption_seconds
  --dry-run           print what would be run
EOF
}

options+=([name]="" [cluster]="" [type]="" [zone]="" [image]="" [project]="" [slices]=1 [restarts]=100 [grace]=60)
required=(name cluster type zone image)
parse "$@"
for name in slices restarts grace; do check_number "$name"; done
[[ ${options[name]} =~ ^[a-z]([a-z0-9-]*[a-z0-9])?$ ]] ||
  die "--name=${options[name]}: lower-case letters, digits and dashes, a letter first"

if [[ ${options[type]} =~ ^(a100|b200|h100|h200|gb200)- ]]; then
  count=--num-nodes gpu=(--gpu)
else
  count=--num-slices gpu=()
fi
project=()
[[ ${options[project]} ]] && project=("--project=${options[project]}")
only=("${RESTART_ON[@]}")
run xpk workload create "--workload=${options[name]}" "--cluster=${options[cluster]}" \
  "--device-type=${options[type]}" "--zone=${options[zone]}" "${project[@]}" \
  "$count=${options[slices]}" "--docker-image=${options[image]}" \
  "--max-restarts=${options[restarts]}" "--restart-on-exit-codes=$(IFS=, && echo "${only[*]}")" \
  "--termination-grace-period-seconds=${options[grace]}" \
  "--command=$(quoted launch/train.sh "${gpu[@]}" -- "${train_args[@]}")"
