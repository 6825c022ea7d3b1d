"""An interpreter that has imported torch, transformers and kd before it is started.

`python warm.py SOCKET` imports them once and then forks a process for every client. `CLIENT` is a program that takes an
interpreter's words (`-m kd run ...`, `-c CODE ...`, `benchmark.py ...`) and has them carried out there, with its own
environment, folder and file descriptors; it ends as the process ends, and when it is killed, so is the process. What
differs from an interpreter of its own: imports are done, and the hash seed and `sys.path` are those of the server. Its
`sys.executable` is the client, so that steps of a workflow start warm too; what `multiprocessing` spawns does not.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import runpy
import select
import signal
import socket
import sys
import threading

CLIENT = """\
#!{python} -IS
import json, os, socket, struct, sys
request = json.dumps([sys.argv, os.getcwd(), dict(os.environ)]).encode()
with socket.socket(socket.AF_UNIX) as server:
    server.connect({socket!r})
    socket.send_fds(server, [struct.pack("!Q", len(request))], [0, 1, 2])
    server.sendall(request)
    code = int(server.makefile().read())
if code < 0:
    os.kill(os.getpid(), -code)
sys.exit(code)
"""


def main(place: str) -> None:
    import multiprocessing.spawn  # before `sys.executable` changes

    import torch
    import transformers.models.bert.modeling_bert

    import kd.cli
    import kd.stages.cache_teacher.capture
    import kd.stages.teacher_training
    import kd.stages.train_student.training

    assert multiprocessing.spawn and transformers and kd
    assert torch.get_num_threads() == threading.active_count() == 1, "threads do not survive a fork"
    gc.collect()
    gc.freeze()  # so that no process looks at each of their objects again
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # those that watch are reaped by the kernel
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(place)
        listener.listen()
        print("ready", flush=True)
        while True:
            # Whoever started this holds the other end of our stdin.
            if sys.stdin in select.select([listener, sys.stdin], [], [])[0]:
                return
            connection, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                words = watch(connection)
                if words is None:
                    os._exit(0)
                break
            connection.close()
    carry_out(words)


def watch(connection: socket.socket) -> list[str] | None:
    """Fork the process that a client asks for, and tell the client how it ended. In that process: its words."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    head, descriptors, _, _ = socket.recv_fds(connection, 8, 3)
    size, data = int.from_bytes(head, "big"), bytearray()
    while len(data) < size:
        data += connection.recv(size - len(data))
    (program, *words), folder, environment = json.loads(data)
    child = os.fork()
    if child == 0:
        for number, descriptor in enumerate(descriptors):
            os.dup2(descriptor, number)
            os.close(descriptor)
        connection.close()
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        sys.executable = program
        return words
    for descriptor in (0, 1, 2, *descriptors):
        os.close(descriptor)
    ended = os.pidfd_open(child)
    if connection in select.select([ended, connection], [], [])[0]:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    with contextlib.suppress(BrokenPipeError):
        connection.sendall(str(os.waitstatus_to_exitcode(status)).encode())
    return None


def carry_out(words: list[str]) -> None:
    """As the interpreter does: `-m MODULE`, `-c CODE` or a file, and the words that follow."""
    if words[0] == "-P":
        words = words[1:]
    sys.path[0] = os.getcwd()
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = words
        sys.path[0] = os.path.dirname(os.path.abspath(words[0]))
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1])
