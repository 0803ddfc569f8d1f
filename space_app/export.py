"""Everything that a Space needs, in one folder: `python -m fwd2bot.space_app.export`, or `make space-export`.

python -m venv env && env/bin/pip install -r requirements.txt && env/bin/python app.py
"""

import argparse
import json
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
MARKER = ".fwd2bot-space.json"  # in an exported folder: the files that were written

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
    """Write the folder of a Space, in place of what this function has written there before.

    Only files that it wrote are replaced or deleted; `.git` and what else was added since stay.

    Args:
        to: the folder. wheel: of this package. checkpoint: Default: that inside the package.
        pictures: a folder with `space-search.png` and so on, one for each tab.

    Returns:
        The files written, relative to `to`.

    Raises:
        FileNotFoundError: for a wheel, a checkpoint or a picture that is not there.
        FileExistsError: for a folder that holds something else, before anything is changed.
    """
    checkpoint = default_checkpoint() if checkpoint is None else checkpoint
    shown = {} if pictures is None else {name: pictures / f"space-{name}.png" for name in PICTURES}
    for path in (wheel, checkpoint / "config.json", *shown.values()):
        if not path.is_file():
            raise FileNotFoundError(f"{path} is not there. Say where it is with --wheel, --checkpoint or --pictures.")
    lines = [f"![The tab {name}](pictures/space-{name}.png)\n" for name in shown]
    readme = README.format(gradio=version("gradio"), python=PYTHON, pictures="\n".join([*lines, ""] if lines else []))
    contents: dict[str, str | Path] = {
        "app.py": APP,
        "requirements.txt": "\n".join(requirements(wheel)) + "\n",
        "README.md": readme,
        wheel.name: wheel,
        **{f"pictures/{path.name}": path for path in shown.values()},
        **{f"checkpoint/{path.relative_to(checkpoint).as_posix()}": path for path in _files(checkpoint)},
    }
    contents[MARKER] = json.dumps({"files": sorted(contents)}, indent=2) + "\n"
    _clear(to, contents)
    for name, content in contents.items():
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, Path):
            shutil.copyfile(content, to / name)
        else:
            (to / name).write_text(content, encoding="utf-8")
    return sorted(contents)


def _files(folder: Path) -> list[Path]:
    """The files of a checkpoint, without hidden ones and what Python has compiled."""
    found = (path for path in folder.rglob("*") if path.is_file())
    return [path for path in found if not any(_left_out(part) for part in path.relative_to(folder).parts)]


def _left_out(part: str) -> bool:
    return part.startswith(".") or part == "__pycache__"


def _clear(to: Path, names: Iterable[str]) -> None:
    """Delete what an earlier export wrote; raise `FileExistsError` where something else lies in the way."""
    if not to.exists():
        return
    written = _written(to)
    if written is None and any(path.name != ".git" for path in to.iterdir()):
        raise FileExistsError(f"{to} is there and is no Space that was exported before. Choose another folder.")
    foreign = [name for name in names if name not in (written or ()) and (to / name).exists()]
    if foreign:
        raise FileExistsError(
            f"{to / foreign[0]} is there and was not exported before. Move it, or choose another folder."
        )
    for name in written or ():
        path = to / name
        path.unlink(missing_ok=True)
        for folder in path.parents:
            if folder == to or not folder.is_dir() or any(folder.iterdir()):
                break
            folder.rmdir()


def _written(to: Path) -> list[str] | None:
    """The files that the marker names, all of them inside the folder and not hidden; None without a marker."""
    try:
        names = json.loads((to / MARKER).read_text(encoding="utf-8"))["files"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FileExistsError(f"{to / MARKER} is damaged. Choose another folder, or delete this one.") from error
    inside = [name for name in names if (to / name).resolve().is_relative_to(to.resolve())]
    return [MARKER, *(name for name in inside if not any(_left_out(part) for part in Path(name).parts))]


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
