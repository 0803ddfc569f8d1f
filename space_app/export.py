"""Everything that a Space needs, in one folder: `python -m fwd2bot.space_app.export`, or `make space-export`.

python -m venv env && env/bin/pip install -r requirements.txt && env/bin/python app.py
"""

import argparse
import re
import shutil
import sys
import zipfile
from collections.abc import Iterable
from email.parser import Parser
from importlib.metadata import version
from pathlib import Path

from fwd2bot.pipelines.embedded import default_checkpoint

PICTURES = ("search", "ask", "look")  # of each tab, docs/space-search.png and so on
PYTHON = "3.11"
SOURCES = ("app.py", "README.md", "requirements.txt")

APP = '''"""The Space: unpacks the wheel that lies beside this file, and serves the checkpoint that does."""

import os
import sys
import tempfile
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent

if __name__ == "__main__":
    [wheel] = HERE.glob("fwd2bot-*.whl")
    with tempfile.TemporaryDirectory(prefix="fwd2bot-package-") as package:
        zipfile.ZipFile(wheel).extractall(package)
        sys.path.insert(0, package)
        os.environ.setdefault("FWD2BOT_SPACE_MODEL", str(HERE / "checkpoint"))

        from fwd2bot.space_app.options import SpaceOptions
        from fwd2bot.space_app.serving import serve

        serve(SpaceOptions())
'''

README = """---
title: Fwd2Bot
emoji: 🗜️
colorFrom: indigo
colorTo: yellow
sdk: gradio
sdk_version: {gradio}
python_version: "{python}"
app_file: app.py
license: apache-2.0
short_description: Compress a picture once, then find it and ask about it
pinned: false
---

# Fwd2Bot

Compress a picture once into a few summary tokens; from then on find it and talk about it from these alone. Upload
pictures of your own, or use those that are here. Nothing of a visitor is kept after the visit.

{pictures}
Run it yourself, on a CPU and offline once the requirements are installed:

```bash
pip install -r requirements.txt
python app.py
```

It serves the checkpoint in `checkpoint/`. The variables FWD2BOT_SPACE_MODEL (a folder or an id on the Hub),
FWD2BOT_SPACE_REVISION, FWD2BOT_SPACE_STORE (a store made by `fwd2bot index`; needs `pip install lancedb`),
FWD2BOT_SPACE_DEVICE and FWD2BOT_SPACE_DTYPE choose another one. Code that lies in a checkpoint runs only with
FWD2BOT_SPACE_TRUST_REMOTE_CODE=1.
"""


def export(to: Path, wheel: Path, checkpoint: Path | None = None, pictures: Path | None = None) -> list[str]:
    """Write the folder of a Space, in place of one that this function has written before.

    Args:
        to: the folder. wheel: of this package. checkpoint: Default: that inside the package.
        pictures: a folder with `space-search.png` and so on, one for each tab.

    Returns:
        The files written, relative to `to`.

    Raises:
        FileNotFoundError: for a wheel, a checkpoint or a picture that is not there.
        FileExistsError: for a folder that holds something else.
    """
    checkpoint = default_checkpoint() if checkpoint is None else checkpoint
    shown = {} if pictures is None else {name: pictures / f"space-{name}.png" for name in PICTURES}
    for path in (wheel, checkpoint / "config.json", *shown.values()):
        if not path.is_file():
            raise FileNotFoundError(f"{path} is not there. Say where it is with --wheel, --checkpoint or --pictures.")
    if to.exists():
        if not all((to / name).is_file() for name in SOURCES):
            raise FileExistsError(f"{to} is there and is no Space that was exported before. Choose another folder.")
        shutil.rmtree(to)
    to.mkdir(parents=True)
    (to / "app.py").write_text(APP, encoding="utf-8")
    (to / "requirements.txt").write_text("\n".join(requirements(wheel)) + "\n", encoding="utf-8")
    lines = [f"![The tab {name}](pictures/space-{name}.png)\n" for name in shown]
    readme = README.format(gradio=version("gradio"), python=PYTHON, pictures="\n".join([*lines, ""] if lines else []))
    (to / "README.md").write_text(readme, encoding="utf-8")
    shutil.copyfile(wheel, to / wheel.name)
    shutil.copytree(checkpoint, to / "checkpoint", ignore=shutil.ignore_patterns("__pycache__", ".*"))
    for path in shown.values():
        (to / "pictures").mkdir(exist_ok=True)
        shutil.copyfile(path, to / "pictures" / path.name)
    return sorted(path.relative_to(to).as_posix() for path in to.rglob("*") if path.is_file())


def requirements(wheel: Path) -> list[str]:
    """What the wheel needs to serve a Space, each with the range that it names itself.

    Raises:
        ValueError: for a file that is no wheel of this package.
    """
    with zipfile.ZipFile(wheel) as archive:
        [name] = [name for name in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", name)]
        metadata = Parser().parsestr(archive.read(name).decode())
    if metadata["Name"] != "fwd2bot":
        raise ValueError(f"{wheel.name} is a wheel of {metadata['Name']!r}, not of fwd2bot.")
    return sorted(_of_the_space(metadata.get_all("Requires-Dist", [])), key=str.lower)


def _of_the_space(lines: Iterable[str]) -> list[str]:
    """The requirements without extra, and those of the extra `space`."""
    found = []
    for line in lines:
        requirement, _, condition = (part.strip() for part in line.partition(";"))
        if not condition or condition.replace("'", '"') == 'extra == "space"':
            found.append(requirement)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--to", type=Path, required=True, help="the folder to write")
    parser.add_argument("--wheel", type=Path, required=True, help="the wheel of this package (make wheel)")
    parser.add_argument("--checkpoint", type=Path, help="another checkpoint (default: the one in the package)")
    parser.add_argument("--pictures", type=Path, help="folder with space-search.png and so on")
    arguments = parser.parse_args()
    try:
        files = export(arguments.to, arguments.wheel, arguments.checkpoint, arguments.pictures)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(f"{len(files)} files in {arguments.to}. Run it: pip install -r requirements.txt && python app.py")


if __name__ == "__main__":
    main()
