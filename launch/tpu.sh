#!/usr/bin/env bash
# A run on a Cloud TPU slice with gcloud alone, from a clone of this repository:
#
#   export NAME=b16 ZONE=us-east5-b TYPE=v6e-16 RUNTIME=v2-alpha-tpuv6e
#   launch/tpu.sh create [--spot]   request TPUs and wait until they are ready
#   launch/tpu.sh setup             install this commit on every worker
#   launch/tpu.sh run train ...     start a vit-jax command on every worker
#   launch/tpu.sh logs              follow worker 0's log; Ctrl-C detaches
#   launch/tpu.sh status            the request's state, each worker's last line
#   launch/tpu.sh stop              save a checkpoint and stop the run
#   launch/tpu.sh delete            release the TPUs; they are billed until then
#
# The run continues when this machine disconnects. After a preemption: delete,
# create, setup, run; sky.yaml automates that.
set -euo pipefail
: "${NAME:?set it to a name for the TPUs}" "${ZONE:?set it to their zone}"
action=${1:?see the top of this file}
shift

tpus() { gcloud compute tpus "$@" --zone="$ZONE" --quiet; }
on() { tpus tpu-vm ssh "$NAME" --worker="$1" --command="$2"; }
state() { tpus queued-resources describe "$NAME" --format='value(state.state)'; }

case $action in
create)
  tpus queued-resources create "$NAME" --node-id="$NAME" --async \
    --accelerator-type="${TYPE:?set it, as in v6e-16}" \
    --runtime-version="${RUNTIME:?set it, as in v2-alpha-tpuv6e}" "$@"
  until now=$(state) && test "$now" = ACTIVE; do
    case $now in FAILED | SUSPEND*)
      echo "$NAME is $now: delete and create it again" >&2
      exit 1
      ;;
    esac
    echo "$NAME is $now"
    sleep "${POLL:-20}"
  done
  ;;
setup)
  archive=$(mktemp --suffix=.tar.gz)
  git archive --output="$archive" HEAD
  tpus tpu-vm scp "$archive" "$NAME:vit_jax.tar.gz" --worker=all
  rm "$archive"
  on all 'set -e; rm -rf code; mkdir -p code logs
    tar -xzf vit_jax.tar.gz -C code
    python3 -m pip install --quiet --user uv
    test -x venv/bin/python || python3 -m uv venv --python 3.12 venv
    python3 -m uv pip install --quiet --python venv/bin/python \
      --constraint code/constraints.txt --editable "code[tpu,train,gcs]"'
  ;;
run)
  command=${1:?name a vit-jax command}
  shift
  flags=(--distributed)
  test "$command" = train && flags+=(--stopped_exit_code=75)
  words=$(printf ' %q' "$command" "${flags[@]}" "$@")
  # 134: JAX aborted this process because another one failed. 137: this one was
  # killed. Both restart; there are at most 20 attempts.
  loop="for i in \$(seq 20); do
      ../venv/bin/vit-jax$words & echo \$! > ../logs/pid; wait \$!; code=\$?
      test \$code = 134 || test \$code = 137 || break; sleep 5
    done; echo exit code \$code"
  on all "cd code || exit; nohup setsid bash -c $(printf %q "$loop") \
    >> ../logs/run.log 2>&1 < /dev/null &"
  ;;
logs) on 0 'tail -n 50 -F logs/run.log' ;;
status)
  state
  # shellcheck disable=SC2016 # the workers expand it
  on all 'echo "$(hostname): $(tail -n 1 logs/run.log)"'
  ;;
stop)
  # shellcheck disable=SC2016
  on all 'kill -TERM "$(cat logs/pid)"'
  ;;
delete) tpus queued-resources delete "$NAME" --force ;;
*) echo "$action: see the top of $0" >&2 && exit 2 ;;
esac
