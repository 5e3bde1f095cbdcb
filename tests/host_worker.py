"""A process of a group, for tests of `hosts`: joins, then does as it is told.

python host_worker.py HOST:PORT N I JOIN_TIMEOUT_S HOST_TIMEOUT_S ABOUT DEED
"""

import hashlib
import os
import sys
import time

from mtp_jax.distributed import hosts, lifetime
from mtp_jax.errors import RunFailed, UserError


def main():
    os.environ.setdefault("MTP_JAX_SECRET", "the secret of the tests")
    lifetime.end_with_parent(int(os.environ.pop(lifetime.PARENT)))
    with hosts.heeding_signals():
        return work()


def work():
    address, count, index, join_s, host_s, about, deed = sys.argv[1:]
    try:
        place = hosts.ProcessInfo(address, int(count), int(index))
        hosts.join(place, int(join_s), int(host_s), {"config": about})
        print("joined", flush=True)
        do(deed)
        hosts.leave()
    except UserError as error:
        hosts.fail(error)
        print(f"mtp-jax: error: {error}", file=sys.stderr)
        return 2
    except BaseException as error:
        hosts.fail(error)
        if not isinstance(error, RunFailed):
            raise
        print(f"mtp-jax: {error}", file=sys.stderr)
        return 1
    return 0


def do(deed):
    if deed == "user error":
        raise UserError("a file is wrong.")
    if deed == "run failed":
        raise RunFailed("it diverged")
    if deed == "bug":
        raise ZeroDivisionError("a bug")
    if deed == "sleep":
        time.sleep(1000)
    if deed == "compile":  # in C, where no Python handler comes in
        print("compiling", flush=True)
        hashlib.pbkdf2_hmac("sha256", b"", b"", 2_000_000_000)
    if deed == "wait too long":
        with hosts.within(0.2, RunFailed("nobody came")):
            time.sleep(1000)
    if deed == "collective":
        import jax
        from jax.experimental import multihost_utils

        for _ in range(1 if jax.process_index() == 1 else 2):
            multihost_utils.sync_global_devices("here")
        print("met", flush=True)
        time.sleep(1000)
    if deed.startswith("steps"):
        done, pause_s = 0, float(deed.split()[1])
        while not hosts.told_to_stop(done):
            print("began", flush=True)
            time.sleep(pause_s)
            done += 1
        print("stopped after", done, flush=True)
    if deed == "report":
        hosts.report(step=3, own_s=float(hosts.name_of(0) is not None))
        while hosts.reports() and any(not r for r in hosts.reports().values()):
            time.sleep(0.05)
        print("reports", sorted(hosts.reports().items()), flush=True)
    assert deed != "exit" or os._exit(7)


if __name__ == "__main__":
    sys.exit(main())
