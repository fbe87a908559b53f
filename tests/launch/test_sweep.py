"""A sweep expands to runs, launches them, and goes on with those that are not finished."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from diffusion.data import prepare
from launch import space, sweep, trials

ROOT = pathlib.Path(__file__).parents[2]

SWEPT = """
from configs import digits_classifier

def get_config(arg=None):
    config = digits_classifier.get_config("smoke")
    config.model.classifier.widths = (4, 4, 4)
    config.train.steps = 2
    config.evaluation.every_steps = 2
    config.data.dir = "{data}"
    return config

def sweep(add):
    {body}
"""
THREE = 'add(add.chain(add.values("seed", 0, 1), add.values("optim.name", "lion")))'


@pytest.fixture
def swept(tmp_path):
    def make(body, data="runs/data"):
        path = tmp_path / "swept.py"
        path.write_text(SWEPT.format(body=body, data=data))
        return str(path)

    return make


def launch(capfd, *argv):
    status = sweep.main(argv)
    return status, capfd.readouterr()


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> pathlib.Path:
    root = tmp_path_factory.mktemp("data")
    prepare.prepare("captioned_digits", root)
    return root


WANDB = """#!{python}
# Stands in for wandb: `sweep FILE` makes one, `agent ID` runs its grid as wandb's agent does.
import json, pathlib, subprocess, sys
here = pathlib.Path("{here}")
if sys.argv[1] == "sweep":
    (here / "made.json").write_text(pathlib.Path(sys.argv[2]).read_text())
    print("wandb: Run sweep agent with: wandb agent me/project/abc123", file=sys.stderr)
else:
    assert sys.argv[2] == "me/project/abc123"
    made = json.loads((here / "made.json").read_text())
    for value in made["parameters"]["trial"]["values"]:
        words = [["--trial=" + value] if w == "${{args}}" else [w] for w in made["command"]]
        subprocess.run([word for group in words for word in group])
"""


def test_a_sweep_runs_marks_and_goes_on(swept, data, tmp_path, capfd, monkeypatch):
    """Three runs, of which one is refused: locally, then again, then under wandb's agent."""
    config, folder = swept(THREE, data), tmp_path / "sweep"
    argv = (f"--config={config}", f"--dir={folder}", "--max_parallel=2")
    status, said = launch(capfd, *argv)
    assert status == sweep.FAILED
    assert "name=lion: failed, status 2" in said.out and "1 of 3 trials" in said.out
    assert "lion" in (folder / "logs" / "name=lion.log").read_text()
    for seed in (0, 1):
        written = json.loads((folder / f"seed={seed}" / "config.json").read_text())
        assert written["seed"] == seed

    status, said = launch(capfd, *argv, "--status")
    header, first, _, last = (line.split("  ") for line in said.out.splitlines())
    assert status == 0 and header[0].strip() == "trial"
    cells = [cell.strip() for cell in first if cell.strip()]
    assert cells[:3] == ["seed=0", "finished", "2"]
    assert 0 < float(cells[3]) < 10 and 0 < float(cells[4]) < 10
    assert "failed, status 2" in [cell.strip() for cell in last]

    status, said = launch(capfd, *argv, "--status", "--metric=eval_accuracy", "--highest")
    assert status == 0 and "highest eval_accuracy" in said.out.splitlines()[0]
    logged = [json.loads(x) for x in (folder / "seed=0" / "metrics.jsonl").read_text().splitlines()]
    best = max(row["eval_accuracy"] for row in logged if "eval_accuracy" in row)
    assert said.out.splitlines()[1].split() == [
        "seed=0",
        "finished",
        "2",
        cells[3],
        f"{best:.4g}",
        "2",
    ]
    status, said = launch(capfd, *argv, "--status", "--metric=fid")
    assert status == 2 and "--metric=fid" in said.err and "eval_accuracy" in said.err

    tool = tmp_path / "bin" / "wandb"
    tool.parent.mkdir()
    tool.write_text(WANDB.format(python=sys.executable, here=tmp_path))
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
    before = (folder / "seed=0" / "metrics.jsonl").stat().st_mtime_ns
    status, said = launch(capfd, *argv, "--launcher=wandb", "--max_parallel=1")
    assert status == sweep.FAILED  # the same trial, tried again
    made = json.loads((tmp_path / "made.json").read_text())
    assert made["parameters"] == {"trial": {"values": ["name=lion"]}}  # the others are finished
    assert (folder / "logs" / "name=lion.log").read_text().count("error: ") == 2
    assert (folder / "seed=0" / "metrics.jsonl").stat().st_mtime_ns == before


