"""Files of a person's own that are called as our packages are, and must never be taken for them."""

from __future__ import annotations

from pathlib import Path

PACKAGES = ("suite", "serve", "export", "evalsets")


def namesakes(folder: Path) -> Path:
    """The folder, made if need be, with a file for each package that ends whoever imports it."""
    folder.mkdir(exist_ok=True)
    for name in PACKAGES:
        (folder / f"{name}.py").write_text(f"raise SystemExit('{name}.py of the current folder was imported')\n")
    return folder
