"""The report of runs: what it shows, escapes and refuses, and how a browser sees it."""

import base64
import hashlib
import html
import html.parser
import io
import itertools
import json
import math
import pathlib
import re
import time

import numpy as np
import pytest
from PIL import Image
from plotly.offline import get_plotlyjs

from experiments.host import cli
from experiments.report import __main__ as report
from experiments.report import runs
from experiments.report import tables as report_tables

CONFIG = {
    "task": "denoiser",
    "seed": 0,
    "optim": {"learning_rate": 1e-3, "name": "adam"},
    "train": {"steps": 40, "batch_size": 8},
}


class Page(html.parser.HTMLParser):
    """A document as its elements, tables and text."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.scripts, self.styles = [], [], []
        self.tables, self.text = {}, []
        self._within, self._row = [], None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self._within.append(tag)
        if tag == "table":
            self._rows, self._caption = [], ""
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th"):
            self._rows[-1].append("")
        elif tag in ("script", "style"):
            getattr(self, f"{tag}s").append("")

    def handle_endtag(self, tag):
        if tag == "table":
            self.tables[self._caption] = self._rows
        while self._within and self._within.pop() != tag:
            pass

    def handle_data(self, data):
        if "script" in self._within:
            self.scripts[-1] += data
        elif "style" in self._within:
            self.styles[-1] += data
        else:
            self.text.append(data)
        if "caption" in self._within:
            self._caption += data
        elif {"td", "th"} & set(self._within):
            self._rows[-1][-1] += data

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def data(self):
        return json.loads(self.scripts[0])


def rows_of(steps=40, every=10, scale=1.0):
    rows = [
        {"step": s, "loss": scale / s, "skipped_steps": 0.0, "examples_per_sec": 16.0}
        for s in range(every, steps + 1, every)
    ]
    return [*rows, *({"step": s, "eval_loss": 2 * scale / s} for s in (steps // 2, steps))]


def make_run(folder, rows=None, **config):
    """A workdir as a run leaves it; keys of `config` replace CONFIG's, dots as __."""
    whole = json.loads(json.dumps(CONFIG))
    for key, value in config.items():
        section, _, leaf = key.rpartition("__")
        (whole[section] if section else whole)[leaf] = value
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(whole))
    lines = "".join(json.dumps(row) + "\n" for row in (rows_of() if rows is None else rows))
    (folder / "metrics.jsonl").write_text(lines)
    return folder


