"""The wheel holds every package, the embedded checkpoint, the gallery and the recipes."""

import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.resources import files
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def pyproject() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def setuptools_table(pyproject) -> dict:
    return pyproject["tool"]["setuptools"]


def test_lower_bounds_are_the_versions_of_constraints_oldest(pyproject):
    project = pyproject["project"]
    needed = map(Requirement, [*project["dependencies"], *project["optional-dependencies"]["train"]])
    lines = (ROOT / "constraints-oldest.txt").read_text().splitlines()
    pins = {pin.name.lower(): pin for pin in map(Requirement, (line for line in lines if not line.startswith("#")))}
    for requirement in needed:
        [bound] = [one.version for one in requirement.specifier if one.operator == ">="]
        assert pins[requirement.name.lower()].specifier.contains(bound), requirement


def test_every_folder_with_an_init_is_a_listed_package(setuptools_table):
    mapped = setuptools_table["package-dir"]
    tops = {folder.split("/")[0] for folder in mapped.values()}
    found = {path.parent.relative_to(ROOT).as_posix() for top in tops for path in (ROOT / top).rglob("__init__.py")}
    assert found == set(mapped.values())
    assert sorted(mapped) == sorted(setuptools_table["packages"])


def test_embedded_checkpoint_and_gallery_are_found_as_resources():
    checkpoint = files("fwd2bot.hub_models") / "fwd2bot-tiny"
    assert (checkpoint / "config.json").is_file()
    assert any(entry.name.endswith(".safetensors") for entry in checkpoint.iterdir())
    gallery = files("fwd2bot.pipelines") / "gallery"
    assert sum(entry.name.endswith(".png") for entry in gallery.iterdir()) >= 50


@pytest.mark.slow
def test_wheel_holds_all_that_the_checkout_holds(setuptools_table, tmp_path):
    source = tmp_path / "source"
    # Built from a copy: setuptools leaves build/ and an egg-info folder where it works.
    leave_out = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "runs", "outputs")
    shutil.copytree(ROOT, source, ignore=leave_out)
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path / "dist", source],
        check=True,
        capture_output=True,
    )
    [wheel] = (tmp_path / "dist").glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = set()
    for package, folder in setuptools_table["package-dir"].items():
        # Path.glob takes a closing ** for folders only, setuptools for everything below.
        data = setuptools_table["package-data"].get(package, [])
        patterns = ["*.py", *(f"{pattern}/*" if pattern.endswith("**") else pattern for pattern in data)]
        for path in (path for pattern in patterns for path in (source / folder).glob(pattern) if path.is_file()):
            expected.add(f"{package.replace('.', '/')}/{path.relative_to(source / folder).as_posix()}")
    assert expected <= names
    top_levels = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert top_levels == {"fwd2bot", "fwd2bot_cli"}
