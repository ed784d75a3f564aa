import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SITE = f"lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"


def call(*command, cwd=ROOT):
    done = subprocess.run([str(word) for word in command], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def files(*folders):
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
    return {str(path.relative_to(ROOT)) for path in paths if "__pycache__" not in path.parts}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The sdist, the wheel that is built from it, and the wheel that is built from the checkout."""
    folder = tmp_path_factory.mktemp("built")
    call(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "via-sdist", ROOT)
    call(sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", folder / "direct", ROOT)
    (sdist,) = (folder / "via-sdist").glob("*.tar.gz")
    (via_sdist,) = (folder / "via-sdist").glob("*.whl")
    (direct,) = (folder / "direct").glob("*.whl")
    return {"sdist": sdist, "wheel from sdist": via_sdist, "wheel": direct}


def installation(folder, *what):
    """A fresh environment with the dependencies of this one, but not its reflow_lab: no .pth file leads to another."""
    call(sys.executable, "-m", "venv", "--without-pip", folder)
    (folder / SITE / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    quiet = ("--quiet", "--disable-pip-version-check", "--no-warn-script-location")
    alone = ("--no-deps", "--no-index", "--no-build-isolation", "--ignore-installed")
    call(sys.executable, "-m", "pip", "install", *quiet, *alone, "--prefix", folder, *what)
    return folder


def packed_conf(folder):
    return folder / SITE / "reflow_lab" / "conf"


@pytest.fixture(scope="module", params=["wheel", "wheel from sdist", "editable"])
def installed(request, built, tmp_path_factory):
    """The environment, and the configuration that it has to use."""
    folder = tmp_path_factory.mktemp(request.param.replace(" ", "-"))
    if request.param == "editable":
        return installation(folder, "--editable", ROOT), ROOT / "conf"
    return installation(folder, built[request.param]), packed_conf(folder)


def lab(folder, *words, cwd):
    return call(folder / "bin" / "python", folder / "bin" / "reflow-lab", *words, cwd=cwd)


def test_sdist_holds_everything_needed_to_build_and_test(built):
    with tarfile.open(built["sdist"]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert names >= files("src", "conf", "experiments", "tests") | {"README.md", "LICENSE", "Makefile", "pyproject.toml"}


def test_wheel_holds_code_configuration_and_studies(built):
    code = {name.removeprefix("src/") for name in files("src")}
    moved = {f"reflow_lab/{name}" for name in files("conf", "experiments")}
    names = {kind: set(zipfile.ZipFile(built[kind]).namelist()) for kind in ("wheel", "wheel from sdist")}
    assert names["wheel"] == names["wheel from sdist"]
    assert names["wheel"] >= code | moved
    assert all(name.startswith(("reflow_lab/", "hydra_plugins/", "reflow_lab-")) for name in names["wheel"])
    assert any(name.endswith("LICENSE") for name in names["wheel"])


def test_command_works_from_any_folder(installed, tmp_path):
    folder, _ = installed
    assert "usage: reflow-lab VERB" in lab(folder, "--help", cwd=tmp_path)
    assert "\nseed: 3\n" in "\n" + lab(folder, "train", "seed=3", "--cfg", "job", cwd=tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("start", ["elsewhere", "checkout"])
def test_one_configuration_is_found_and_the_right_one(installed, tmp_path, start):
    folder, conf = installed
    table = lab(folder, "train", "--info", "searchpath", cwd=ROOT if start == "checkout" else tmp_path)
    rows = [line for line in table.splitlines() if line.startswith("| main") or line.startswith("| user")]
    assert len(rows) == 1 and f"file://{conf} " in rows[0]


def test_editable_installation_holds_no_copy(tmp_path):
    folder = installation(tmp_path, "--editable", ROOT)
    assert not packed_conf(folder).parent.exists()
