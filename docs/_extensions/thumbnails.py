"""Runs the examples in their small form and keeps a small copy of the first figure of each.

    python docs/_extensions/thumbnails.py [NAME ...]

writes ``docs/_static/gallery/NAME.png``, at most 40 kB each, NAME being ``hessian_spectrum`` or
``papers/slq``. Without names all examples that draw are run, which takes minutes. One that ends
with an error keeps its old picture.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

DOCS = Path(__file__).resolve().parents[1]
ROOT = DOCS.parent
EXAMPLES = ROOT / "examples"
FOLDER = DOCS / "_static" / "gallery"
WIDTH, MOST_BYTES = 480, 40_000


def source(script: Path) -> str:
    """Return the text of a script with that of the modules beside it that it imports."""
    text = script.read_text(encoding="utf-8")
    beside = [script.with_name(f"{name}.py") for name in re.findall(r"(?m)^import (\w+)$", text)]
    modules = [path.read_text(encoding="utf-8") for path in beside if path.exists()]
    return "\n".join([text, *(module for module in modules if "__main__" not in module)])


def figure_option(script: Path, folder: Path) -> list[str]:
    """Return the option that says where an example's figures go; none for one without figures."""
    text = source(script)
    if 'add_argument("--output"' in text:
        return ["--output", str(folder / f"{script.stem}.png")]
    return ["--out", str(folder)] if "report.figure(" in text else []


def shrink(source: Path, target: Path) -> int:
    """Write a small copy with few colors, fewer where the file would be too large; its bytes."""
    with Image.open(source) as image:
        flat = Image.new("RGB", image.size, "white")
        flat.paste(image, mask=image.getchannel("A") if "A" in image.getbands() else None)
    height = round(WIDTH * flat.height / flat.width)
    small = flat.resize((WIDTH, height), Image.Resampling.LANCZOS)
    for colors in (256, 64, 16):
        small.quantize(colors).save(target, optimize=True)
        if target.stat().st_size <= MOST_BYTES:
            break
    return target.stat().st_size


def environment() -> dict[str, str]:
    """Return the environment in which an example finds the packages of this checkout."""
    paths = os.pathsep.join((str(ROOT), str(ROOT / "adapters")))
    return os.environ | {"MPLBACKEND": "Agg", "PYTHONPATH": paths}


def make(script: Path) -> str:
    """Run one example and return what became of its picture, for the terminal."""
    with tempfile.TemporaryDirectory() as folder:
        figure = Path(folder) / f"{script.stem}.png"
        option = figure_option(script, Path(folder))
        if not option:
            return "draws nothing"
        command = [sys.executable, str(script), "--quick", *option]
        done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True)
        figures = sorted(Path(folder).glob("*.png"))
        if done.returncode or not figures:
            return f"exit status {done.returncode}: {done.stderr.decode()[-500:]}"
        first = figure if figure in figures else figures[0]
        return f"{shrink(first, FOLDER / first.with_stem(script.stem).name)} bytes"


def main(names: list[str]) -> None:
    """Make the pictures of the examples called `names`, or of all that draw."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    scripts = [EXAMPLES / f"{name}.py" for name in names] or sorted(EXAMPLES.rglob("*.py"))
    for script in scripts:
        print(f"{script.stem}: {make(script)}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
