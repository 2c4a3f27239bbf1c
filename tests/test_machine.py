"""The machine: which device is taken, what arithmetic it does, how many threads; and sentences where something is missing."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import frugan
from frugan.cli import main
from frugan.utils import device, threads
from frugan.utils.errors import UserError

from .conftest import assert_same_state, final_state
from .test_resume import Killed, kill_at

CPU = torch.device("cpu")
BUILT = ["sm_75", "sm_80", "sm_86", "sm_90a", "sm_100f", "compute_120"]


@pytest.mark.parametrize(
    ("capability", "runs"),
    [
        ((7, 5), True),
        ((7, 0), False),  # Volta, older than anything built for
        ((8, 0), True),
        ((8, 9), True),  # code for 8.6 runs on 8.9
        ((9, 0), True),
        ((10, 3), True),  # of the family of 10.0
        ((11, 0), False),
        ((12, 1), True),  # compiled anew from what is for 12.0
        ((13, 0), True),
        ((6, 1), False),
    ],
)
def test_whether_a_torch_has_code_for_a_gpu(capability: tuple[int, int], runs: bool) -> None:
    assert device.runs_on(capability, BUILT) is runs


def test_code_with_a_letter_is_for_one_gpu_alone() -> None:
    assert device.runs_on((9, 0), ["sm_90a"])
    assert not device.runs_on((9, 1), ["sm_90a"])
    assert not device.runs_on((10, 0), [])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize("name", ["cuda", "cuda:3", "mps", "xpu", "nonsense", "cuda:x", "meta", "cpu:3", ""])
def test_a_device_that_is_not_there_is_named_in_one_sentence(
    name: str, few: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["train", str(few), "--device", name, "--out", str(tmp_path / "r"), "--epochs", "1", "--memory", "1GiB"])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and len(said.splitlines()) == 1 and f"--device {name or repr(name)}" in said
    assert not (tmp_path / "r").exists()


def test_an_operator_that_a_device_has_not_is_named(few: Path, tmp_path: Path) -> None:
    def after(images: int) -> None:
        torch.linalg.inv(torch.eye(2).to_sparse())  # nobody has that

    with pytest.raises(UserError, match=r"cpu cannot compute aten::linalg_inv_ex\S*: use another --device"):
        frugan.train(few, recipe="mlp", batch_size=16, epochs=1, quiet=True, out=tmp_path / "r", on_update=after)


def test_auto_is_the_best_there_is() -> None:
    assert device.choose("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_fp32_is_whole_single_precision_and_the_program_gets_its_own_setting_back() -> None:
    places = [torch.backends.cudnn.conv, torch.backends.cudnn.rnn, torch.backends.cuda.matmul]
    before = [place.fp32_precision for place in places]
    places[0].fp32_precision = "tf32"
    try:
        with device.arithmetic("fp32", CPU):
            assert {place.fp32_precision for place in places} == {"ieee"}
        assert places[0].fp32_precision == "tf32"
        with pytest.raises(UserError, match="Ampere"), device.arithmetic("tf32", CPU):
            raise AssertionError("nothing is trained")
        assert places[0].fp32_precision == "tf32"
    finally:
        for place, value in zip(places, before, strict=True):
            place.fp32_precision = value


def test_a_run_keeps_the_number_of_threads_that_it_was_started_with_and_says_so(
    train: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = torch.get_num_threads()
    other = before + 1
    straight = train(tmp_path / "straight", threads=other)
    with pytest.raises(Killed):
        train(tmp_path / "broken", threads=other, on_update=kill_at(7))
    assert torch.get_num_threads() == before
    resumed = train(tmp_path / "broken", threads=None, quiet=False)
    assert f"With {other} threads, as it was started" in capsys.readouterr().out
    assert torch.get_num_threads() == before
    assert final_state(resumed)[1]["threads"] == other
    assert_same_state(straight, resumed)


def test_a_run_with_more_threads_than_there_are_cores_says_that_it_is_slow(
    train: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    many = 64
    run = train(tmp_path / "r", threads=many, epochs=1)
    train(run, threads=None, epochs=2, quiet=False)
    said = capsys.readouterr().out
    assert f"With {many} threads, as it was started" in said and "slow" in said and "--threads" in said


def test_what_does_nothing_or_is_slow_on_the_cpu_is_said(
    train: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path / "r", epochs=1, quiet=False, precision="fp16", offload_state="yes")
    said = capsys.readouterr().out
    assert "nothing to offload to" in said and "many times slower" in said
    train(tmp_path / "plain", epochs=1, quiet=False)
    said = capsys.readouterr().out
    assert "nothing to offload to" not in said and "many times slower" not in said and "does nothing" not in said
    idle = {"cuda_graphs": "yes", "penalty": "jvp", "augment_policy": "color", "schedule_factor": 0.3, "evaluate_samples": 100}
    train(tmp_path / "idle", epochs=1, quiet=False, **idle)
    said = capsys.readouterr().out
    for name in idle:
        assert f"--{name.replace('_', '-')} does nothing without " in said
    train(tmp_path / "looked", epochs=1, quiet=False, penalty="jvp", r1=1.0, augment="diff", augment_policy="color")
    assert "does nothing" not in capsys.readouterr().out


KEPT_APART = """
import os, sys, threading
from pathlib import Path
from frugan.utils import threads
threads.begin(int(sys.argv[1]) or None)
import torch

def allowed(tasks=Path("/proc/self/task")):
    torch.ones(1 << 20).sin_()
    lines = [(task / "status").read_text().split("Cpus_allowed_list:")[1].split()[0] for task in tasks.iterdir()]
    return sorted(lines, key=len)

first, every = str(min(os.sched_getaffinity(0))), len(os.sched_getaffinity(0))
assert len(os.sched_getaffinity(0)) == int(sys.argv[2]) and "OMP_PROC_BIND" not in os.environ
with threads.apart():
    inside = allowed()
    assert (os.sched_getaffinity(0) == {int(first)}) == (sys.argv[3] == "apart"), inside
assert len(os.sched_getaffinity(0)) == every
print(len({line for line in inside if line.isdigit()}))
"""


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="threads are placed on Linux alone")
def test_each_thread_keeps_to_a_processor_where_there_is_one_for_each() -> None:
    processors = sorted(os.sched_getaffinity(0))
    if len(processors) < 2 or threads._siblings(processors):
        pytest.skip("processors are parts of cores, or there is one")
    environment = {k: v for k, v in os.environ.items() if k not in threads.PLACED}
    cases: list[tuple[int, dict[str, str], str]] = [(0, {}, "apart"), (1, {}, "free"), (0, {"WORLD_SIZE": "2"}, "free")]
    for asked, more, how in cases:
        command = [sys.executable, "-c", KEPT_APART, str(asked), str(len(processors)), how]
        done = subprocess.run(command, capture_output=True, text=True, env=environment | more)
        assert done.returncode == 0, done.stderr
        assert int(done.stdout) == (len(processors) if how == "apart" else 0), (asked, more)
