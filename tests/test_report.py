"""The report and the comparison: whole, safe and small whatever the run folder holds; the page itself is run where Chromium is."""

import json
import math
import random
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import frugan
from frugan.config import recipes
from frugan.reporting import report
from frugan.reporting.records import Metrics, Warned
from frugan.reporting.run_folder import RunFolder
from frugan.reporting.story import POINTS, Curve, Story, highest, lowest
from frugan.utils.errors import UserError

from .conftest import SMALL

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
NASTY = """a"b'<script>alert(1)&"""
LINE = {"images": 64, "epoch": 1.0, "updates": 4, "images/s": 100.0, "seconds left": 3.0, "Loss_D": 1.0, "Loss_G": 2.0}


class Page(HTMLParser):
    """What stands on a page: tags with their attributes, words, and what its charts show."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.charts: list[dict[str, Any]] = []
        self.source = path.read_text(encoding="utf-8")
        self._inside = ""
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = dict(attrs).get("type") or tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "application/json":
            self.charts += json.loads(data, parse_constant=pytest.fail)["charts"]
        elif self._inside not in ("script", "style"):
            self.words += data

    @property
    def pictures(self) -> list[str]:
        return [str(a["alt"]) for tag, a in self.tags if tag == "img"]

    def chart(self, title: str) -> dict[str, Any]:
        return next(chart for chart in self.charts if chart["title"] == title)


def folder(
    path: Path, lines: Iterable[Mapping[str, Any] | str] = (), plan: Mapping[str, Any] | None = None, **settings: Any
) -> Path:
    """A run folder with this log and these settings of `dcgan`."""
    path.mkdir(parents=True)
    (path / "recipe.toml").write_text(recipes.get("dcgan").replace(**settings).to_toml(), encoding="utf-8")
    if plan is not None:
        (path / "plan.json").write_text(json.dumps(plan))
    with (path / "log.jsonl").open("w") as file:
        file.writelines((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    return path


def metrics(images: int, values: Mapping[str, float], protocol: str = "2,000 samples against 60,000.") -> dict[str, Any]:
    return {"event": "metrics", "images": images, "values": values, "samples": 2000, "seconds": 1.0, "protocol": protocol}


@pytest.fixture(scope="module")
def run(few: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two epochs, with a picture after each; then some of what only longer trainings log."""
    out = frugan.train(few, out=tmp_path_factory.mktemp("runs") / "real", **(SMALL | {"epochs": 2, "sample_every": 1}))
    folder = RunFolder(out)
    for images, value in ((64, 9.0), (128, 5.0)):
        folder.log(Metrics.from_dict(metrics(images, {"frechet_classifier": value, "classes": 3})))
    folder.log(Warned(images=128, kind="collapse", text="All alike: try --recipe r3."))
    return out


def test_a_whole_run(run: Path) -> None:
    assert report.write(run) == run / "report.html"
    got = Page(run / "report.html")
    assert [a["content"] for tag, a in got.tags if a.get("name") == "viewport"] == ["width=device-width, initial-scale=1"]
    assert got.pictures[:3] == ["Grid of samples after epoch 1", "Grid of samples after epoch 2", "Grid of real images"]
    assert "Finished 128 of 128 images, epoch 2 of 2" in got.words
    assert "All alike: try --recipe r3." in got.words
    for title, names in (("Losses", ["D", "G"]), ("What D says of images", ["D(x), real", "D(G(z)), generated"])):
        assert [series["name"] for series in got.chart(title)["series"]] == names
    best = got.chart("Frechet distance (classifier)")["series"][0]
    assert best["points"][best["best"]] == [128, 5]
    assert "--width-d" in got.words  # a setting that is not the recipe's
    assert "D's phase" in got.words and "activations" in got.words  # where the bytes go
    assert [event.event for event in RunFolder(run).read_events()][-3:] == ["metrics", "metrics", "warning"]
    assert RunFolder(str(run)).read_events() == RunFolder(run).read_events()  # the path may be said in words