def picture(path, size=(20, 10), noise=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    if noise:
        pixels = np.random.default_rng(0).integers(0, 256, pixels.shape, np.uint8)
    Image.fromarray(pixels).save(path)


def make_sweep(folder):
    """Four trials: two finished, one failed before it began, one waiting."""
    for rate, scale in ((0.1, 3.0), (0.01, 1.0)):
        make_run(folder / f"lr={rate}", rows_of(scale=scale), optim__learning_rate=rate)
    statuses = {"lr=0.1": 0, "lr=0.01": 0, "lr=bad": 2, "lr=later": "waiting"}
    (folder / "state").mkdir()
    (folder / "logs").mkdir()
    for name, status in statuses.items():
        state = {"status": status, "arguments": []}
        (folder / "state" / f"{name}.json").write_text(json.dumps(state))
    (folder / "logs" / "lr=bad.log").write_text("begins\nerror: optim.name=<lion>: no\n\n")
    return folder


def written(folders, tmp_path, **options):
    out = tmp_path / "out.html"
    report.report([*folders], out, **options)
    return Page(out.read_text())


def command(capsys, *argv):
    status = cli.run(report.define, report.main, argv, takes_words=True)
    return status, capsys.readouterr()


# -- what it holds ---------------------------------------------------------------------------------


def test_a_run_is_shown_whole(tmp_path, capsys):
    run = make_run(tmp_path / "run")
    (run / "devices.json").write_text('{"processes": 2, "devices": 4, "device": "H100"}')
    for step in (200, 1000, 30):
        picture(run / "previews" / f"samples-{step:08d}.png")
    picture(run / "denoising.png")
    picture(run / "loss.png")
    status, said = command(capsys, str(run), f"--out={tmp_path}/out.html")
    assert status == 0 and "out.html" in said.out
    page = Page((tmp_path / "out.html").read_text())
    assert page.data["runs"] == ["run"]
    assert list(page.data["charts"]) == ["loss", "eval_loss"]
    assert page.data["charts"]["loss"][0]["points"][0] == [10, 0.1]
    assert page.tables["loss: each run's last value up to the step"][2] == ["20", "0.05"]
    constant = "Logged with one value only: examples_per_sec = 16, skipped_steps = 0."
    assert constant in page.text
    captions = [image["alt"] for image in page.all("img")]
    assert captions == [
        "denoising, of run",
        *(f"samples, step {step}, of run" for step in ("30", "200", "1,000")),
    ]
    assert page.tables["How far each run is"][1] == ["run", "finished", "40", "0.025"]
    cost = dict(zip(*page.tables["Cost of training"]))
    assert cost == {
        "run": "run",
        "steps": "40",
        "examples": "320",
        "training": "20 s",  # 320 examples at 16 a second
        "examples/s": "16",
        "device": "4 × H100",
        "processes": "2",
    }
    assert ["optim.learning_rate", "0.001"] in page.tables["Config of run"]


def test_the_page_has_landmarks_headings_in_order_and_needs_no_network(tmp_path):
    page = written([make_sweep(tmp_path / "sweep")], tmp_path)
    names = [name for name, _ in page.elements]
    for landmark in ("header", "nav", "main", "footer"):
        assert names.count(landmark) == 1
    levels = [int(name[1]) for name in names if re.fullmatch(r"h\d", name)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    ids = {attributes["id"] for _, attributes in page.elements if "id" in attributes}
    assert all(link["href"][1:] in ids for link in page.all("a"))
    assert page.all("html")[0]["lang"] == "en"
    assert all(image["src"].startswith("data:image/") for image in page.all("img"))
    assert not page.all("link") and not any("src" in script for script in page.all("script"))
    (policy,) = (m["content"] for m in page.all("meta") if "Policy" in m.get("http-equiv", ""))
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    own = {"script-src": page.scripts[1:], "style-src": page.styles}
    for kind, texts in own.items():
        digests = [base64.b64encode(hashlib.sha256(t.encode()).digest()).decode() for t in texts]
        assert rules.pop(kind).split() == [f"'sha256-{digest}'" for digest in digests]
    assert len(page.scripts) == 3 and len(page.styles) == 1
    assert rules.pop("img-src") == "data:" and set(rules.values()) == {"'none'"}
    assert {"default-src", "base-uri", "form-action"} == set(rules)
    for name, attributes in page.elements:
        assert "style" not in attributes and not any(a.startswith("on") for a in attributes), name


def test_what_files_say_is_text(tmp_path):
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"
    run = make_run(tmp_path / "<b>bold", [{"step": s, evil: s} for s in (1, 2)], task=evil)
    (run / "evaluation.json").write_text(json.dumps({"device": evil, evil: 1.5}))
    other = make_run(tmp_path / "{{data}}", optim__name=evil)
    seconds = {"train": 61.2, "none": math.nan, "flag": True, evil: 3}
    (other / "results.json").write_text(json.dumps({"device": "", "seconds": seconds}))
    picture(run / 'x" onerror="alert(3).png')
    page = written([run, other], tmp_path)
    assert len(page.scripts) == 3 and not page.all("b")
    assert not any("onerror" in attributes for _, attributes in page.elements)
    assert list(page.data["charts"])[-1] == evil
    differing = next(rows for name, rows in page.tables.items() if "differ" in name)
    assert differing[0] == ["key", "<b>bold", "{{data}}"]
    assert ["optim.name", "adam", evil] in differing and ["task", evil, "denoiser"] in differing
    numbers = next(rows for name, rows in page.tables.items() if name.startswith("Evaluations"))
    assert [evil, "1.5", "–"] in numbers and ["device", evil, ""] in numbers
    stages = page.tables["Time of {{data}} by stage"]
    assert stages == [["stage", "time"], ["train", "1 min 01 s"], [evil, "3 s"]]


def test_only_what_differs_is_listed(tmp_path):
    make_run(tmp_path / "set" / "a", optim__learning_rate=0.123456)
    make_run(tmp_path / "set" / "b", optim__momentum=0.9)
    make_run(tmp_path / "set" / "c")
    page = written([tmp_path / "set"], tmp_path)
    assert page.tables["2 keys in which the 3 runs differ"] == [
        ["run", "optim.learning_rate", "optim.momentum"],
        ["a", "0.123456", "–"],
        ["b", "0.001", "0.9"],
        ["c", "0.001", "–"],
    ]
    same = written([tmp_path / "set" / "c", make_run(tmp_path / "d")], tmp_path)
    assert "The configs of the 2 runs are the same." in same.text


def test_runs_of_one_name_are_told_apart(tmp_path):
    folders = [make_run(tmp_path / name / "set" / "run") for name in ("a", "b")]
    assert written(folders, tmp_path).data["runs"] == ["a/set/run", "b/set/run"]
    assert written([folders[0], folders[0]], tmp_path).data["runs"] == ["run"]
    for folder in folders:
        (folder.parent / "results.json").write_text('{"fid": 1}')
    page = written([folder.parent for folder in folders], tmp_path)
    assert page.data["runs"] == ["a/set/run", "b/set/run"]
    numbers = next(rows for name, rows in page.tables.items() if name.startswith("Evaluations"))
    assert numbers[0] == ["number", "a/set", "b/set"]


def test_runs_are_sorted_by_their_numbers(tmp_path):
    names = ["lr=1e-05,b=2", "lr=0.0002,b=10", "lr=0.001,b=2", "lr=0.001,b=10", "other"]
    for name in reversed(names):
        make_run(tmp_path / "set" / name)
    assert written([tmp_path / "set"], tmp_path).data["runs"] == names


def test_losses_of_different_tasks_are_drawn_apart(tmp_path):
    make_run(tmp_path / "set" / "a", task="autoencoder")
    make_run(tmp_path / "set" / "b")
    charts = written([tmp_path / "set"], tmp_path).data["charts"]
    assert {title: [line["run"] for line in lines] for title, lines in charts.items()} == {
        "loss (autoencoder)": [0],
        "loss (denoiser)": [1],
        "eval_loss (autoencoder)": [0],
        "eval_loss (denoiser)": [1],
    }


@pytest.mark.parametrize(
    ("found", "rows"),
    [
        ({"fid": 3.25, "fid_interval": [3, 3.5]}, {"fid": "3.25 [3, 3.5]"}),
        (
            {"fid": 3.25, "kid": 1.5, "intervals": {"fid": [3, 3.5]}},
            {"fid": "3.25 [3, 3.5]", "kid": "1.5"},
        ),
        ({"kid": {"value": 0.5, "low": 0.25, "high": 1}}, {"kid": "0.5 [0.25, 1]"}),
        ({"kid": {"value": 0.5, "interval": [0.25, 1]}}, {"kid": "0.5 [0.25, 1]"}),
        (
            {"bits": {"mean": 3.0, "standard_error": 0.5, "intervals": {"mean": [2, 4]}}},
            {"bits": "3 [2, 4]"},
        ),
        (
            {"adherence": {"all": 0.5, "interval": {"all": [0.25, 0.75]}, "count": 8}},
            {"adherence.all": "0.5 [0.25, 0.75]", "adherence.count": "8"},
        ),
        ({"bits": {"mean": 3.0, "standard_error": 0.5}}, {"bits": "3 [2.02, 3.98]"}),
        ({"fid": 3.5, "fid_interval": [math.nan, 1], "versions": {"jax": 1}}, {"fid": "3.5"}),
        ({"psnr": {"value": 20.0}, "flag": True, "text": "x"}, {"psnr": "20"}),
    ],
)
def test_intervals_however_they_are_written(found, rows):
    assert report_tables.estimates(found) == rows


def test_averaged_and_raw_weights_and_trade_offs_have_their_columns(tmp_path):
    run = make_run(tmp_path / "run")
    found = {
        "seed": 3,
        "weights": {"ema": {"fid": 2.0, "fid_interval": [1, 3]}, "raw": {"fid": 4.0}},
        "sweep": [
            {"guidance_scale": 1.0, "steps": 10, "weights": "ema", "fid": 9.5},
            {"guidance_scale": 2.0, "steps": 10, "weights": "ema", "fid": 7.5},
        ],
    }
    (run / "evaluation.json").write_text(json.dumps(found))
    tables = written([run], tmp_path).tables
    numbers = next(rows for name, rows in tables.items() if name.startswith("Evaluations"))
    assert numbers[:2] == [["number", "run (ema)", "run (raw)"], ["fid", "2 [1, 3]", "4"]]
    assert ["seed", "3", "3"] in numbers
    assert tables["run: guidance and steps"] == [
        ["guidance_scale", "steps", "weights", "fid"],
        ["1", "10", "ema", "9.5"],
        ["2", "10", "ema", "7.5"],
    ]


def test_a_sweep_is_ranked_and_its_failures_are_marked(tmp_path):
    sweep = make_sweep(tmp_path / "sweep")
    page = written([sweep], tmp_path)
    table = page.tables["Best first"]
    assert table[0] == ["run", "rank", "lowest eval_loss", "state", "last step", "last loss"]
    assert table[1] == ["lr=0.01", "1", "0.05", "finished", "40", "0.025"]
    assert table[2][:3] == ["lr=0.1", "2", "0.15"]
    assert ["lr=bad", "–", "–", "✗ failed, status 2", "–", "–"] in table
    assert ["lr=later", "–", "–", "waiting", "–", "–"] in table
    text = "".join(page.text)
    assert "4 runs, 1 failed" in text and "the log ends: error: optim.name=<lion>: no" in text
    highest = written([sweep], tmp_path, metric="loss", highest=True).tables["Best first"]
    assert [row[:3] for row in highest[:2]] == [
        ["run", "rank", "highest loss"],
        ["lr=0.1", "1", "0.3"],
    ]


# -- what is torn, missing, long or large ----------------------------------------------------------


def test_torn_files_become_notes(tmp_path):
    run = make_run(tmp_path / "run")
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(
            b'{"step": 50, "loss": null}\n[1]\n"text"\n{"loss": 1}\n{"step": "x"}\n\xff\n{"st'
        )
    (run / "evaluation.json").write_text('{"fid": 3')
    (run / "samples.png").write_bytes(b"\x89PNG\r\n\x1a\n torn")
    make_run(tmp_path / "empty", [])
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text("[]")
    text = "".join(written([run, tmp_path / "empty", tmp_path / "bare"], tmp_path).text)
    for note in (
        "6 torn lines of metrics.jsonl were left out",
        "1 values of loss were not finite",
        "evaluation.json cannot be read",
        "the picture samples.png cannot be read",
        "empty: no metrics logged yet",
        "bare: config.json cannot be read",
    ):
        assert note in text, note


def test_a_hundred_thousand_lines_take_seconds_and_keep_their_spike(tmp_path):
    rows = [{"step": s, "loss": 1 + 1e-6 * s, "grad_norm": 1.0 / s} for s in range(1, 100_001)]
    rows[54_321]["loss"] = 900.0
    run = make_run(tmp_path / "run", rows)
    started = time.process_time()
    page = written([run], tmp_path)
    assert time.process_time() - started < 10
    points = page.data["charts"]["loss"][0]["points"]
    assert len(points) == runs.POINTS and points[-1][0] == 100_000
    assert max(high for *_, high in points) == 900 and max(low for _, _, low, _ in points) < 2
    assert (tmp_path / "out.html").stat().st_size - len(get_plotlyjs()) < 200_000
    np.testing.assert_allclose(np.mean([p[1] for p in points]), 1.05 + 0.00899, rtol=1e-4)


def test_pictures_are_bounded(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run")
    picture(run / "grid.png", (900, 900), noise=True)
    for step in range(40):
        picture(run / "previews" / f"samples-{step:08d}.png")
    images = written([run], tmp_path).all("img")
    assert len(images) == 1 + runs.PREVIEWS
    assert images[1]["alt"].startswith("samples, step 0,")
    assert images[-1]["alt"].startswith("samples, step 39,")
    data = base64.b64decode(images[0]["src"].removeprefix("data:image/jpeg;base64,"))
    assert len(data) <= runs.PICTURE_BYTES
    with Image.open(io.BytesIO(data)) as small:
        assert small.size == (int(images[0]["width"]), int(images[0]["height"]))
    monkeypatch.setattr(runs, "ALL_PICTURE_BYTES", 600)
    page = written([run], tmp_path)
    assert "pictures were left out" in "".join(page.text) and 0 < len(page.all("img")) < 12


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ((), ("no folder",)),
        (("{root}/none",), ("none does not exist",)),
        (("{root}/run", "{root}/none"), ("none does not exist",)),
        (("{root}/run/config.json",), ("config.json is a file",)),
        (("{root}/thesis",), ("thesis holds no run",)),
        (("{root}/run", "--metric=fid"), ("--metric=fid", "eval_loss")),
        (("{root}/run", "--out={root}/no/report.html"), ("--out=", "no/report.html")),
        (("{root}/run", "--out={root}/run"), ("--out=", "must be a file")),
        (("{root}/run", "--colour"), ("colour",)),
    ],
)
def test_the_command_refuses(argv, words, tmp_path, capsys):
    make_run(tmp_path / "run")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "a.tex").write_text("x")
    argv = [word.format(root=tmp_path) for word in argv]
    if not any(word.startswith("--out") for word in argv):
        argv.append(f"--out={tmp_path}/out.html")
    before = sorted(tmp_path.rglob("*"))
    status, said = command(capsys, *argv)
    assert status == 2 and said.err.startswith("error: ") and len(said.err.splitlines()) == 1
    assert all(word in said.err for word in words), said.err
    assert sorted(tmp_path.rglob("*")) == before


