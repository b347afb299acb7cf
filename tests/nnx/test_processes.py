"""Programs of several real processes, which talk over the loopback device."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

PROGRAM = os.path.join(os.path.dirname(__file__), "processes.py")


def start(count, folder, *task):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    return [
        subprocess.Popen(
            [sys.executable, PROGRAM, str(i), str(count), port, str(folder), *task],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for i in range(count)
    ]


def finish(processes, codes=None):
    """The results of all processes, as one dict."""
    found = []
    for i, process in enumerate(processes):
        try:
            out, err = process.communicate(timeout=400)
        except subprocess.TimeoutExpired:
            for other in processes:
                other.kill()
            raise
        expected = 0 if codes is None else codes[i]
        assert expected is None or process.returncode == expected, err[-3000:]
        lines = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
        found.append({k: v for line in lines for k, v in line.items()})
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def found(folder):
    """The results of two processes that check everything."""
    return finish(start(2, folder, "check"))


def test_what_is_replicated_is_written_once_and_read_by_all(found):
    for facts in found:
        assert facts["spread"] == [True, True, True]
        assert facts["files"] == ["one.npz", "run"] and facts["one"]
        kind, message, _ = facts["sharded_in_one"]
        assert (
            kind == "SaveError" and "'w' is spread over the devices of several processes" in message
        )
        assert "Save into a directory, in every process" in message


def test_each_process_writes_and_reads_its_own_shards(found):
    for facts in found:
        assert facts["right"] and facts["parts"] == [[2, 4]] * 2
        assert facts["local"] and facts["key"]


def test_what_is_not_addressable_is_shown_and_cloned(found):
    for facts in found:
        assert all(facts["shown"]) and facts["copied"]


def test_a_process_that_saves_alone_gets_an_error_in_time(found):
    kind, message, seconds = found[0]["alone"]
    assert kind == "SaveError" and "process 1 did not call it within 1 s" in message
    assert "Every process of the program must call nnx.save" in message and seconds < 20
    for i, facts in enumerate(found):
        kind, message, _ = facts["other"]
        assert kind == "SaveError" and f"This is process {i} of 2" in message
        assert "the folder to save in does not exist" in facts["nowhere"][1]
        assert facts["whole"]


def test_a_process_killed_in_a_step_or_in_a_save_and_a_restart_in_another_number(found, folder):
    for how in ("save", "step"):
        start_time = time.monotonic()
        first, second = finish(start(2, folder, "killed", how), codes=[None, -signal.SIGKILL])
        # The other process ends, through an error in the step or the save, or because JAX ends it.
        assert first["ready"] and time.monotonic() - start_time < 400
        assert first.get("failed", "ended by JAX") is not None
        # Both started from the last complete checkpoint.
        for facts in (first, second):
            assert np.allclose(facts["then"], found[0]["then"], rtol=1e-5)
    for count in (1, 3):
        for facts in finish(start(count, folder, "go_on")):
            assert facts["step"] == 4
            assert np.allclose(facts["then"], found[0]["then"], rtol=1e-5)
    assert sorted(os.listdir(folder / "run"))[1:] == ["nnx.json"]
