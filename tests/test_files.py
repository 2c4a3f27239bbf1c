"""Files are written whole or not at all, whoever else writes them at the same time."""

import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from frugan.utils.errors import UserError
from frugan.utils.files import CACHED, cached, whole, write_text

DAYS = 2 * 24 * 3600


def aged(path: Path) -> Path:
    """``path``, as if nobody had written to it for two days."""
    then = time.time() - DAYS
    os.utime(path, (then, then))
    return path


def test_who_writes_the_same_file_meanwhile_is_not_in_the_way(tmp_path: Path) -> None:
    file = tmp_path / "cache" / "features.json"
    with whole(file) as first:
        first.write_text("first")
        with whole(file) as second:
            second.write_text("second")
        assert file.read_text() == "second"
        assert first.read_text() == "first"
    assert file.read_text() == "first"  # the last one stays
    with pytest.raises(UnicodeEncodeError):
        write_text(file, "thi\ud800")
    assert file.read_text() == "first"
    assert [p.name for p in file.parent.iterdir()] == ["features.json"]


WRITE = """
import sys
from pathlib import Path
from frugan.utils.files import write_text
sys.stdin.readline()
for number in range(100):
    write_text(Path(sys.argv[1]), sys.argv[2] * 50_000)
"""


def test_processes_that_write_the_same_file_leave_one_of_theirs(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRITE, str(tmp_path / "shared.json")]
    writers = [subprocess.Popen([*command, c], stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for c in "abc"]
    for writer in writers:
        assert writer.stdin
        writer.stdin.write("go\n")
        writer.stdin.flush()
    assert [(writer.communicate()[1], writer.returncode) for writer in writers] == [("", 0)] * 3
    assert (tmp_path / "shared.json").read_text() in {c * 50_000 for c in "abc"}
    assert [p.name for p in tmp_path.iterdir()] == ["shared.json"]


@pytest.mark.skipif(os.name != "posix", reason="what a descriptor allows, as POSIX tells it")
def test_what_is_synced_may_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows refuses to sync any other."""
    import fcntl

    synced: list[int] = []
    sync = os.fsync

    def as_on_windows(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            return sync(descriptor)  # which Windows is not asked for
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(9, "Bad file descriptor")
        synced.append(descriptor)
        return sync(descriptor)

    monkeypatch.setattr(os, "fsync", as_on_windows)
    write_text(tmp_path / "plan.json", "{}")
    assert (tmp_path / "plan.json").read_text() == "{}" and len(synced) == 1


def test_parts_that_a_kill_left_go_and_those_of_others_stay(tmp_path: Path) -> None:
    killed = subprocess.run(
        [sys.executable, "-c", "import os, sys; from pathlib import Path; from frugan.utils.files import whole\n"
         "with whole(Path(sys.argv[1])) as part: part.write_text('half'); os.kill(os.getpid(), 9)",
         str(tmp_path / "plan.json")], capture_output=True, text=True,
    )  # fmt: skip
    assert killed.returncode == -9, killed.stderr
    (left,) = tmp_path.iterdir()
    fresh = tmp_path / left.name.replace("plan", "other")
    fresh.write_text("somebody writes this")
    mine = [aged(p) for p in (tmp_path / ".notes.part.json", tmp_path / ".plan.abcdefgh.part.json") if p.write_text("mine")]
    aged(left)
    write_text(tmp_path / "plan.json", "{}")
    assert sorted(tmp_path.iterdir()) == sorted([fresh, *mine, tmp_path / "plan.json"])


def test_what_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "full").write_text("")
    with pytest.raises(UserError, match=r"^cannot write .*folder: .*; what was there before is untouched\.$"):
        write_text(tmp_path / "folder", "text")
    with pytest.raises(UserError, match=r"^cannot write .*; what was there before is untouched\.$"):
        write_text(tmp_path / "folder" / "full" / "file", "text")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["folder", "full"]


def test_of_what_is_cached_the_last_used_stays(tmp_path: Path) -> None:
    files = [tmp_path / f"{i}.json" for i in range(CACHED + 3)]
    for i, file in enumerate(files):
        write_text(file, str(i))
        os.utime(file, (i, i))
    other, part = tmp_path / "0.rows", tmp_path / ".0.part.json"
    for path in (other, part):
        path.write_text("")
        os.utime(path, (0, 0))
    assert cached(files[0]).read_text() == "0"
    assert [file for file in files if not file.exists()] == files[1:4] and other.exists() and part.exists()
    assert not cached(tmp_path / "none" / "0.json").exists()