def test_the_default_job_ends_with_a_report(job):
    page = Page((job / "report.html").read_text())
    assert page.data["runs"] == ["autoencoder", "classifier", "ldm"]
    name = job.name
    shown = {image["alt"] for image in page.all("img")}
    assert {f"denoising, of {name}", f"samples, of {name}"} <= shown
    assert page.tables[f"Time of {name} by stage"][-1][0] == "total"
    cost = page.tables["Cost of training"]
    assert [row[-1] for row in cost] == ["processes", "1", "1", "1"]


# -- in a browser ----------------------------------------------------------------------------------

LOOK = pathlib.Path(__file__).with_name("report_look.html")  # uses it, and writes what it saw


MARKED = "<b>a&lt;"  # the name of a run: Plotly would read it as marked text


@pytest.fixture(scope="module")
def rich(tmp_path_factory):
    """A report with all there is to see: a sweep with failures, pictures, wide tables."""
    root = tmp_path_factory.mktemp("rich")
    sweep = make_sweep(root / ("a_sweep_with_quite_a_long_name_" * 2))
    (sweep / "lr=0.01").rename(sweep / MARKED)
    (sweep / "state" / "lr=0.01.json").rename(sweep / "state" / f"{MARKED}.json")
    run = sweep / "lr=0.1"
    picture(run / "denoising.png", (1400, 200), noise=True)
    picture(run / "previews" / "samples-00000040.png")
    long = {"adherence_of_a_long_name": {"value": 0.5, "low": 0.4, "high": 0.6}}
    (run / "evaluation.json").write_text(json.dumps({**long, "checkpoint": "0123456789abcdef" * 6}))
    report.report([sweep], root / "report.html")
    return root / "report.html"


