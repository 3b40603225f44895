"""``python -m demo``: the command line and the processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import httpx
import pytest

from tests.demo.running import Demo, interrupt, row_of_ports, start_demo, stopped
from tests.support.machine import LOCAL, ROOT
from tests.support.servers import Server
from tests.support.waiting import eventually


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "demo", *arguments], capture_output=True, text=True, timeout=30, cwd=ROOT
    )


def test_help_names_every_option() -> None:
    """--help says what there is."""
    result = run("--help")
    assert result.returncode == 0
    for option in ("--port", "--nodes", "--redis", "--host"):
        assert option in result.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--port", "0"], "1 to 65535"),
        (["--port", "65535"], "too high: the 3 nodes use the ports after it"),
        (["--nodes", "0"], "1 to 16"),
        (["--redis", "http://localhost"], "has to start with redis://"),
    ],
)
def test_bad_argument_is_refused(arguments: list[str], said: str) -> None:
    """An argument that makes no sense ends the command with status 2 and says why."""
    result = run(*arguments)
    assert result.returncode == 2
    assert said in result.stderr


def test_redis_that_does_not_answer_is_a_clear_error() -> None:
    """No traceback, no password: one sentence and status 1."""
    result = run("--port", str(row_of_ports(4)), "--redis", "redis://:secret@127.0.0.1:1/0")
    assert result.returncode == 1
    assert "does not answer" in result.stderr
    assert "Traceback" not in result.stderr
    assert "secret" not in result.stderr + result.stdout


def test_second_demo_on_the_same_port_is_refused(demo: Demo) -> None:
    """The port is shared with SO_REUSEPORT, so a second demo could bind it: it is refused all the same."""
    result = run("--port", str(demo.port))
    assert result.returncode == 1
    assert f"Port {demo.port} on {LOCAL} cannot be used" in result.stderr
    assert "--port" in result.stderr
    assert "Traceback" not in result.stderr


def test_taken_node_port_is_refused(demo: Demo) -> None:
    """A node's own port counts too."""
    result = run("--port", str(demo.port - 1), "--nodes", "1")
    assert result.returncode == 1
    assert f"Port {demo.port} on" in result.stderr


def test_addresses_are_printed(demo: Demo) -> None:
    """The shared address and each node's."""
    for port in range(demo.port, demo.port + 4):
        assert f"http://localhost:{port}/" in demo.log()


def test_given_redis_is_used_and_left_running(valkey: Server) -> None:
    """With --redis no server of its own is started."""
    port = row_of_ports(2)
    with subprocess.Popen(
        [sys.executable, "-m", "demo", "--port", str(port), "--nodes", "1", "--redis", valkey.url],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "Ctrl-C" in line:
                break
        assert valkey.client().keys("asgi-cluster-demo:*")
        process.send_signal(signal.SIGTERM)
        assert process.wait(15) == 0
    assert valkey.client().ping()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_signal_leaves_nothing_running(number: signal.Signals) -> None:
    """Ctrl-C and SIGTERM: every process is gone, status 0, and the ports are free again."""
    with start_demo(nodes=2) as demo:
        family = demo.family()
        assert len(family) == 5  # supervisor, two nodes, Valkey and its guard
        assert interrupt(demo, number) == 0
        assert stopped(family)
        assert "Traceback" not in demo.log()


async def test_killed_supervisor_leaves_nothing_running() -> None:
    """kill -9 of the supervisor: nodes and Valkey see the end of their pipe, and no directory stays."""
    with start_demo(nodes=1) as demo:
        family = demo.family()
        directory = demo.directory()
        demo.process.kill()
        await eventually(lambda: stopped(family), timeout=10)
        assert not directory.exists()


async def test_killed_node_is_started_again() -> None:
    """A node that dies comes back on its port, and the person is told."""
    with start_demo(nodes=1) as demo:
        killed = demo.node_pid(1)
        os.kill(killed, signal.SIGKILL)
        await eventually(lambda: "node-1 is back" in demo.log(), timeout=20)
        assert "SIGKILL" in demo.log()
        assert demo.node_pid(1) != killed
        async with httpx.AsyncClient() as client:
            assert (await client.get(demo.node_url(1) + "/health")).status_code == 200


@pytest.mark.parametrize("victim", ["server", "guard"])
async def test_killed_valkey_is_started_again_with_its_data(victim: str) -> None:
    """kill -9 of the embedded Valkey, or of the process that guards it: one line says so, the session and the
    notes are there again, and Ctrl-C still leaves nothing behind.
    """
    with start_demo(nodes=1) as demo:
        async with httpx.AsyncClient(base_url=demo.node_url(1)) as client:
            assert (await client.post("/api/login", json={"name": "Ada"})).status_code == 200
            note = (await client.post("/api/board/notes", json={"text": "kept"})).json()
            killed = demo.valkey()
            directory = demo.directory()
            parent = killed.parent()
            assert parent is not None
            (killed if victim == "server" else parent).kill()
            await eventually(lambda: "Valkey is back" in demo.log(), timeout=20)
            said = [line for line in demo.log().splitlines() if line.startswith("Valkey was")]
            assert said == ["Valkey was ended by SIGKILL; starting it again with its data."]

            async def has_redis() -> bool:
                stats = await client.get("/api/stats")
                return bool(stats.json()["bus"]["lease_remaining"] > 0)

            await eventually(has_redis, timeout=20)
            answer = await client.get("/api/board")  # the first one after the restart
            assert answer.status_code == 200
            assert answer.json()["notes"] == [note]
        assert demo.valkey().pid != killed.pid
        family = demo.family()
        assert len(family) == 4  # supervisor, node, Valkey and its guard
        assert interrupt(demo) == 0
        assert stopped([killed, *family])
        assert not directory.exists()
        assert "Traceback" not in demo.log()


async def test_valkey_that_cannot_start_again_ends_the_demo() -> None:
    """A data file that Valkey refuses to load: a few attempts, then status 1 and a sentence."""
    with start_demo(nodes=1) as demo:
        family = demo.family()
        directory = demo.directory()
        (log,) = directory.glob("appendonlydir/*.incr.aof")
        log.write_bytes(b"this is no command\r\n" * 10)
        demo.valkey().kill()
        await eventually(lambda: demo.process.poll() is not None, timeout=40)
        assert demo.process.returncode == 1
        assert "Valkey did not start again in 5 attempts" in demo.log()
        assert demo.log().count("starting it again with its data") == 5
        assert stopped(family)
        assert not directory.exists()
        assert "Traceback" not in demo.log()
