"""The notebook runs from top to bottom, where there is what runs notebooks: ``make test-xla``."""

from pathlib import Path

import pytest

nbclient = pytest.importorskip("nbclient", reason="needs nbclient and ipykernel: make test-xla")

NOTEBOOK = Path(__file__).parents[1] / "docs" / "frugan.ipynb"


def test_the_notebook_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nbformat

    for name, value in {"DATA": "digits", "MINUTES": "0.5", "RUN": str(tmp_path / "run")}.items():
        monkeypatch.setenv(f"FRUGAN_{name}", value)
    notebook = nbformat.read(NOTEBOOK, 4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") for cell in notebook.cells), "it is committed without outputs"
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()
    found = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    pictures = sum("image/png" in output.get("data", {}) for output in found)
    assert pictures >= 3, "samples as they come, and at the end with the curves"
    assert (tmp_path / "run" / "generator.safetensors").exists()
    assert "torch.Size([16, 1, 16, 16])" in notebook.cells[-1]["outputs"][0]["data"]["text/plain"]
