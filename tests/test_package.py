"""The package as users get it: what the wheel holds, what importing does, and what a bare import says."""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS: dict[str, str] = PYPROJECT["tool"]["setuptools"]["package-dir"]  # "reattend.ui" -> "ui"
HEAVY = ["torch", "diffusers", "transformers", "accelerate", "peft", "gradio", "pandas", "imageio", "torchmetrics"]


def sources(folder: str) -> set[str]:
    """Paths of the files of a package folder, relative to it, without what Python leaves behind."""
    files = (path.relative_to(ROOT / folder) for path in (ROOT / folder).rglob("*") if path.is_file())
    return {path.as_posix() for path in files if "__pycache__" not in path.parts}


def run_python(code: str, *args: str) -> dict:
    """What a fresh interpreter prints as JSON; -I: no working directory and no PYTHONPATH on its path."""
    done = subprocess.run([sys.executable, "-I", "-c", code, *args], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel, built from a copy of the sources so that the working tree stays clean."""
    tree = tmp_path_factory.mktemp("tree")
    for folder in FOLDERS.values():
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, tree)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", "made", "."]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = (tree / "made").glob("*.whl")
    return zipfile.ZipFile(file)


@pytest.fixture(scope="session")
def metadata(wheel: zipfile.ZipFile) -> Message:
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    return Parser().parsestr(wheel.read(name).decode())


def test_the_wheel_holds_exactly_the_files_of_the_package_folders(wheel):
    want = {f"{name.replace('.', '/')}/{path}" for name, folder in FOLDERS.items() for path in sources(folder)}
    got = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert sorted(got - want) == [], "in the wheel but not in the tree"
    assert sorted(want - got) == [], "in the tree but not in the wheel: see packages and package-data in pyproject.toml"


def test_the_wheel_holds_sprites_weights_and_licences(wheel):
    names = wheel.namelist()
    tiny_sd = "reattend/pipelines/tiny/tiny-sd"
    for name in (f"{tiny_sd}/model_index.json", "reattend/emoji_world/sprites.png", "reattend/emoji_world/OFL.txt"):
        assert name in names
    for part in ("unet", "vae", "text_encoder"):
        assert any(name.startswith(f"{tiny_sd}/{part}/") and name.endswith(".safetensors") for name in names), part
    for licence in ("LICENSE", "NOTICE", "OFL.txt"):
        assert any(".dist-info/licenses/" in name and name.endswith(licence) for name in names), licence


def test_every_package_is_marked_as_typed(wheel):
    for name in FOLDERS:
        assert f"{name.replace('.', '/')}/py.typed" in wheel.namelist()


def test_the_metadata_names_version_licence_and_extras(metadata):
    assert metadata["Version"] == PYPROJECT["project"]["version"]
    assert metadata["License-Expression"] == "Apache-2.0 AND OFL-1.1"
    assert {"ui", "train", "video", "metrics", "xformers", "dev", "all"} <= set(metadata.get_all("Provides-Extra"))


def test_the_constraints_pin_releases_and_no_paths():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert [pin for pin in pins if pin.count("==") != 1 or "/" in pin or "+" in pin] == []
    wanted = {"torch", "diffusers", "transformers", "gradio", "pytest", "ruff", "mypy"}
    assert wanted <= {pin.split("==")[0] for pin in pins}


def test_bare_imports_are_refused_with_a_hint():
    bare = {Path(folder).name: name for name, folder in FOLDERS.items()}
    parents = {str((ROOT / folder).parent) for folder in FOLDERS.values()}
    said = run_python(
        """
import importlib, json, sys
names, parents = json.loads(sys.argv[1])
sys.path[:0] = parents
said = {}
for name in names:
    try:
        importlib.import_module(name)
        said[name] = "imported"
    except ImportError as error:
        said[name] = str(error)
print(json.dumps(said))
""",
        json.dumps([list(bare), sorted(parents)]),
    )
    for name, right in bare.items():
        assert f"import {right} instead" in said[name], said[name]
        assert "pip install -e ." in said[name]


def test_importing_the_packages_loads_no_heavy_module_and_touches_no_network():
    seen = run_python(
        """
import importlib, json, socket, sys

def refuse(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        raise RuntimeError(f"{event} {args}")

sys.addaudithook(refuse)
try:
    socket.getaddrinfo("localhost", 80)
    watched = False
except RuntimeError:
    watched = True

packages, heavy = json.loads(sys.argv[1])
loaded = {}
for name in packages:
    importlib.import_module(name)
    loaded[name] = [module for module in heavy if module in sys.modules]
print(json.dumps({"watched": watched, "loaded": loaded}))
""",
        json.dumps([[*FOLDERS, "reattend.ui.cli"], HEAVY]),
    )
    assert seen["watched"]
    assert seen["loaded"] == {name: [] for name in [*FOLDERS, "reattend.ui.cli"]}


@pytest.mark.parametrize("package", FOLDERS)
def test_every_public_name_can_be_imported(package):
    module = importlib.import_module(package)
    for name in getattr(module, "__all__", []):
        assert getattr(module, name) is not None, name
    assert set(getattr(module, "__all__", [])) <= set(dir(module))