def test_pages_need_nothing_but_themselves(run: Path, tmp_path: Path) -> None:
    for path in (report.write(run), report.compare([run, run], tmp_path / "both.html")):
        got = Page(path)
        for tag, attributes in got.tags:
            for name in ("src", "href", "srcset", "action", "data", "poster"):
                assert (attributes.get(name) or "data:").startswith(("data:", "#")), (tag, name)
            assert tag not in ("iframe", "object", "embed", "base", "form")
        rest = re.sub(r'src="data:[^"]*"', "", got.source)
        assert not re.search(r"https?:|url\(|@import|fetch\(|XMLHttpRequest|import\(", rest)
        assert "default-src 'none'" in got.source


def test_names_are_only_ever_text(tmp_path: Path) -> None:
    lines = [
        LINE,
        metrics(64, {NASTY: 1.0, "fid": 2.0}, NASTY),
        {"event": "warning", "images": 64, "kind": NASTY, "text": NASTY},
        {"event": "memory ran out", "images": 64, "phase": NASTY, "change": NASTY, "guarantee": NASTY},
    ]
    plan = {"layouts": {NASTY: {"sizes": [NASTY]}}, "phases": {NASTY: {NASTY: 5}}, "guarantee": NASTY, "device": NASTY}
    nasty = folder(tmp_path / NASTY, lines, plan, data=NASTY)
    (nasty / "recipe.toml").write_text(
        (nasty / "recipe.toml").read_text().replace('recipe = "dcgan"', f"recipe = {json.dumps(NASTY)}")
    )
    Image.new("L", (8, 8)).save(nasty / "real_images.png")
    for path in (report.write(nasty), report.compare([nasty, nasty], tmp_path / "both.html")):
        got = Page(path)
        assert "alert" not in str(got.tags)
        assert [a for tag, a in got.tags if tag == "script"].count({}) == 1
        assert "<script>alert" not in got.source
        assert NASTY in got.words
        assert {NASTY, "FID"} <= {chart["title"] for chart in got.charts}


def test_many_grids_are_chosen_evenly(tmp_path: Path) -> None:
    many = folder(tmp_path / "many", [LINE])
    (many / "generated_images").mkdir()
    for epoch in range(1, 101):
        Image.new("L", (8, 8)).save(many / "generated_images" / f"epoch_{epoch}.png")
    (many / "generated_images" / "epoch_50.png").write_bytes(b"no picture")
    (many / "generated_images" / "epoch_old.png").write_bytes(b"no picture")
    got = Page(report.write(many)).pictures
    epochs = [int(alt.split()[-1]) for alt in got]
    assert epochs[0] == 1 and epochs[-1] == 100 and report.GRIDS - 1 <= len(epochs) <= report.GRIDS
    assert all(3 <= b - a <= 10 for a, b in pairwise(epochs))
    assert Page(report.compare([many], tmp_path / "one.html")).pictures == ["Grid of samples of many after epoch 100"]


def test_large_pictures_share_the_bytes_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    large = folder(tmp_path / "large", [LINE])
    (large / "generated_images").mkdir()
    noise = Image.frombytes("RGB", (300, 300), random.Random(0).randbytes(270_000))
    for epoch in range(6):
        noise.save(large / "generated_images" / f"epoch_{epoch}.png")
    monkeypatch.setattr(report, "SHARE", 15_000)
    path = report.write(large)
    assert len(Page(path).pictures) == 6
    assert "data:image/webp" in path.read_text()
    assert path.stat().st_size < 4 / 3 * 6 * 15_000 + 40_000


@given(st.lists(st.one_of(st.none(), st.floats(-1e9, 1e9)), max_size=3 * POINTS))
def test_curves_are_thin_and_keep_what_matters(values: list[float | None]) -> None:
    for join in (highest, lowest, None):
        curve = Curve(join) if join else Curve()
        for i, value in enumerate(values):
            curve.add(i, value)
        got = curve.joined()
        assert len(got) <= POINTS and got == sorted(got, key=lambda p: p[0])
        finite = [v for v in values if v is not None]
        assert curve.last == (finite[-1] if finite else None)
        if join and finite:
            assert curve.best is not None
            assert curve.best[1] == (max if join is highest else min)(finite)
            assert values[int(curve.best[0])] == curve.best[1]
        if not join and finite:
            assert all(min(finite) - 1 <= y <= max(finite) + 1 for _, y in got if y is not None)


