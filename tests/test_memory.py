"""Memory is given back and does not grow; and a training leaves the program that called it as it was."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from frugan.memory import host, limit, pool

SCRIPT = """
import json, sys
import psutil
import frugan

resident = {}

def note(images):
    if images // 16 in (200, 2000):  # the first epoch, after which plots are drawn, has 112 updates
        now = psutil.Process().memory_info()
        resident[images // 16] = now.rss - now.shared  # code that was let go comes back as it is run

frugan.train(
    "digits", out=sys.argv[1], recipe="dcgan", image_size=8, batch_size=16, epochs=18, width_g=8, width_d=8,
    accumulation_steps=2, whole_batch_norm="no", sample_every=1, quiet=True, device="cpu", threads=1, on_update=note,
)
print(json.dumps(resident))
"""


def test_resident_memory_after_2000_updates_is_that_after_200(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path / "r")], capture_output=True, text=True, check=True)
    resident = json.loads(done.stdout)
    assert resident["2000"] < 1.02 * resident["200"], resident


GUEST = """
import gc, json, os, resource, signal, sys
from pathlib import Path
import numpy as np
import psutil
import torch
import frugan
from frugan.memory import pool

def resident():
    return psutil.Process().memory_info().rss

def given_back():
    many = [torch.ones(1 << 18) for _ in range(64)]  # a MiB each
    held = resident()
    del many
    return (held - resident()) / 2**20

def pooled():
    before = pool.state().used
    tensor = torch.ones(1 << 18)
    return pool.state().used > before

def found():
    places = [torch.backends.cudnn.conv, torch.backends.cudnn.rnn, torch.backends.cuda.matmul, torch.backends]
    mask = os.umask(0)
    os.umask(mask)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TORCH")}  # torch notes its cache of kernels there
    return {
        "threads": torch.get_num_threads(), "frozen": gc.get_freeze_count() > 0, "collects": gc.isenabled(),
        "precision": [place.fp32_precision for place in places],
        "data": resource.getrlimit(resource.RLIMIT_DATA), "umask": mask, "folder": os.getcwd(), "environment": environment,
        "signals": [str(signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)],
        "draws": [torch.get_rng_state().sum().item(), np.random.get_state()[1].tolist()],
        "dtype": str(torch.get_default_dtype()), "grad": torch.is_grad_enabled(),
    }

torch.set_num_threads(2)
os.umask(0o027)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
torch.backends.cudnn.conv.fp32_precision = "tf32"
before = found()
within = []

def note(images):
    within[:] = [found(), pooled()]

settings = dict(recipe="dcgan", batch_size=16, epochs=1, width_g=8, width_d=8, threads=1, device="cpu", quiet=True)
frugan.train(sys.argv[2], out=sys.argv[1], on_update=note, memory=f"{(resident() >> 20) + 600}MiB", **settings)
trained = [found(), given_back(), pooled()]
try:
    frugan.train(sys.argv[2], out=sys.argv[1] + "-refused", memory="20MiB", **settings)
except frugan.UserError as error:
    refused = str(error)
print(json.dumps([before, within, trained, [found(), given_back()], refused]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is only limited on Linux")
def test_more_than_is_free_is_refused_where_the_system_would_end_the_process() -> None:
    import resource

    before, most = resource.getrlimit(resource.RLIMIT_DATA), int(0.6 * host.free())
    with limit.within_free(torch.device("cpu")):
        one = torch.empty(most, dtype=torch.uint8)  # addresses alone: nothing touches them
        with pytest.raises(RuntimeError) as caught:
            torch.empty(most, dtype=torch.uint8)
    assert limit.is_out_of_memory(caught.value) and one.nbytes == most
    assert resource.getrlimit(resource.RLIMIT_DATA) == before


def test_a_training_leaves_the_program_that_called_it_as_it_was(tmp_path: Path, few: Path) -> None:
    done = subprocess.run([sys.executable, "-c", GUEST, str(tmp_path / "r"), str(few)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    before, within, trained, after, refused = json.loads(done.stdout)
    for name in ("threads", "frozen", "precision", "data", "signals"):
        assert within[0][name] != before[name], name  # so it was something to put back
    assert within[1] == pool.available() and not trained[2]  # tensors come from the pool while training goes on
    assert trained[1] > 60 and after[1] > 60  # MiB of 64 that go back to the system at once
    assert trained[0] == before and after[0] == before
    assert "--memory 20.0 MiB is too little" in refused
