"""Processes that join, fail, freeze and die: the others end, and say why."""

import signal
import socket
import sys
import time

import pytest
from runs import ROOT, finish, finish_hosts, free_port, start, told

WORKER = (sys.executable, str(ROOT / "tests" / "host_worker.py"))


def begin(deeds, *, address=None, count=None, ids=None, join_s=60, host_s=60, about=()):
    """A process for each deed."""
    address = address or f"127.0.0.1:{free_port()}"
    settings = {i: text for i, text in enumerate(about)}
    return [
        start(
            [
                address,
                count or len(deeds),
                i,
                join_s,
                host_s,
                settings.get(i, ""),
                deed,
            ],
            program=WORKER,
        )
        for i, deed in zip(ids or range(len(deeds)), deeds, strict=True)
    ]


def wait_for(process, word):
    for line in process.stdout:
        if line.strip() == word:
            return
    raise AssertionError(process.communicate()[1])


NAME = socket.gethostname()


@pytest.mark.parametrize("victim", [0, 2])
def test_a_killed_host_ends_the_others_with_its_name(victim):
    """Host 1 has met the others once and does not come again: they are blocked."""
    processes = begin(["collective", "collective", "collective"])
    wait_for(processes[1], "met")

    processes[victim].send_signal(signal.SIGKILL)
    results = finish_hosts(processes, timeout_s=60)

    for i, (code, _, err) in enumerate(results):
        line = f"mtp-jax: host {victim} ({NAME}) is lost: its process ended"
        assert i == victim or (code, told(err)) == (1, [line])


@pytest.mark.parametrize("victim", [0, 1])
def test_a_frozen_host_ends_the_others_within_the_set_time(victim):
    processes = begin(["sleep", "sleep", "sleep"], host_s=6)
    for process in processes:
        wait_for(process, "joined")

    processes[victim].send_signal(signal.SIGSTOP)
    others = [p for i, p in enumerate(processes) if i != victim]
    results = [finish(p, timeout_s=60) for p in others]
    processes[victim].kill()
    processes[victim].communicate()

    for code, _, err in results:
        line = f"mtp-jax: host {victim} ({NAME}) is lost: nothing was heard of it"
        assert code == 1 and len(told(err)) == 1 and told(err)[0].startswith(line)


@pytest.mark.parametrize(
    ("deed", "code", "own", "line"),
    [
        ("user error", 2, "mtp-jax: error: a file is wrong.", "a file is wrong."),
        ("run failed", 1, "mtp-jax: it diverged", "it diverged"),
        ("bug", 1, "ZeroDivisionError: a bug", "ZeroDivisionError: a bug"),
        ("exit", 7, "", "is lost: its process ended"),
    ],
)
def test_a_host_that_fails_tells_the_others(deed, code, own, line):
    results = finish_hosts(begin(["sleep", deed, "sleep"]), timeout_s=60)

    others = [results[0], results[2]]
    assert results[1][0] == code and own in results[1][2]
    for found, _, err in others:
        assert found == (1 if deed == "exit" else code)
        assert len(told(err)) == 1 and line in told(err)[0]
        assert told(err)[0].startswith(f"mtp-jax: host 1 ({NAME})")
        assert "Traceback" not in err


@pytest.mark.parametrize("told_of_it", [(0, 1, 2, 3), (2,)])
def test_hosts_that_are_told_to_stop_do_so_after_the_same_step(told_of_it):
    """Each of its own pace, so that they are far apart when the word comes."""
    processes = begin([f"steps {pause_s}" for pause_s in (0, 0.03, 0.001, 0.3)])
    for process in processes:
        wait_for(process, "began")

    for i in told_of_it:
        processes[i].send_signal(signal.SIGTERM)
    results = finish_hosts(processes, timeout_s=60)

    assert [code for code, *_ in results] == [0] * 4, results
    assert len({out.splitlines()[-1] for _, out, _ in results}) == 1


def test_a_process_alone_stops_when_it_is_told_to():
    (process,) = begin(["steps 0.01"])
    wait_for(process, "began")

    process.send_signal(signal.SIGTERM)
    code, out, _ = finish(process, timeout_s=60)

    assert code == 0 and "stopped after" in out


NOTHING = "mtp-jax: told to stop before a step: there is nothing new to save"


@pytest.mark.parametrize("count", [1, 3])
def test_before_a_step_there_is_nothing_to_wait_for(count):
    processes = begin(["compile"] * count)
    for process in processes:
        wait_for(process, "compiling")

    processes[-1].send_signal(signal.SIGTERM)
    results = finish_hosts(processes, timeout_s=60)

    assert [(code, told(err)) for code, _, err in results] == [(0, [NOTHING])] * count


def test_a_host_that_waits_for_the_others_can_be_stopped():
    port = free_port()
    processes = begin(["sleep"], address=f"127.0.0.1:{port}", count=2)
    connect(port).close()

    processes[0].send_signal(signal.SIGTERM)
    code, _, err = finish_hosts(processes, timeout_s=60)[0]

    assert (code, told(err)) == (0, [NOTHING])


def connect(port):
    """A connection to a port on which nobody may listen yet."""
    end = time.monotonic() + 60
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port))
        except OSError:
            assert time.monotonic() < end
            time.sleep(0.1)


