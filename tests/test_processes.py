"""Several processes that train together: what one process trains, however many there are, killed and gone on with."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

import frugan
from frugan.config import recipes
from frugan.reporting.run_folder import RunFolder

from .conftest import OWN_CODE, SMALL, assert_same_state, final_state
from .test_stream import numbered, write_shard

WORKER = """
import json, os, signal, sys, torch, frugan
from frugan.data.stream_loader import StreamLoader
from frugan.utils.errors import UserError
torch.set_default_dtype(torch.float64)
settings, kills = json.loads(sys.argv[3]), json.loads(sys.argv[4])
decoded, decode = [], StreamLoader._decode
StreamLoader._decode = lambda self, name, content: (decoded.append(name), decode(self, name, content))[1]

def on_update(images):
    killed = f"{sys.argv[2]}.killed{images}"
    if [int(os.environ.get("RANK", 0)), images] in kills and not os.path.exists(killed):
        open(killed, "w").close()
        os.kill(os.getpid(), signal.SIGKILL)

settings |= settings.pop("of", {}).get(os.environ.get("RANK", "0"), {})
try:
    frugan.train(settings.pop("data", sys.argv[1]), out=sys.argv[2], on_update=on_update, **settings)
    print("DECODED", os.environ.get("RANK"), len(decoded), flush=True)
except UserError as error:
    if not error.said:
        print("SAID", error, flush=True)
    sys.exit(2)
