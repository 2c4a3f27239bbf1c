"""A plan for several processes: shares, memory, and how long gradients take."""

import json
from pathlib import Path

import pytest

from frugan.cli import main
from frugan.config import recipes
from frugan.gan.networks import build
from frugan.training.scaling import Link, gradients

ASKED = ("--recipe", "mlp", "--image-size", "16", "--batch-size", "16")


def test_a_ring_sends_all_gradients_hardly_twice_however_many_there_are() -> None:
    link = Link(messages=1e-3, bytes=0.1)
    assert link.seconds(1) == 0 and link.seconds(2) == pytest.approx(0.101)
    assert [Link(0.0, 0.1).seconds(n) for n in (4, 1000)] == pytest.approx([0.15, 0.1998])
    assert Link(1e-3, 0.0).seconds(1000) == pytest.approx(0.999)  # as many messages one after another


def test_what_is_exchanged_are_the_gradients_of_what_learns() -> None:
    recipe = recipes.dcgan().replace(image_size=16, channels=3)
    sizes = [p.numel() * 4 for network in build(recipe.network, 16, 3) for p in network.parameters()]
    assert gradients(recipe) == sizes
    fewer = gradients(recipe.replace(freeze_d=1, init_from="runs/a"))
    assert 0 < sum(fewer) < sum(sizes)


def test_a_plan_in_up_to_four_processes(
    few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FRUGAN_CACHE", str(tmp_path))  # other tests plan the same meanwhile, and find a little more loaded
    main(["plan", str(few), *ASKED, "--processes", "4", "--json"])
    found = json.loads(capsys.readouterr().out)
    rows = found["processes"]
    assert [(row["processes"], row["images"]) for row in rows] == [(1, 16), (2, 8), (4, 4)]
    assert rows[0]["memory"] == found["predicted"] and rows[0]["memory"] > rows[1]["memory"] > rows[2]["memory"] > 0
    assert 0 == rows[0]["exchanging"] < rows[1]["exchanging"] < rows[2]["exchanging"]  # measured between two processes
    for row in rows:
        assert row["images_per_second"] == pytest.approx(16 / (row["computing"] + row["exchanging"])) and row["computing"] > 0


def test_a_plan_over_a_link_that_is_named(few: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", str(few), *ASKED, "--processes", "2", "--link", "1kB/s"])
    said = capsys.readouterr().out
    assert "From 2 processes on, exchanging gradients at 1kB/s, without the delay of messages, takes longer" in said
    main(["plan", str(few), *ASKED, "--processes", "2", "--link", "900TB"])
    assert "is 0.0% of an update in 2 processes" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        (["--processes", "3"], "--batch-size 16 does not divide among 3 processes: 15 or 18 does."),
        (["--processes", "0"], "--processes 0 is none: say 2 or more."),
        (["--link", "3GB/s"], "--link says how fast processes exchange: say how many there are too, as in --processes 8."),
        (["--processes", "2", "--link", "fast"], "--link fast is no speed: say the bytes a second between two processes, as 12GB"),
        (["--processes", "16", "--link", "3GB/s"], "batch norm cannot train on micro-batches of 1"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_sentence(asked: list[str], sentence: str, few: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["plan", str(few), *ASKED, *asked])
    said = capsys.readouterr().err
    assert sentence in said and said.count("\n") == 1
