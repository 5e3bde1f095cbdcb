#!/usr/bin/env bash
# launch/local.sh N TRAIN-OPTIONS...: N hosts on this machine, joined over loopback.
#
#   launch/local.sh 4 --config=configs/tiny.py --workdir=runs/tiny4
#
# DEVICES: CPU devices of each host (1). PYTHON: the interpreter (python3). Ctrl-C,
# SIGTERM and SIGHUP stop all of them: one save, then the same command goes on. A second
# Ctrl-C ends them at once. If this script itself is killed, they save and stop.
set -euo pipefail

hosts=${1:-}
if ! [[ $hosts =~ ^[1-9][0-9]*$ ]]; then
    echo "usage: launch/local.sh N --config=F --workdir=D ..." >&2
    exit 2
fi
shift
python=${PYTHON:-python3}
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
export JAX_NUM_CPU_DEVICES=${DEVICES:-1}

port=$("$python" -c \
    'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
processes=()
# shellcheck disable=SC2329  # the trap calls it
stop() { kill -TERM "${processes[@]}" 2>/dev/null || true; }
# shellcheck disable=SC2329
interrupt() {
    trap 'kill -KILL "${processes[@]}" 2>/dev/null; exit 130' INT
    stop
}
trap stop TERM HUP
trap interrupt INT

# So that they do not outlive this script, however it ends.
tied=(setpriv --pdeathsig TERM --)
"${tied[@]}" true 2>/dev/null || tied=()

for ((i = 0; i < hosts; i++)); do
    # A session of its own: Ctrl-C must reach Python as SIGTERM, which saves.
    setsid ${tied[@]+"${tied[@]}"} "$python" -m mtp_jax train "$@" \
        --coordinator="127.0.0.1:$port" --num_processes="$hosts" --process_id="$i" &
    processes+=($!)
done

worst=0
for process in "${processes[@]}"; do
    code=0
    wait "$process" || code=$?
    # A signal ends `wait` early, while the process is still saving.
    while ((code > 128)) && kill -0 "$process" 2>/dev/null; do
        code=0
        wait "$process" || code=$?
    done
    if ((code > worst)); then worst=$code; fi
done
exit "$worst"
