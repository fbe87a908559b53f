"""The configs of the papers have the authors' numbers, and the page of them says what they are."""

import importlib
import json
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PAGE = ROOT / "experiments/results/fidelity"
ROWS = json.loads((PAGE / "authors.json").read_text())
PAPERS = ("ddpm_celebahq256", "ddpm_cifar10", "ddpm_lsun256", "iddpm_cifar10", "edm_cifar10")
PAPERS += (
    "iddpm_imagenet64",
    "adm_imagenet",
    "adm_classifier",
    "flow_cifar10",
    "autoencoder_kl",
    "autoencoder_vq",
)


def of(row):
    """Our values of a row's settings."""
    name, _, argument = row["config"].partition(":")
    config = importlib.import_module(f"configs.{name}").get_config(argument or None)
    found = {}
    for key in row["settings"]:
        value = config
        for part in key.split("."):
            value = value[part]
        found[key] = list(value) if isinstance(value, tuple) else value
    return found


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["config"])
def test_a_config_has_the_authors_numbers(row):
    ours = of(row)
    for key, said in row["settings"].items():
        wanted = said["theirs"]
        wanted = pytest.approx(wanted, rel=1e-9) if isinstance(wanted, float) else wanted
        assert ours[key] == wanted, key


def test_every_config_of_a_paper_has_a_row():
    wanted = {p.stem for p in (ROOT / "configs").glob("ldm_*.py")} | {*PAPERS}
    assert wanted <= {row["config"].partition(":")[0] for row in ROWS}


def line(row):
    """A row of the page's table, as the authors' numbers make it."""
    said = ", ".join(
        f"{key} {json.dumps(setting['theirs'])} ({setting['line']})"
        for key, setting in row["settings"].items()
    )
    differences = "; ".join(row["differences"]) or "none known"
    return f"| {row['config']} | {row['source']} | {said} | {differences} |"


def test_the_page_has_a_row_of_each_and_no_other():
    page = (PAGE / "README.md").read_text().splitlines()
    table = [found for found in page if found.startswith("| ") and "config" not in found[:9]]
    assert table == [line(row) for row in ROWS]
