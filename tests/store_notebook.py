"""Run the notebook of the documentation in an empty folder, and store it with its outputs.

    python tests/store_notebook.py

What goes to stderr, such as progress bars, is not stored.
"""

import base64
import io
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image

NOTEBOOK = Path(__file__).parents[1] / "docs" / "notebooks" / "finetune.ipynb"
CELL_TIMEOUT_S = 3600
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def execute_notebook(folder: Path, environment: Mapping[str, str]) -> nbformat.NotebookNode:
    """Run all cells of the notebook.

    Args:
        folder: Working directory.
        environment: Environment variables of the kernel.

    Returns:
        The notebook with its outputs.
    """
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    resources = {"metadata": {"path": str(folder)}}
    client = NotebookClient(notebook, timeout=CELL_TIMEOUT_S, kernel_name="python3", resources=resources)
    client.execute(env=dict(environment))
    return notebook


def shrink_figure(png: str) -> str:
    """Reduce a PNG figure in base64 to 256 colors, which makes photographs three times smaller."""
    reduced = io.BytesIO()
    image = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    image.quantize(256, dither=Image.Dither.NONE).save(reduced, "PNG", optimize=True)
    return base64.b64encode(reduced.getvalue()).decode()


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        notebook = execute_notebook(Path(folder), os.environ)
    notebook.metadata = METADATA
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
            for output in cell.outputs:
                if png := output.get("data", {}).get("image/png"):
                    output.data["image/png"] = shrink_figure(png)
    NOTEBOOK.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
