#!/usr/bin/env bash
# Trains on a Cloud TPU slice, of one host or many, which is created if need be and again when it
# was preempted.
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<'EOF'
usage: launch/tpu_vm.sh --name=NAME --type=v5litepod-16 --zone=ZONE [options] -- --config=... [...]

Queues for a TPU slice, installs this checkout on all of its hosts and runs `llada2 train` there
until it is done. When the run asks to be started again, it is; when the slice was preempted, a new
one is queued first. Keep it in tmux: it ends with the run.

  --name=NAME         of the queued resource and of its node; one that is there is used
  --type=TYPE         accelerator type, e.g. v5litepod-16, v5p-32, v6e-64
  --zone=ZONE         e.g. us-west4-a
  --project=PROJECT   default: gcloud's
  --runtime=VERSION   software of the VM; default: by the type
  --setup=COMMAND     run on each host first, e.g. to mount what the workdir is on
  --spot              a slice that may be preempted, at a lower price
  --restarts=N        how often to start again (default: 100)
  --delete            delete the slice when the run is done or has failed
  --dry-run           print what would be run

The workdir must be a folder that all hosts share and that outlives them (docs/launching.md).
EOF
}

options+=([name]="" [type]="" [zone]="" [project]="" [runtime]="" [setup]="" [spot]=no [restarts]=100 [delete]=no)
required=(name type zone)
parse "$@"
check_number restarts
case ${options[type]} in
  v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
  v5p-*) runtime=v2-alpha-tpuv5 ;;
  v6e-*) runtime=v2-alpha-tpuv6e ;;
  *) runtime=${options[runtime]} ;;
esac
runtime=${options[runtime]:-$runtime}
[[ $runtime ]] || die "--type=${options[type]} is not one of v5litepod-N, v5p-N, v6e-N: say --runtime"

name=${options[name]}
where=("--zone=${options[zone]}")
[[ ${options[project]} ]] && where+=("--project=${options[project]}")
queue=(gcloud compute tpus queued-resources)
vm=(gcloud compute tpus tpu-vm)

# state: of the queued resource; empty where there is none.
state() {
  "${queue[@]}" describe "$name" "${where[@]}" "--format=value(state.state)" 2>/dev/null || true
}

create() {
  local spot=()
  [[ ${options[spot]} == yes ]] && spot=(--spot)
  run "${queue[@]}" create "$name" "${where[@]}" "--node-id=$name" \
    "--accelerator-type=${options[type]}" "--runtime-version=$runtime" "${spot[@]}"
}

delete() {
  run "${queue[@]}" delete "$name" "${where[@]}" --force --quiet
}

# An hour in the queue is normal.
wait_until_active() {
  local now
  while now=$(state) && [[ $now != ACTIVE ]]; do
    case $now in
      SUSPEND*) return "${RESTART_ON[0]}" ;;
      "" | FAILED) die "the queued resource $name is ${now:-gone}; gcloud describes why" ;;
    esac
    echo "$name: $now" >&2
    sleep 30
  done
}

install() {
  local archive=${TMPDIR:-/tmp}/llada2-$name.tar.gz
  run git archive "--output=$archive" HEAD &&
    run "${vm[@]}" scp "$archive" "$name:llada2.tar.gz" "${where[@]}" --worker=all &&
    on_all "${options[setup]:+${options[setup]} && }mkdir -p llada2 && tar xzf llada2.tar.gz -C llada2 && cd llada2 && python3 -m pip install -q --user uv && { test -d .venv || ~/.local/bin/uv venv -q --python 3.12; } && ~/.local/bin/uv pip install -q -c constraints.txt -e '.[tpu]'"
}

# The run does not hang on this connection: without it, it goes on, and a second start on the host
# waits for its end. The log has to be there before anybody follows it.
train() {
  on_all "set -e; cd llada2; exec 9> ~/llada2.lock; flock -n 9 || { echo 'it still runs here, see ~/llada2.log; waiting'; flock 9; }; touch ~/llada2.log; PATH=\$PWD/.venv/bin:\$PATH launch/train.sh -- $(quoted "${train_args[@]}") >> ~/llada2.log 2>&1 & tail --pid=\$! -n0 -f ~/llada2.log; wait \$!"
}

on_all() {
  run "${vm[@]}" ssh "$name" "${where[@]}" --worker=all "--command=$1"
}

# attempt: trains on the slice, made ready if it is not; its exit status is the run's. No step goes
# on after a failed one: `set -e` says nothing where the status is asked for.
attempt() {
  case $(state) in
    "") create ;;
    FAILED | SUSPENDED) delete && create ;;
  esac && wait_until_active && install && train
}

if [[ ${options[dry-run]} == yes ]]; then
  create && install && train
  [[ ${options[delete]} == no ]] || delete
  exit
fi

for ((restart = 0; ; restart++)); do
  status=0
  (attempt) || status=$?
  # 255: ssh lost the host; whether it is still there, the next attempt finds out.
  restarts "$status" || ((status == 255)) || break
  ((restart < options[restarts])) || break
  echo "$name: ended with status $status; starting again" >&2
  sleep 30
done
[[ ${options[delete]} == no ]] || delete
exit "$status"
