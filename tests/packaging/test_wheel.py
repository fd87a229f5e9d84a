"""sdist and wheel as a user without the clone gets them (`make wheel`).

Built without torch in sight, as pip's isolated build is; installed into an environment that sees
the installed packages but no clone; tests of layer and kernels run there.
"""

import os
import re
import shutil
import site
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("sn", "enas", "pyproject.toml", "setup.py", "README.md", "LICENSE")
TESTS = ("layer/test_functional.py", "layer/test_modules.py", "kernels/test_kernels.py")
CHOICE = "formula or state or library or layout or offsets or errors or residual"
pytestmark = pytest.mark.slow


def call(*command, cwd, **environment):
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "SN_BACKEND")}
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=clean | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Folder with sdist and wheel, the wheel made from the sdist."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    stub = tmp_path_factory.mktemp("stub")
    (stub / "torch.py").write_text("raise ImportError('none in an isolated build')")
    ignored = shutil.ignore_patterns("__pycache__", "_native.*", "_autograd_*")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, source)
    build = "from setuptools import build_meta; import sys; build_meta.build_sdist(sys.argv[1])"
    call(sys.executable, "-c", build, out, cwd=source, PYTHONPATH=str(stub))
    (sdist,) = out.glob("*.tar.gz")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    isolated = ("--no-build-isolation", "--no-deps", "--no-index")
    call(*pip, "wheel", *isolated, "-w", out, sdist, cwd=out, PYTHONPATH=str(stub))
    return out


@pytest.fixture(scope="module")
def python(built, tmp_path_factory):
    """An interpreter with the wheel and all that is installed, but nothing of the clone."""
    folder = tmp_path_factory.mktemp("venv")
    call(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    own = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    (own / "installed.pth").write_text("\n".join(site.getsitepackages()))  # their .pth stay unread
    (wheel,) = built.glob("*.whl")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    call(*pip, "install", "--no-deps", "--no-index", "--target", own, wheel, cwd=folder)
    return folder / "bin" / "python"


def test_no_folder_is_missing(built):
    """Every module and header of sn; nothing of the experiments that need configs/."""
    (wheel,) = built.glob("*.whl")
    (sdist,) = built.glob("*.tar.gz")
    names = set(zipfile.ZipFile(wheel).namelist())
    ours = {str(p.relative_to(ROOT)) for p in (ROOT / "sn").rglob("*.py")}
    assert ours | {"sn/py.typed"} <= names
    assert not [name for name in names if name.startswith(("enas", "tests", "configs", "scripts"))]
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    sources = [p for p in (ROOT / "sn/kernels").iterdir() if p.suffix in (".c", ".cpp", ".h")]
    kernels = {f"sn/kernels/{path.name}" for path in sources}
    assert ours | kernels | {"LICENSE", "README.md", "setup.py"} <= packed


def test_layer_and_kernels_outside_the_clone(python, tmp_path):
    where = call(python, "-c", "import sn; print(sn.__file__)", cwd=tmp_path).strip()
    assert Path(where).is_relative_to(python.parent.parent)
    if shutil.which("cc"):
        code = "import sn.kernels.native as n; assert n.library(); print(n.library())"
        call(python, "-c", code, cwd=tmp_path)
    absent = "import importlib.util as u; assert not u.find_spec('enas')"
    call(python, "-c", absent, cwd=tmp_path)
    alone = (
        "import sys, sn; bad = {'torchvision', 'hydra', 'timm', 'yaml'} & set(sys.modules); "
        "assert not bad, bad"
    )
    call(python, "-c", alone, cwd=tmp_path)
    for name in ("oracle.py", *TESTS):
        shutil.copy(ROOT / "tests" / name, tmp_path)
    pytest_ = (python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", CHOICE, "-x", tmp_path)
    said = call(*pytest_, cwd=tmp_path)
    assert int(re.search(r"(\d+) passed", said).group(1)) > 30, said[-500:]


def test_version_and_requirement(built):
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
        metadata = archive.read(name).decode()
    required = re.findall(r"^Requires-Dist: (.*)$", metadata, re.M)
    assert [r for r in required if "extra" not in r] == ["torch>=2.11"]
