"""Files of the demo as a Space of the Hub."""

import shutil
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement

PACKAGE = Path(__file__).parents[1]
README = """---
title: TokenMixup
emoji: 🧩
colorFrom: indigo
colorTo: blue
sdk: gradio
sdk_version: {gradio}
app_file: app.py
pinned: false
license: apache-2.0
short_description: Saliency mixup inside vision transformers
---

# TokenMixup

A demo of [TokenMixup](https://arxiv.org/abs/2210.07562): what horizontal and vertical mixing of tokens do with images.
"""
APP = '''"""TokenMixup as a Space."""

from hf_tokenmixup.cli.demo import create_app
from hf_tokenmixup.demo.app import launch_options

demo = create_app({model!r})

if __name__ == "__main__":
    demo.launch(**launch_options())
'''


def write_space(folder: Path, model: str = "") -> Path:
    """Write the files of a Space: the app, its requirements, a README with the Space's header, and this package.

    Args:
        folder: Folder that does not exist or is empty.
        model: Name of a model on the Hub; empty: the small classifier of digits.

    Returns:
        The folder.

    Raises:
        ValueError: The folder is not empty or cannot be written, or the package or gradio is not installed.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(
            f"A Space is written to a new folder, but {folder} exists and is not empty. Name another one."
        )
    try:
        requirements = [line for line in requires("hf_tokenmixup") or [] if Requirement(line).marker is None]
        header = README.format(gradio=version("gradio"))
    except PackageNotFoundError as error:
        raise ValueError(f'{error.name} is not installed. Run pip install -e ".[demo]".') from error
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copytree(PACKAGE, folder / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
        (folder / "README.md").write_text(header, encoding="utf-8")
        (folder / "requirements.txt").write_text("\n".join(requirements) + "\n", encoding="utf-8")
        (folder / "app.py").write_text(APP.format(model=model), encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{folder} cannot be written: {error.strerror or error}. Name another folder.") from error
    return folder