def test_a_log_of_100000_lines(tmp_path: Path) -> None:
    keys = ("Loss_D", "Loss_G", "D(x)", "D(G(z))", "lr_g", "lr_d", "images/s", "memory")

    def lines() -> Iterator[str]:
        for i in range(100_000):
            values = ", ".join(f'"{key}": {math.sin(i / 1e4) + 2 + i % 7}' for key in keys)
            yield f'{{"images": {i * 64}, "epoch": {i / 1000}, {values}}}'

    path = report.write(folder(tmp_path / "long", lines()))
    assert path.stat().st_size < 200_000
    got = Page(path).chart("Losses")["series"][0]["points"]
    assert POINTS / 2 <= len(got) <= POINTS
    assert got[-1][0] == 99_999 * 64


@pytest.mark.parametrize("plan", [None, {"images": 64, "updates": 8, "device": "cpu"}])
def test_a_run_that_has_only_begun(plan: dict[str, Any] | None, tmp_path: Path) -> None:
    begun = folder(tmp_path / "begun", plan=plan)
    assert "nothing is reported yet" in Page(report.write(begun)).words
    (begun / "log.jsonl").unlink()
    got = Page(report.write(begun))
    assert "nothing is reported yet" in got.words
    assert not got.pictures and not got.charts
    report.compare([begun], tmp_path / "page.html")


def test_a_run_that_was_broken_off(run: Path, tmp_path: Path) -> None:
    out = shutil.copytree(run, tmp_path / "broken")
    (out / "log.jsonl").write_text(json.dumps(LINE | {"images": 96, "epoch": 1.5}) + '\n{"images": 112, "Loss_D": 0.')
    for late in ("final_generated_images.png", "generated_images/epoch_2.png", "neighbours.png"):
        (out / late).unlink(missing_ok=True)
    got = Page(report.write(out))
    assert "Broken off: the same command goes on 96 of 128 images, epoch 1.5 of 2" in got.words
    assert got.pictures == ["Grid of samples after epoch 1", "Grid of real images"]
    with FileLock(out / ".lock"):
        assert "Training, about 0:00:03 left 96 of 128" in Page(report.write(out)).words


def test_values_that_are_not_finite(tmp_path: Path) -> None:
    lines: list[Any] = [LINE | {"images": 64 * i, "Loss_D": value} for i, value in enumerate([1.0, math.nan, math.inf, 2.0])]
    lines += [
        LINE | {"images": 256, "Loss_D": "high", "Loss_G": None, "memory": None, "D(x)": math.nan},
        "[]",
        '"images"',
        '{"images": "many"}',
        "",
    ]
    lines += [metrics(64, {"fid": math.nan}), metrics(128, {"fid": 3.0}), {"event": "metrics", "images": 64, "values": None}]
    got = Page(report.write(folder(tmp_path / "odd", lines, {"images": 64})))
    assert [y for _, y in got.chart("Losses")["series"][0]["points"]] == [1, None, None, 2, None]
    assert got.chart("What D says of images")["series"][0]["points"] == [[256, None]]
    assert got.chart("FID")["series"][0]["best"] == 1
    assert "Memory" not in [chart["title"] for chart in got.charts]  # null: not measured
    assert "Loss of D2 " in got.words


def test_each_warning_is_told_once(tmp_path: Path) -> None:
    warnings = [{"event": "warning", "images": i, "kind": "collapse", "text": f"Alike {i}."} for i in (64, 128, 192)]
    got = Page(report.write(folder(tmp_path / "warned", [LINE, *warnings])))
    assert got.words.count("Collapse") == 1
    assert "Alike 192.after 64 images, said 3 times" in got.words
    assert "Alike 64" not in got.words


