# shellcheck shell=bash
# What the launchers share; sourced by them. A launcher fills `options` and `required`, writes
# `usage`, and calls `parse "$@"`, which leaves what follows `--` in train_args.

set -euo pipefail

# How `llada2 train` ends when starting it again helps: it saved and made room, or another process
# died (75); jaxlib lost process 0 (134); it was killed (137) or ended before it listened (143).
# shellcheck disable=SC2034  # read by the launchers
RESTART_ON=(75 134 137 143)

declare -A options=([dry-run]=no)
required=()
train_args=()

die() {
  echo "${0##*/}: $*" >&2
  exit 2
}

# parse ARGUMENT...: fills options. One whose default is "no" is a switch and takes no value.
parse() {
  local name
  while (($#)); do
    case $1 in
      -h | --help) usage && exit ;;
      --) shift && train_args=("$@") && break ;;
      --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" && continue ;;
      --*) ;;
      *) die "'$1' is not an option; arguments of llada2 train come after --" ;;
    esac
    name=${1#--}
    [[ -v options[$name] ]] || die "there is no option $1; see ${0##*/} --help"
    if [[ ${options[$name]} == no ]]; then
      options[$name]=yes
      shift
    else
      (($# > 1)) && [[ $2 != --* ]] || die "$1 needs a value"
      options[$name]=$2
      shift 2
    fi
  done
  for name in "${required[@]}"; do
    [[ ${options[$name]} ]] || die "--$name is missing; see ${0##*/} --help"
  done
  [[ " ${train_args[*]} " == *" --config="* ]] || die "say what to train: ... -- --config=configs/NAME.py"
}

# check_number NAME: dies unless the option is a number from 0.
check_number() {
  [[ ${options[$1]} =~ ^[0-9]+$ ]] || die "--$1=${options[$1]} is not a number"
}

# quoted WORD...: the words as one line that a shell reads back.
quoted() {
  local word words=()
  for word; do
    [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]] || word=${word@Q}
    words+=("$word")
  done
  echo "${words[*]}"
}

# run COMMAND...: runs it, or prints it under --dry-run.
run() {
  if [[ ${options[dry-run]} == yes ]]; then
    quoted "$@"
  else
    "$@"
  fi
}

# restarts STATUS: whether to start again after it.
restarts() {
  [[ " ${RESTART_ON[*]} " == *" $1 "* ]]
}
