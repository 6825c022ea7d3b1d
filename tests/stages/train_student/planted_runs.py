"""Trainings over planted rows in processes of their own, by one or several ranks. Run by test_planted_keys.py:

    python planted_runs.py PLAN.json

Imports once, then forks the ranks of every run with the environment that torchrun gives them: what is killed is the
training, not the start of Python. Prints one line of JSON per run.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import torch
from conftest import PlantedRows, PlantedView

from kd.cli import main
from kd.stages.train_student import training
from kd.stages.train_student.methods.rail_kd import RailKd
from kd.stages.train_student.rows import StoreRows

assert training and torch.get_num_threads() == 1


def train(plan: dict[str, Any], run: dict[str, Any], rank: int) -> None:
    """One rank: the real command line, every row watched. Ends the process."""
    folder = Path(plan["folder"])
    for number, kind in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"{run['name']}.{rank}.{kind}", os.O_WRONLY | os.O_CREAT), number)
    passes, draws = (
        os.open(folder / f"{run['name']}.{rank}.{kind}", os.O_WRONLY | os.O_CREAT) for kind in ("passes", "draws")
    )

    class Watched(PlantedRows):
        def check(self, index: list[int], **given: Any) -> None:
            super().check(index, **given)
            os.write(passes, json.dumps(index).encode() + b"\n")

    def kill(number: int) -> None:
        if run.get("kill") == [rank, number]:
            os.kill(os.getpid(), signal.SIGKILL)
        if run.get("interrupt") == [rank, number]:
            os.kill(os.getpid(), signal.SIGINT)

    watched = Watched([PlantedView(**view) for view in plan["views"]], on_pass=kill)
    if not run.get("unwatched"):
        watched.watch()
    draw = RailKd.draw

    def noted(self: RailKd, seed: int, epoch: int, shapes: Any) -> Any:
        pairs = draw(self, seed, epoch, shapes)
        os.write(draws, json.dumps({"layers": pairs, "negatives": watched.negatives[-1]}).encode() + b"\n")
        return pairs

    RailKd.draw = noted  # type: ignore[method-assign]
    if run.get("shift"):
        gather = StoreRows.gather
        StoreRows.gather = lambda self, signal, index: gather(self, signal, (index + 1) % len(self))  # type: ignore[method-assign]
    words = ["train-student", "--json", "--quiet", "--output-dir", str(folder / run["output"])]
    for name, value in {**plan["fields"], **run["fields"]}.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            words += [flag] if value else []
        else:
            for item in value if isinstance(value, list) else [value]:
                words += [flag, str(item)]
    code = 1
    with contextlib.suppress(SystemExit):
        try:
            code = main(words)
        except SystemExit as leaving:
            code = int(leaving.code or 0)
    os._exit(code)


def launch(plan: dict[str, Any], run: dict[str, Any]) -> dict[str, Any]:
    """Start the ranks of a run; as torchrun does, end all when one has failed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = time.monotonic()
    children = []
    for rank in range(run["ranks"]):
        child = os.fork()
        if child == 0:
            if run["ranks"] > 1:
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(run["ranks"])}
                os.environ |= {"LOCAL_WORLD_SIZE": str(run["ranks"]), "MASTER_ADDR": "127.0.0.1"}
                os.environ["MASTER_PORT"] = str(port)
            train(plan, run, rank)
        children.append(child)
    codes: dict[int, int] = {}
    ended_s = time.monotonic() - started
    while len(codes) < len(children):
        child, status = os.wait()
        codes[child] = os.waitstatus_to_exitcode(status)
        ended_s = time.monotonic() - started
        if codes[child]:
            time.sleep(0.1)
            for other in set(children) - set(codes):
                os.kill(other, signal.SIGKILL if codes[child] == -signal.SIGKILL else signal.SIGTERM)

    def said(rank: int, kind: str) -> str:
        file = Path(plan["folder"]) / f"{run['name']}.{rank}.{kind}"
        return file.read_text() if file.exists() else ""

    ranks = range(run["ranks"])
    return {
        "name": run["name"],
        "output": run["output"],
        "codes": [codes[child] for child in children],
        "passes": [[json.loads(line) for line in said(rank, "passes").splitlines()] for rank in ranks],
        "draws": [[json.loads(line) for line in said(rank, "draws").splitlines()] for rank in ranks],
        "stdout": [said(rank, "out") for rank in ranks],
        "stderr": [said(rank, "err") for rank in ranks],
        "seconds": ended_s,
    }


if __name__ == "__main__":
    plan = json.loads(Path(sys.argv[1]).read_text())
    for run in plan["runs"]:
        print(json.dumps(launch(plan, run)), flush=True)
