"""What `warm_python` starts behaves as a process of its own."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

PROGRAM = "import os, sys; print(os.getcwd(), os.environ['WORD'], sys.argv, sys.stdin.read()); sys.exit('no')"


def test_it_has_its_own_folder_environment_words_streams_and_exit_code(warm_python: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [warm_python, "-c", PROGRAM, "a b"],
        cwd=tmp_path,
        env={"WORD": "w"},
        input="given",
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout, done.stderr) == (1, f"{tmp_path} w ['-c', 'a b'] given\n", "no\n")


def test_a_signal_that_ends_it_ends_the_client_too(warm_python: str) -> None:
    program = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    assert subprocess.run([warm_python, "-c", program], timeout=60).returncode == -signal.SIGKILL


def test_it_ends_with_the_client(warm_python: str) -> None:
    program = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
    with subprocess.Popen([warm_python, "-c", program], stdout=subprocess.PIPE, text=True) as client:
        assert client.stdout is not None
        process = int(client.stdout.readline())
        client.kill()
    deadline = time.monotonic() + 60
    while Path(f"/proc/{process}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
