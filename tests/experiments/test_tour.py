"""The tour runs from its first cell to its last, and shows pictures."""

import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.slow
def test_the_tour_runs(job, monkeypatch):
    import nbclient
    import nbformat

    monkeypatch.setenv("TOUR_RUN", str(job))
    monkeypatch.setenv("PYTHONWARNINGS", "default")  # Jupyter's own are none of ours
    notebook = nbformat.read(ROOT / "docs" / "tour.ipynb", as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs for cell in code)  # none is kept: they are large
    resources = {"metadata": {"path": str(ROOT / "docs")}}
    client = nbclient.NotebookClient(notebook, timeout=600, resources=resources)
    client.execute()
    shown = [o for cell in code for o in cell.outputs if o.output_type == "display_data"]
    assert len(shown) >= 9 and all("image/png" in output.data for output in shown)