def test_the_wandb_file_fits_wandbs_schema(swept, tmp_path):
    """The schema is that of wandb's own engine: `pip install --no-deps sweeps jsonschema`."""
    sweeps = pytest.importorskip("importlib.util").find_spec("sweeps")
    if sweeps is None:
        pytest.skip("wandb's schema is not here: pip install --no-deps sweeps")
    jsonschema = pytest.importorskip("jsonschema")
    path = pathlib.Path(sweeps.submodule_search_locations[0]) / "config" / "schema.json"
    schema = json.loads(path.read_text())
    expanded = sweep.expand(swept(THREE), tmp_path / "sweep", [])
    made = sweep.wandb_file(expanded, expanded.trials)
    jsonschema.validate(made, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(made | {"method": "lattice"}, schema)


def test_what_would_run_is_printed_and_nothing_is_written(swept, tmp_path, capfd):
    config, folder = swept(THREE), tmp_path / "sweep"
    base = (f"--config={config}", f"--dir={folder}", "--dry_run", "--config.train.steps=3")
    status, said = launch(capfd, *base)
    lines = said.out.splitlines()
    assert status == 0 and len(lines) == 3
    assert all("experiments.train" in x and "--config.train.steps=3" in x for x in lines)
    assert f"--workdir={folder}/seed=1" in lines[1] and "--config.seed=1" in lines[1]
    status, said = launch(capfd, *base, "--launcher=slurm", "--max_parallel=2", "--", "--nodes=1")
    assert status == 0 and "--array=0,1,2%2" in said.out and "srun" in said.out
    status, said = launch(capfd, *base, "--launcher=wandb")
    assert status == 0 and '"method": "grid"' in said.out
    assert not folder.exists()


@pytest.mark.parametrize(
    ("body", "argv", "words"),
    [
        ('add(add.values("optim.rate", 1))', (), ("optim.rate", "no key")),
        ('add(add.values("optimm.name", "adam"))', (), ("optimm.name", "no key")),
        ('add(add.values("seed.x", 1))', (), ("seed.x", "no key")),
        ('add(add.values("train.steps", "many"))', (), ("train.steps", "many", "type")),
        ('add(add.zip(add.values("seed", 1, 2), add.values("train.steps", 1)))', (), ("2, 1",)),
        ('add(add.values("seed", 1, 1))', (), ("the same", "seed")),
        ("pass", (), ("adds no trial",)),
        (THREE, ("--max_parallel=0",), ("--max_parallel=0",)),
        (THREE, ("--launcher=cron",), ("cron", "slurm")),
        (THREE, ("--config.train.stepz=1",), ("stepz",)),
        (THREE, ("--dance",), ("--dance",)),
        (THREE, ("--metric=loss",), ("--metric", "--status")),
        (THREE, ("--", "--nodes=1"), ("--nodes=1", "slurm")),
    ],
)
def test_a_sweep_refuses(body, argv, words, swept, tmp_path, capfd):
    folder = tmp_path / "sweep"
    status, said = launch(capfd, f"--config={swept(body)}", f"--dir={folder}", *argv)
    assert status == 2
    assert said.err.startswith("error: ") and len(said.err.splitlines()) == 1
    assert all(word in said.err for word in words), said.err
    assert not folder.exists()


def test_a_config_without_a_sweep_or_no_config_is_refused(tmp_path, capfd):
    argv = ("--config=configs/digits_ldm.py", f"--dir={tmp_path}/sweep")
    status, said = launch(capfd, *argv)
    assert status == 2 and "no sweep(add)" in said.err
    status, said = launch(capfd, "--config=configs/none.py", argv[1])
    assert status == 2 and "configs/none.py does not exist" in said.err


def test_slurm_that_is_not_here_is_named(swept, tmp_path, capfd, monkeypatch):
    for name in ("bash", "dirname", "env", "basename"):
        path = subprocess.run(["which", name], capture_output=True, text=True).stdout.strip()
        (tmp_path / name).symlink_to(path)
    monkeypatch.setenv("PATH", str(tmp_path))
    argv = (f"--config={swept(THREE)}", f"--dir={tmp_path}/sweep", "--launcher=slurm")
    status, said = launch(capfd, *argv, "--", "--nodes=1")
    assert status == 2 and "sbatch is not on the PATH" in said.err


def test_every_sweep_of_a_config_expands():
    found = 0
    for path in sorted((ROOT / "configs").glob("*.py")):
        if "def sweep(" in path.read_text():
            changes = sweep.load(str(path), [])
            assert len(space.names(changes)) == len(changes)
            found += 1
    assert found


def test_the_best_of_a_torn_log_and_of_none(swept, tmp_path):
    folder = tmp_path / "sweep"
    made = sweep.expand(swept(THREE), folder, [])
    (folder / "seed=0").mkdir(parents=True)
    rows = [{"step": 1, "loss": 3.0}, {"step": 1, "eval_psnr": 20.0}, {"step": 2, "loss": None}]
    rows += [{"step": 2, "eval_psnr": 30.0}, {"step": 3, "eval_psnr": 25.0}, "no row"]
    torn = b'\xff{"step": 4, "lo'
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (folder / "seed=0" / "metrics.jsonl").write_bytes(text + torn)
    first, second = trials.table(made, "eval_psnr", highest=True).splitlines()[1:3]
    assert first.split() == ["seed=0", "waiting", "3", "3", "30", "2"]
    assert second.split() == ["seed=1", "waiting", "-", "-", "-", "-"]
    assert trials.table(made, "eval_psnr").splitlines()[1].split()[-2:] == ["20", "1"]


def test_a_trial_of_other_arguments_is_run_again(swept, tmp_path):
    folder = tmp_path / "sweep"
    first = sweep.expand(swept(THREE), folder, [])
    trials.mark(folder, first.trials[0].name, 0, first.trials[0].arguments)
    assert [t.name for t in first.unfinished()] == ["seed=1", "name=lion"]
    longer = sweep.expand(swept(THREE), folder, ["--config.train.steps=5"])
    assert len(longer.unfinished()) == 3