@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize(("scheme", "ground"), [(1, "rgb(255, 255, 255)"), (0, "rgb(20, 23, 28)")])
def test_a_browser_draws_it_and_it_answers(rich, tmp_path, browser, width, scheme, ground):
    look = tmp_path / "look.html"
    text = LOOK.read_text().replace("{{width}}", str(width))
    look.write_text(text.replace("{{report}}", html.escape(rich.read_text())))
    dumped = browser(
        "--window-size=1300,1500",
        f"--blink-settings=preferredColorScheme={scheme}",
        "--dump-dom",
        f"file://{look}",
    )
    seen = json.loads(html.unescape(re.search(r'<pre id="seen">(.*?)</pre>', dumped, re.S)[1]))
    assert "error" not in seen, seen
    assert seen["charts"] == seen["figures"] == 2
    assert seen["lines"] == [2, 1, False, 2, True]
    assert seen["axis_changed"] and seen["smoothed"] == 4
    assert seen["spoken"] == f"step 20: {MARKED} 0.05, lr=0.1 0.15"
    assert seen["tip"] == ["step 20", f"{MARKED} : 0.05", "lr=0.1 : 0.15"]
    assert seen["tip_after_escape"] == []
    assert seen["width"] == width and seen["overflow"] <= 0
    assert seen["ground"] == ground
    assert seen["contrast"][0] >= 4.5, seen["contrast"]


def test_a_browser_photographs_it_from_a_file(rich, tmp_path, browser):
    path = tmp_path / "seen.png"
    browser("--window-size=1280,1600", f"--screenshot={path}", f"file://{rich}")
    with Image.open(path) as photograph:
        assert photograph.size == (1280, 1600)
        assert len(photograph.convert("RGB").getcolors(1 << 24)) > 100
