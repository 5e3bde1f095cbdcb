#!/usr/bin/env bash
# launch/stoppable.sh COMMAND...: a stop that this host was told of ends with code 75.
#
# Told to stop (SIGTERM), `train` saves and ends with code 0 on every host, since nothing
# went wrong. Job controllers take 0 for the end of training and would not start again.
# This passes the signal on, waits for the save, and turns that 0 into 75 (EX_TEMPFAIL).
# If this script itself is killed, the command gets the signal all the same.
# Every other code is the command's own. `train` again after the last step does nothing
# and ends with 0, so a stop in the last second only costs a restart.
set -uo pipefail

told=0
child=0
# shellcheck disable=SC2329  # the trap calls it
stop() {
    told=1
    if ((child)); then kill -TERM "$child" 2>/dev/null; fi
}
trap stop TERM

tied=(setpriv --pdeathsig TERM --)
"${tied[@]}" true 2>/dev/null || tied=()

${tied[@]+"${tied[@]}"} "$@" &
child=$!
if ((told)); then kill -TERM "$child" 2>/dev/null; fi
wait "$child"
code=$?
# A signal ends `wait` early, with a code above 128, while the command is still saving.
while ((code > 128)) && kill -0 "$child" 2>/dev/null; do
    wait "$child"
    code=$?
done
if ((told && code == 0)); then
    exit 75
fi
exit "$code"
