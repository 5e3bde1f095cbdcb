#!/usr/bin/env bash
# Training on Cloud TPU VMs, without a cluster: queued resources, every host of every slice.
#
#   export BUCKET=gs://my-bucket ZONE=us-east5-b TPU=v6e-16
#   launch/tpu_vm.sh keep --config=configs/paper.py:7b-n4 --workdir="$BUCKET/runs/7b-n4" \
#       --config.data.sources=/data/mine
#
#   create OPTIONS...   queues the slices; each host trains as soon as it is up
#   keep OPTIONS...     create, and again whenever the slices are taken away, until done
#   status | logs | stop | start | delete
#
# BUCKET (its data/ is copied to /data of every host), ZONE, TPU (v6e-16, v5p-128,
# v5litepod-16 ...), NAME (mtp-jax), SLICES (1), SPOT (1; 0: on demand), DRY_RUN (0; 1:
# prints the commands that change something).
set -euo pipefail

name=${NAME:-mtp-jax}
zone=${ZONE:?as in ZONE=us-east5-b}
slices=${SLICES:-1}
here=$(cd "$(dirname "$0")" && pwd)

run() {
    if [[ ${DRY_RUN:-0} == 1 ]]; then
        printf '%q ' "$@"
        echo
    else
        "$@"
    fi
}

software() {
    case $TPU in
    v6e-*) echo v2-alpha-tpuv6e ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    *) echo tpu-ubuntu2204-base ;;
    esac
}

upload_code() {
    git -C "$here/.." archive --format=tar.gz --output="$1/code.tar.gz" HEAD
    run gcloud storage cp "$1/code.tar.gz" "$BUCKET/code.tar.gz"
}

create() {
    : "${BUCKET:?as in BUCKET=gs://my-bucket}" "${TPU:?as in TPU=v6e-16}"
    local folder count=(--node-id="$name")
    folder=$(mktemp -d)
    # In the words of the shell of the host, whatever is in them.
    printf '%q ' "$@" >"$folder/train"
    upload_code "$folder"
    if ((slices > 1)); then count=(--node-count="$slices" --node-prefix="$name"); fi
    if [[ ${SPOT:-1} == 1 ]]; then count+=(--spot); fi
    run gcloud compute tpus queued-resources create "$name" "${count[@]}" \
        --zone="$zone" --accelerator-type="$TPU" --runtime-version="$(software)" \
        --scopes=https://www.googleapis.com/auth/cloud-platform \
        --metadata="mtp-bucket=$BUCKET" \
        --metadata-from-file="startup-script=$here/tpu_vm_host.sh,mtp-train=$folder/train"
    rm -r "$folder"
}

on_hosts() { # which host of which slice, a command
    run gcloud compute tpus queued-resources ssh "$name" --zone="$zone" \
        --node="$1" --worker="$1" --command="$2"
}

state() {
    gcloud compute tpus queued-resources describe "$name" --zone="$zone" \
        --format='value(state.state)' 2>/dev/null || echo NONE
}

delete() {
    run gcloud compute tpus queued-resources delete "$name" --zone="$zone" --force --quiet
}

# What the first host, which speaks for all, does: trains, is done, or has stopped.
progress() {
    on_hosts 0 'systemctl is-active mtp-jax; journalctl -u mtp-jax -o cat | tail -n 20' \
        2>/dev/null || true
}

keep() {
    while true; do
        case $(state) in
        NONE) create "$@" ;;
        SUSPENDED | FAILED) delete ;;
        ACTIVE)
            said=$(progress)
            if grep --quiet 'done: step' <<<"$said"; then
                delete
                return
            elif [[ $said == inactive* ]]; then
                # One host was told to stop, so that all have saved and stopped.
                on_hosts all 'sudo systemctl restart mtp-jax'
            elif [[ $said == failed* ]]; then
                echo "$said" >&2
                return 1
            fi
            ;;
        esac
        if [[ ${DRY_RUN:-0} == 1 ]]; then return; fi
        sleep 60
    done
}

verb=${1:-}
if (($#)); then shift; fi
case $verb in
create) create "$@" ;;
keep) keep "$@" ;;
status) state ;;
logs) on_hosts 0 'journalctl -u mtp-jax -o cat -f' ;;
stop) on_hosts all 'sudo systemctl stop mtp-jax' ;;
start) on_hosts all 'sudo systemctl restart mtp-jax' ;;
delete) delete ;;
*)
    sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2
    exit 2
    ;;
esac
