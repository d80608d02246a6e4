from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator

import pytest

from benchmarks.lines import Lines, complaint

pytestmark = [pytest.mark.netns, pytest.mark.slow]

ECHO = """
import socket
connection, _ = socket.create_server(("0.0.0.0", 7000)).accept()
while data := connection.recv(1 << 16):
    connection.sendall(data)
"""
CALL = """
import json, socket, sys, threading, time
while True:
    try:
        connection = socket.create_connection((sys.argv[1], 7000), 5)
        break
    except ConnectionRefusedError:
        time.sleep(0.05)
began = time.monotonic()
connection.sendall(b"x")
assert connection.recv(1) == b"x"
took_s = time.monotonic() - began
sent = b"".join(number.to_bytes(4, "big") for number in range(1 << 18))
threading.Thread(target=connection.sendall, args=(sent,), daemon=True).start()
got = b""
while len(got) < len(sent):
    got += connection.recv(1 << 20)
print(json.dumps({"took_s": took_s, "same": got == sent}))
"""


@pytest.fixture
def lines() -> Iterator[Lines]:
    if missing := complaint():
        pytest.skip(missing)
    made = Lines()
    try:
        made.open()
        yield made
    finally:
        made.close()


def test_a_delay_holds_what_passes_and_loses_nothing(lines: Lines) -> None:
    (here, _), (there, address) = lines.add(), lines.add()
    lines.delay(0.2)

    def start(name: str, *arguments: str) -> subprocess.Popen[str]:
        command = ["ip", "netns", "exec", name, sys.executable, "-c", *arguments]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    with start(there, ECHO) as echo, start(here, CALL, address) as call:
        try:
            said, _ = call.communicate(timeout=60)
        finally:
            call.kill()
            echo.kill()
    result = json.loads(said)
    assert result["same"]
    assert result["took_s"] >= 0.2
    passed = lines.end_delay()
    assert passed["bytes"] > 2 << 20
    assert passed["overflowed"] == passed["missed"] == 0
    assert lines.end_delay() == {}