def test_memory_against_plan_and_budget(tmp_path: Path) -> None:
    plan = {"images": 64, "predicted": 3 << 20, "budget": 8 << 20, "budget_named": True}
    ran_out = {"event": "memory ran out", "images": 64, "phase": "G", "change": "micro-batches of 8", "guarantee": "bitwise"}
    lines = [
        LINE | {"memory": 2 << 20},
        {"event": "memory", "images": 64, "measured": 4 << 20, "predicted": 3 << 20},
        ran_out | {"event": "memory suffices again", "images": 32, "change": "whole batch", "guarantee": "reassociation"},
        *[ran_out] * 29,
    ]
    full = plan | {
        "layouts": {"D": {"sizes": [16, 16]}, "G": {"sizes": [32], "newer": 1}},
        "phases": {"D's phase": {"weights": 1 << 20}},
    }
    got = Page(report.write(folder(tmp_path / "full", lines, full)))
    assert got.chart("Memory")["lines"] == {"predicted": 3 << 20, "budget": 8 << 20}
    assert "4.0 MiB of 8.0 MiB budget" in got.words
    assert "micro-batches of 16" in got.words
    assert got.words.count("G's phase, after 64 images: went on with micro-batches of 8 (bitwise).") == 19
    assert "G's phase, after 32 images: memory suffices again, went on with whole batch (reassociation)." in got.words
    assert "And 10 more." in got.words
    unnamed = Page(report.write(folder(tmp_path / "unnamed", lines, plan | {"budget_named": False})))
    assert unnamed.chart("Memory")["lines"] == {"predicted": 3 << 20}


def test_settings_of_a_recipe_of_ones_own(tmp_path: Path) -> None:
    own = folder(tmp_path / "own", lr_d=0.001)
    (own / "recipe.toml").write_text((own / "recipe.toml").read_text().replace('"dcgan"', '"mine"', 1))
    words = Page(report.write(own)).words
    assert "none of the named ones" in words and "--beta2" in words
    words = Page(report.write(folder(tmp_path / "named", lr_d=0.001))).words
    assert "--lr-d" in words and "0.001" in words and "--beta2" not in words


def test_comparing_marks_the_better_run(tmp_path: Path) -> None:
    one = folder(tmp_path / "one", [LINE, metrics(64, {"fid": 8.0, "is": 2.0}), metrics(128, {"fid": 9.0, "is": 3.0})], lr_d=1e-4)
    two = folder(tmp_path / "two", [LINE, metrics(64, {"fid": 9.5, "is": 5.0, "swd": 1.0}), metrics(128, {"fid": 8.5, "is": 4.0})])
    got = Page(report.compare([one, two], tmp_path / "page.html"))
    rows = re.findall(r'<tr><th scope="row">(.*?)</th>(.*?)</tr>', got.source)
    cells = {name: re.findall("<td>(.*?)</td>", row) for name, row in rows}
    assert cells["FID, best"] == ["<strong>8.00 <small>best</small></strong>", "8.50"]
    assert cells["FID, last"] == ["9.00", "8.50"]
    assert cells["Inception Score, best"] == ["3.00", "<strong>5.00 <small>best</small></strong>"]
    assert cells["Sliced Wasserstein distance, best"] == ["-", "1.00"]  # one alone is not the best
    assert cells["--lr-d"] == ["0.0001", "0.0002"]
    assert "--lr-g" not in cells
    assert [series["colour"] for series in got.chart("FID")["series"]] == [0, 1]
    assert [series["colour"] for series in got.chart("Sliced Wasserstein distance")["series"]] == [1]


def test_what_was_measured_otherwise_is_not_compared(tmp_path: Path) -> None:
    one = folder(tmp_path / "a" / "run", [metrics(64, {"fid": 8.0}, "500 samples.")])
    two = folder(tmp_path / "b" / "run", [metrics(64, {"fid": 9.0}, "50,000 samples.")])
    got = Page(report.compare([one, two], tmp_path / "page.html"))
    assert "<strong>" not in got.source
    assert [len(chart["series"]) for chart in got.charts if chart["title"] == "FID"] == [1, 1]
    assert str(one) in got.words and str(two) in got.words  # the same name twice tells nothing


def test_what_cannot_be_reported(tmp_path: Path) -> None:
    def refused(act: Callable[[], object]) -> str:
        with pytest.raises(UserError) as caught:
            act()
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "there is no recipe.toml in it" in refused(lambda: report.write(tmp_path))
    assert "is no run folder" in refused(lambda: report.compare([tmp_path / "none"], tmp_path / "page.html"))
    assert "name one run folder or more" in refused(lambda: report.compare([], tmp_path / "page.html"))
    good = folder(tmp_path / "good")
    assert "cannot write" in refused(lambda: report.compare([good], good / "recipe.toml" / "page.html"))
    (good / "report.html").mkdir()
    assert "cannot write" in refused(lambda: report.write(good))
    (good / "log.jsonl").unlink()
    (good / "log.jsonl").mkdir()
    assert "cannot read" in refused(lambda: report.write(good))
    (good / "recipe.toml").write_text("[training")
    assert "is not valid TOML" in refused(lambda: Story.read(good))