"""

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--monitor-interval", "0.2"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1] / "src")}


def together(processes: int, data: Path, out: Path, *, kills: Sequence[tuple[int, int]] = (), **settings: Any) -> Any:
    """A training by ``processes`` processes in double precision; ``kills``: which of them is killed after how many images, once.

    Where none is, they are started as torchrun would, but without it, which takes seconds.
    """
    script = out.parent / "worker.py"
    script.write_text(WORKER)
    command = [str(script), str(data), str(out), json.dumps(SMALL | settings), json.dumps(kills)]
    if kills:
        asked = ["--nproc-per-node", str(processes), "--max-restarts", str(len(kills)), "--standalone"]
        return subprocess.run([*TORCHRUN, *asked, *command], env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    group = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    started = []
    for rank in range(processes):
        environment = ENVIRONMENT | group | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        started.append(
            subprocess.Popen([sys.executable, *command], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
    said = [process.communicate(timeout=300) for process in started]
    worst = max(started, key=lambda process: abs(process.returncode)).returncode
    return subprocess.CompletedProcess(command, worst, "".join(out for out, _ in said), "".join(errors for _, errors in said))


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def alone(data: Path, out: Path, **settings: Any) -> None:
    """The same by one process: this one."""
    torch.set_default_dtype(torch.float64)
    try:
        frugan.train(data, out=out, **(SMALL | settings))
    finally:
        torch.set_default_dtype(torch.float32)


def assert_near(run: Path, other: Path, tolerance: float = 1e-10) -> None:
    """The same weights, moments and averages up to rounding in double precision."""
    (tensors, numbers), (others, other_numbers) = final_state(run), final_state(other)
    assert tensors.keys() == others.keys() and numbers["images"] == other_numbers["images"]
    for name, tensor in tensors.items():
        assert torch.allclose(tensor.double(), others[name].double(), rtol=tolerance, atol=tolerance), name


def uncoupled(name: str) -> dict[str, Any]:
    """Settings with which samples of the recipe ``name`` do not depend on one another."""
    known = recipes.get(name).flat()
    return {"recipe": name} | {norm: "group" for norm in ("norm_g", "norm_d") if known.get(norm) == "batch"}


@pytest.mark.parametrize("name", OWN_CODE)
def test_processes_train_what_one_process_trains(name: str, few: Path, tmp_path: Path) -> None:
    known = recipes.get(name).flat()
    asked = {k: v for k, v in SMALL.items() if k in known} | uncoupled(name)
    asked |= {"epochs": 5, "conditional": True, "augment": "ada", "flip": "yes", "accumulation_steps": 2}
    if "feature_updates" in known:
        asked["feature_updates"] = 4
    alone(few, tmp_path / "one", **asked)
    for processes in (2, 4) if name == "dcgan" else (2,):
        done = together(processes, few, tmp_path / str(processes), **asked)
        assert done.returncode == 0, done.stderr[-3000:]
        tensors, numbers = final_state(tmp_path / str(processes))
        assert numbers["updates"] == 20 and all(t.dtype == torch.float64 for t in tensors.values() if t.dim())
        assert_near(tmp_path / "one", tmp_path / str(processes))


def test_each_process_decodes_its_share_of_a_stream(tmp_path: Path) -> None:
    for number in range(2):
        write_shard(tmp_path / f"s-{number}.tar", {f"{i}.png": numbered(40 * number + i) for i in range(40)})
    asked = uncoupled("r3") | {"stream": True, "channels": 1, "epochs": 3, "width_g": 4, "width_d": 4}
    alone(tmp_path, tmp_path / "one", **asked)
    done = together(2, tmp_path, tmp_path / "two", **asked)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_near(tmp_path / "one", tmp_path / "two")
    follower = next(line for line in done.stdout.splitlines() if "DECODED 1" in line)
    assert int(follower.split()[-1]) <= 4 * 40  # of three epochs, and of the one that is read ahead


def test_one_of_two_is_killed_and_the_group_ends_as_if_it_had_not_been(few: Path, tmp_path: Path) -> None:
    asked = uncoupled("r3") | {"epochs": 4, "width_g": 4, "width_d": 4}
    kills = ((0, 96), (1, 160))  # the one that writes, then the other; in the midst of epochs
    for out, times in ((tmp_path / "whole", ()), (tmp_path / "killed", kills)):
        done = together(2, few, out, kills=times, **asked)
        assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert len([*tmp_path.glob("killed.killed*")]) == 2
    assert_same_state(tmp_path / "whole", tmp_path / "killed")


def test_going_on_with_other_numbers_of_processes_trains_the_same(few: Path, tmp_path: Path) -> None:
    asked = uncoupled("dcgan")
    alone(few, tmp_path / "one", **asked, epochs=6)
    alone(few, tmp_path / "many", **asked, epochs=2)
    for epochs, processes in ((4, 4), (6, 2)):
        done = together(processes, few, tmp_path / "many", **asked, epochs=epochs)
        assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert_near(tmp_path / "one", tmp_path / "many")


def test_what_processes_cannot_do_is_one_sentence_from_one_of_them(few: Path, tmp_path: Path) -> None:
    for sentence, asked in {
        "do not train the same: --lr-g is 0.001 in process 0 and 0.002 in process 1": {
            "lr_g": 1e-3, "of": {"1": {"lr_g": 2e-3}},
        },
        "--device cuda:7: there is no such device": {"device": "cuda:7"},
        "--batch-size 15 does not divide among 2 processes: 14 or 16 does": {"batch_size": 15},
        "there is no folder": {"of": {"1": {"data": "nowhere"}}},
        "the smallest that works is": {"memory": "64MiB"},
    }.items():  # fmt: skip
        done = together(2, few, tmp_path / "out", **asked)
        said = [line for line in done.stdout.splitlines() if "SAID" in line]
        assert done.returncode != 0 and len(said) == 1 and sentence in said[0], (sentence, done.stdout, done.stderr[-2000:])
        assert not (tmp_path / "out" / "checkpoints").exists()


def test_others_that_do_not_come_are_waited_for_until_a_limit(few: Path, tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    there = ENVIRONMENT | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "FRUGAN_MEET": "3"}
    command = [sys.executable, str(script), str(few), str(tmp_path / "r"), json.dumps(SMALL), "[]"]
    began, waiting = time.monotonic(), []
    for rank, port in ((0, 0), (1, 9)):  # the first waits for a second, and a second for a first
        environment = there | {"RANK": str(rank), "MASTER_PORT": str(port)}
        waiting.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    for process in waiting:
        said, errors = process.communicate(timeout=120)
        assert process.returncode == 2 and "the 2 processes could not meet at 127.0.0.1" in said, (said, errors[-2000:])
    for size, sentence in (("2", "nothing says RANK: start them with torchrun"), ("two", "WORLD_SIZE=two is no number")):
        half = subprocess.run(command, env=ENVIRONMENT | {"WORLD_SIZE": size}, capture_output=True, text=True)
        assert half.returncode == 2 and sentence in half.stdout, half.stderr[-2000:]
    assert time.monotonic() - began < 60 and not (tmp_path / "r").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="a machine is played by an address of the loopback range")
def test_two_machines_of_which_one_cannot_be_reached_for_a_while(few: Path, tmp_path: Path) -> None:
    asked, out, script = uncoupled("dcgan"), tmp_path / "two", tmp_path / "worker.py"
    script.write_text(WORKER)
    alone(few, tmp_path / "one", **asked, epochs=40)
    port = free_port()
    machines = []
    for number in (1, 2):
        command = [*TORCHRUN, "--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", "frugan"]
        command += ["--rdzv-endpoint", f"127.0.0.1:{port}", "--local-addr", f"127.0.0.{number}"]
        command += [str(script), str(few), str(out), json.dumps(SMALL | asked | {"epochs": 40}), "[]"]
        machines.append(subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
    while not list(out.glob("checkpoints/*")):
        assert all(machine.poll() is None for machine in machines)
        time.sleep(0.05)
    away = [psutil.Process(machines[1].pid), *psutil.Process(machines[1].pid).children(recursive=True)]
    for process in away:
        process.suspend()
    time.sleep(1)
    before = RunFolder(out).newest_checkpoint()
    time.sleep(3)
    assert RunFolder(out).newest_checkpoint() == before, "it waits"
    for process in away:
        process.resume()
    assert [machine.wait(120) for machine in machines] == [0, 0]
    assert_near(tmp_path / "one", out)
