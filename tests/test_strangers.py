"""The port of process 0: only who knows the run's secret gets in, and many hosts do."""

import asyncio
import contextlib
import json
import os
import socket
import stat
import sys
import time

import pytest
from etils import epath
from runs import ROOT, finish_hosts, free_port, start, told

from mtp_jax.distributed import gate
from mtp_jax.distributed.coordinator import Coordinator, encode, receive
from mtp_jax.distributed.secret import VARIABLE, Denied, greet, secret_of
from mtp_jax.errors import UserError

SECRET = b"a secret of thirty-two characters"
ANOTHER = b"another one, of as many characters"


def hello(i, of, **about):
    return {
        "kind": "host",
        "host": i,
        "of": of,
        "name": f"h{i}",
        "about": about,
        "status": {},
    }


async def coordinator(count, host="127.0.0.1"):
    port = free_port()
    made = Coordinator(count, 300, 60, SECRET)
    await made.listen(host, port)
    return made, port


async def joined(port, i, of, secret=SECRET):
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    await greet(reader, writer, lambda: secret, hello(i, of))
    return reader, writer


async def raw(port, data):
    """All that the port answers to some bytes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(data)
    writer.write_eof()
    with contextlib.suppress(ConnectionError):
        return await asyncio.wait_for(reader.read(), 20)


def within(seconds, coroutine):
    async def limited():
        return await asyncio.wait_for(coroutine, seconds)

    return asyncio.run(limited())


STRANGERS = [
    encode(hello(9, 9)),
    encode(hello(1, 2)) + b"0" * 64 + b"\n",
    encode({"kind": "service"}),
    b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    b"x" * 10_000_000,
    b"\n" * 1000,
    b"[" * 20_000 + b"\n" + b"0" * 64 + b"\n",
    b"\xff\xfe\n\n",
    b"",
]


def test_strangers_neither_end_a_run_nor_reach_the_service():
    async def gather():
        made, port = await coordinator(2)
        first = await joined(port, 0, 2)
        service = await asyncio.start_server(lambda r, w: w.write(b"jax"), "127.0.0.1")
        made.open_service(service.sockets[0].getsockname()[1])

        answers = [await raw(port, data) for data in STRANGERS]
        with pytest.raises(Denied):
            await joined(port, 1, 2, ANOTHER)
        second = await joined(port, 1, 2)

        heard = [await receive(reader) for reader, _ in (first, second)]
        return answers, heard, made._gate

    answers, heard, door = within(60, gather())

    assert heard == [{"names": ["h0", "h1"]}] * 2
    assert not any(b"jax\n" in (a or b"") or b"end" in (a or b"") for a in answers)
    assert door.strangers == len(STRANGERS) + 1
    assert door.turned_away().startswith("; 10 connections without the run's secret")


def test_a_host_that_goes_while_others_gather_is_told_and_may_come_again(capsys):
    async def gather():
        _, port = await coordinator(3)
        kept = [await joined(port, 0, 3), await joined(port, 1, 3)]
        kept[1][1].close()  # as a process that is killed
        while "came and went" not in (err := capsys.readouterr().err):
            await asyncio.sleep(0.05)
        kept[1] = await joined(port, 1, 3)
        kept.append(await joined(port, 2, 3))
        return err, [await receive(reader) for reader, _ in kept]

    err, heard = within(20, gather())

    assert err.startswith("mtp-jax: host 1 (h1) came and went; waiting for it")
    assert heard == [{"names": ["h0", "h1", "h2"]}] * 3


def test_one_of_the_run_reaches_the_service():
    async def talk():
        made, port = await coordinator(2)
        service = await asyncio.start_server(lambda r, w: w.write(b"here"), "127.0.0.1")
        made.open_service(service.sockets[0].getsockname()[1])
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        await greet(reader, writer, lambda: SECRET, {"kind": "service"})
        return await reader.readexactly(4)

    assert within(20, talk()) == b"here"


def test_the_secret_does_not_cross_the_network_and_a_proof_is_good_once():
    async def overheard():
        _, port = await coordinator(2)
        said = {"to": b"", "from": b""}

        async def copy(reader, writer, way):
            while data := await reader.read(4096):
                said[way] += data
                writer.write(data)

        async def between(reader, writer):
            there = await asyncio.open_connection("127.0.0.1", port)
            await asyncio.gather(
                copy(reader, there[1], "to"), copy(there[0], writer, "from")
            )

        server = await asyncio.start_server(between, "127.0.0.1")
        await joined(server.sockets[0].getsockname()[1], 1, 2)
        return said, await raw(port, said["to"])

    said, again = within(20, overheard())

    assert said["to"] and said["from"]
    for text in said.values():
        assert SECRET not in text and SECRET.hex().encode() not in text
    assert again.endswith(b"denied\n")


def test_who_listens_in_place_of_process_zero_learns_nothing_and_is_not_believed():
    async def meet(answer):
        async def impostor(reader, writer):
            writer.write(b"mtp_jax 1 " + b"0" * 32 + b"\n")
            await reader.readline()
            await reader.readline()
            writer.write(answer)

        server = await asyncio.start_server(impostor, "127.0.0.1")
        await joined(server.sockets[0].getsockname()[1], 1, 2)

    with pytest.raises(ValueError, match="impostor"):
        within(20, meet(encode({"end": "go home", "code": 2})))
    with pytest.raises(ValueError, match="impostor"):
        within(20, meet(b"0" * 64 + b"\n"))


def test_who_says_nothing_is_dropped_and_takes_no_place(monkeypatch):
    monkeypatch.setattr(gate, "_PROOF_S", 1.0)

    async def crowd():
        made, port = await coordinator(2)
        most = made._gate._most
        idle = [
            await asyncio.open_connection("127.0.0.1", port) for _ in range(most + 20)
        ]
        await asyncio.sleep(0.2)
        waiting = len(made._gate._unproved)
        await joined(port, 0, 2)
        for reader, _ in idle:
            with contextlib.suppress(ConnectionError):
                await asyncio.wait_for(reader.read(), 5)
        return waiting, most, len(made._gate._unproved), made._gate.strangers

    waiting, most, left, strangers = within(30, crowd())

    assert waiting <= most and left == 0 and strangers == most + 20


def own_address():
    """An address of this machine that is not loopback, if it has one."""
    probe = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with probe, contextlib.suppress(OSError):
        probe.connect(("192.0.2.1", 9))  # sends nothing
        return probe.getsockname()[0]
    return "127.0.0.1"


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.0.0.7", "a-name", ""])
def test_the_port_listens_where_hosts_look_for_it(host):
    mine = own_address()
    if mine.startswith("127."):
        pytest.skip("this machine has loopback only")
    host = host or mine

    async def reach():
        _, port = await coordinator(2, host)
        found = {}
        for address in ("127.0.0.1", "127.0.0.7", mine):
            try:
                _, writer = await asyncio.open_connection(address, port)
                writer.close()
                found[address] = True
            except OSError:
                found[address] = False
        return found

    everywhere = host == "a-name"
    named = {"127.0.0.1", "127.0.0.1" if host == "localhost" else host}
    for address, there in within(20, reach()).items():
        assert there == (everywhere or address in named), address


def test_the_secret_of_a_workdir_is_private_and_stays(tmp_path, monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    workdir = epath.Path(tmp_path / "run")
    other = secret_of(workdir, 1)
    assert other() is None  # process 0 has not come

    made = secret_of(workdir, 0)()
    file = workdir / ".secret"

    assert len(made) == 64 and other() == made
    assert stat.S_IMODE(os.stat(file).st_mode) == 0o600
    assert secret_of(workdir, 0)() == made
    os.chmod(file, 0o644)
    anew = secret_of(workdir, 0)()
    assert anew != made and other() == anew
    assert stat.S_IMODE(os.stat(file).st_mode) == 0o600
    assert [p.name for p in workdir.iterdir()] == [".secret"]


def test_the_environment_has_the_first_word(tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, "sixteen letters!")
    assert secret_of(epath.Path(tmp_path), 0)() == b"sixteen letters!"
    assert secret_of(None, 1)() == b"sixteen letters!" and not os.listdir(tmp_path)

    monkeypatch.setenv(VARIABLE, "short")
    with pytest.raises(UserError, match="has 5 characters; give at least 16"):
        secret_of(None, 0)
    monkeypatch.delenv(VARIABLE)
    with pytest.raises(UserError, match=f"{VARIABLE} is not set"):
        secret_of(None, 0)


def test_a_workdir_that_cannot_be_written_is_told(tmp_path, monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    (tmp_path / "file").write_text("")

    with pytest.raises(UserError, match="cannot be written"):
        secret_of(epath.Path(tmp_path / "file" / "run"), 0)


@pytest.mark.slow
def test_hosts_without_a_common_secret_are_told(monkeypatch):
    """Host 0 says who came; the other says what is wrong."""
    address = f"127.0.0.1:{free_port()}"
    worker = (sys.executable, str(ROOT / "tests" / "host_worker.py"))
    processes = []
    for i in range(2):
        monkeypatch.setenv(VARIABLE, f"sixteen letters {i}")
        args = [address, 2, i, 45, 60, "", "sleep"]
        processes.append(start(args, program=worker))

    (zero, _, heard), (one, _, said) = finish_hosts(processes, timeout_s=120)

    assert (zero, one) == (1, 2)
    assert f"host 0, at {address}, has another secret" in told(said)[0]
    warning, missing = told(heard)
    assert "a process on 127.0.0.1 came with another secret" in warning
    assert "host 1 of 2 did not come" in missing and "turned away" in missing


COUNT = 1024


def test_a_thousand_hosts_join_beat_and_end_within_seconds():
    """Measured on one core: 1.4 s to join, 0.5 s for a beat, a barrier and the end."""

    async def host(port, i, ready, go):
        reader, writer = await joined(port, i, COUNT)
        assert len((await receive(reader))["names"]) == COUNT
        ready.append(i)
        await go.wait()
        writer.write(encode({"status": {"step": 7}}))
        writer.write(encode({"at": "compiled"}))
        while "pass" not in (message := await receive(reader)):
            assert message == {"beat": True}
        writer.write(encode({"bye": True}))
        while "bye" not in await receive(reader):
            pass
        return time.monotonic()

    async def run():
        made, port = await coordinator(COUNT)
        begin, ready, go = time.monotonic(), [], asyncio.Event()
        hosts = [asyncio.ensure_future(host(port, i, ready, go)) for i in range(COUNT)]
        while len(ready) < COUNT:
            await asyncio.sleep(0.01)
            for one in hosts:
                assert not one.done(), one.result()
        met = time.monotonic()
        go.set()
        ends = await asyncio.gather(*hosts)
        assert {s["step"] for s in made.statuses().values()} == {7}
        return met - begin, max(ends) - met, made._gate.strangers

    join_s, end_s, strangers = within(60, run())

    print(json.dumps({"hosts": COUNT, "join_s": join_s, "end_s": end_s}))
    assert strangers == 0 and join_s < 15 and end_s < 15