def browsed(path: Path, script: str, tmp_path: Path) -> dict[str, Any]:
    """Opens a copy of the page in Chromium and gives what ``script`` returns; fails if the page complains."""
    assert CHROMIUM
    watch = "<script>window.faults = []; for (const kind of ['error', 'securitypolicyviolation', 'unhandledrejection']) "
    watch += "addEventListener(kind, event => faults.push(kind + ' ' + event.message));</script>"
    end = f"<script>document.body.dataset.told = JSON.stringify({{faults, ...(() => {{ {script} }})()}});</script></body>"
    copy = tmp_path / "copy.html"
    copy.write_text(path.read_text().replace("<title>", watch + "<title>", 1).replace("</body>", end, 1))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
    flags += ["--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr"]
    command = [CHROMIUM, *flags, "--window-size=390,2000", "--virtual-time-budget=2000", "--dump-dom", copy.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert "CONSOLE" not in done.stderr, done.stderr
    copy.write_text(done.stdout)
    body = next(attributes for tag, attributes in Page(copy).tags if tag == "body")
    told: dict[str, Any] = json.loads(body["data-told"] or "")
    assert told["faults"] == []
    return told


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
def test_the_page_in_a_browser(run: Path, tmp_path: Path) -> None:
    told = browsed(
        report.write(run),
        """
        const shown = () => [...document.querySelectorAll('.frames img')].filter(i => i.offsetParent).map(i => i.alt);
        const range = document.querySelector('input[type=range]');
        const before = shown();
        range.value = 0;
        range.dispatchEvent(new Event('input', { bubbles: true }));
        const after = shown();
        document.body.dispatchEvent(new KeyboardEvent('keydown', { key: 'ArrowRight', bubbles: true }));
        const losses = document.querySelectorAll('.chart')[2];
        const plot = losses.querySelector('.plot');
        const end = plot.getAttribute('aria-valuetext');
        plot.dispatchEvent(new KeyboardEvent('keydown', { key: 'Home', bubbles: true }));
        return {
          before, after, then: shown(), label: document.querySelector('output').textContent, end,
          home: plot.getAttribute('aria-valuetext'), dots: losses.querySelectorAll('.cursor circle').length,
          titles: [...document.querySelectorAll('h3')].map(h => h.textContent),
          paths: [...document.querySelectorAll('svg path')].map(p => p.getAttribute('d')),
          overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
        };
        """,
        tmp_path,
    )
    assert told["before"] == ["Grid of samples after epoch 2"]
    assert told["after"] == ["Grid of samples after epoch 1"]
    assert told["then"] == ["Grid of samples after epoch 2"]
    assert told["label"] == "after epoch 2"
    assert told["titles"][:4] == ["Frechet distance (classifier)", "Classes covered", "Losses", "What D says of images"]
    assert told["paths"] and all(re.fullmatch(r"([ML][0-9.]+ [0-9.]+)+", path) for path in told["paths"])
    assert told["end"].startswith("128 images, epoch 2.0: D ")
    assert told["home"].startswith("48 images, epoch 0.8: D ")
    assert told["dots"] == 2
    assert told["overflow"] <= 0


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
def test_odd_pages_in_a_browser(tmp_path: Path) -> None:
    lines = [
        LINE | {"images": 0, "Loss_D": math.nan, "Loss_G": -1e200, "images/s": 5e-324},
        metrics(0, {"fid": math.nan, NASTY: 0.0}),
    ]
    odd = folder(tmp_path / "odd", lines)
    runs = [odd, *(folder(tmp_path / NASTY / str(i), [LINE | {"Loss_D": i}]) for i in range(10)), folder(tmp_path / "begun")]
    for path in (report.write(odd), report.compare(runs, tmp_path / "page.html")):
        told = browsed(path, "return {bad: document.querySelectorAll('.charts')[0].innerHTML};", tmp_path)
        assert "NaN" not in told["bad"] and "Infinity" not in told["bad"] and "undefined" not in told["bad"]
