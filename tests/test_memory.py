"""Memory is given back and does not grow."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import json, sys
import psutil
import frugan

resident = {}

def note(images):
    if images // 16 in (100, 2000):
        resident[images // 16] = psutil.Process().memory_info().rss

frugan.train(
    "digits", out=sys.argv[1], recipe="dcgan", batch_size=16, epochs=18, width_g=16, width_d=16,
    accumulation_steps=2, sample_every=1, quiet=True, device="cpu", threads=2, on_update=note,
)
print(json.dumps(resident))
"""


def test_resident_memory_after_2000_updates_is_that_after_100(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path / "r")], capture_output=True, text=True, check=True)
    resident = json.loads(done.stdout)
    assert resident["2000"] < 1.02 * resident["100"], resident