def test_a_process_too_many_is_told_that_a_run_is_in_progress():
    address = f"127.0.0.1:{free_port()}"
    processes = begin(["sleep", "sleep"], address=address)
    for process in processes:
        wait_for(process, "joined")

    more = begin(["sleep"], address=address, count=2, ids=[1], join_s=2)
    code, _, err = finish_hosts(more, timeout_s=60)[0]

    assert code == 1 and "says: a run of other processes is in progress" in err


def test_another_service_at_the_port_is_told():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        address = f"127.0.0.1:{other.getsockname()[1]}"
        processes = begin(["sleep"], address=address, count=2, ids=[1])
        other.accept()[0].sendall(b"SSH-2.0\r\n")
        code, _, err = finish_hosts(processes, timeout_s=60)[0]

    assert code == 1 and f"what listens at {address} is not host 0" in err


def test_a_name_that_is_not_known_is_told_at_once_and_tried_again():
    processes = begin(
        ["sleep"], address="no.such.invalid:1", count=2, ids=[1], join_s=3
    )

    code, _, err = finish_hosts(processes, timeout_s=60)[0]

    first, last = told(err)
    assert code == 1 and "trying again for 3 s" in first and "did not come" in last


def test_a_wait_has_a_limit():
    results = finish_hosts(begin(["sleep", "wait too long"]), timeout_s=60)
    alone = finish_hosts(begin(["wait too long"]), timeout_s=60)

    (there, _, heard), (code, _, said) = results
    assert there == 1 and told(heard) == [f"mtp-jax: host 1 ({NAME}): nobody came"]
    assert code == 1 and told(said) == ["mtp-jax: nobody came"]
    assert alone[0][0] == 1 and told(alone[0][2]) == ["mtp-jax: nobody came"]


def test_host_zero_that_fails_tells_the_others_before_it_ends():
    results = finish_hosts(begin(["user error", "sleep"]), timeout_s=60)

    assert [code for code, *_ in results] == [2, 2]
    assert told(results[1][2]) == [f"mtp-jax: host 0 ({NAME}): a file is wrong."]


def test_hosts_that_do_not_come_are_named():
    results = finish_hosts(begin(["sleep"] * 2, count=4, ids=[0, 2], join_s=4))

    for code, _, err in results:
        assert code == 1 and len(told(err)) == 1
        assert "hosts 1, 3 of 4 did not come within 4 s" in told(err)[0]
        assert f"there: host 0 ({NAME}), host 2 ({NAME})" in told(err)[0]


def test_host_zero_that_does_not_come_is_told():
    code, _, err = finish_hosts(begin(["sleep"], count=2, ids=[1], join_s=2))[0]

    assert code == 1 and len(told(err)) == 1
    assert "host 0 did not come within 2 s" in told(err)[0]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"ids": [0, 1, 1], "count": 3}, "two processes came as --process_id=1"),
        ({"about": ["a", "a", "b"]}, "the hosts differ in config"),
    ],
)
def test_hosts_that_do_not_fit_together_are_refused(settings, words):
    results = finish_hosts(begin(["sleep"] * 3, **settings))

    for code, _, err in results:
        assert code == 2 and len(told(err)) == 1 and words in told(err)[0]


def test_a_port_that_is_taken_is_told():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        started = begin(["sleep"], address=address, count=2)
        code, _, err = finish_hosts(started)[0]

    assert code == 2 and len(told(err)) == 1
    assert "process 0 cannot listen on port" in told(err)[0]


def test_strangers_at_the_port_do_no_harm():
    port = free_port()
    processes = begin(["report"], address=f"127.0.0.1:{port}", count=2)
    with connect(port) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
    processes += begin(["report"], address=f"127.0.0.1:{port}", count=2, ids=[1])

    results = finish_hosts(processes, timeout_s=90)

    status = {"step": 3, "own_s": 1.0}
    assert [code for code, *_ in results] == [0, 0], results
    assert f"reports {[(0, status), (1, status)]}" in results[0][1]


def test_slurm_says_which_process_this_is(monkeypatch):
    """Found by JAX's own rules, from nothing but the variables of a Slurm step."""
    from mtp_jax.distributed import cluster

    step = {
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_NODELIST": "node[003-004]",
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": "1",
        "SLURM_LOCALID": "0",
    }
    assert cluster.detect(5) is None
    for name, value in step.items():
        monkeypatch.setenv(name, value)

    found = cluster.detect(5)

    assert found == cluster.ProcessInfo("node003:61447", 2, 1, (0,))


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ([], None),
        (["--num_processes=1"], ("", 1, 0)),
        (["--coordinator=a:1", "--num_processes=2", "--process_id=1"], ("a:1", 2, 1)),
    ],
)
def test_options_say_which_process_this_is(options, found):
    import argparse

    from mtp_jax.distributed import cluster

    parser = argparse.ArgumentParser()
    cluster.add_options(parser)

    place = cluster.from_options(parser.parse_args(options))

    assert place == (found and cluster.ProcessInfo(*found))


@pytest.mark.parametrize("options", [["--num_processes=2"], ["--process_id=0"]])
def test_a_place_that_is_told_in_part_is_refused(options):
    import argparse

    from mtp_jax.distributed import cluster
    from mtp_jax.errors import UserError

    parser = argparse.ArgumentParser()
    cluster.add_options(parser)

    with pytest.raises(UserError, match="go together"):
        cluster.from_options(parser.parse_args(options))
