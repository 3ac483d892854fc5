"""The result of `pip install .`: two import packages, and a loss that needs torch and triton alone."""

import ast
import os
import re
import subprocess
import sys
import time
import tomllib
import venv
import zipfile
from email import message_from_bytes
from email.message import Message
from pathlib import Path

import pytest
import sdft_kernels
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import sdft

ROOT = Path(__file__).parents[1]


def run(*command: object, **options: object) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    # From a copy of what git tracks: a build leaves folders behind in its source tree.
    source = folder / "source"
    source.mkdir()
    archive = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    for name in archive.decode().split("\0")[:-1]:
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", folder, source)
    return next(folder.glob("*.whl"))


def test_wheel_has_our_two_packages_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    top = {name.split("/")[0] for name in names}
    assert {t for t in top if not t.endswith(".dist-info")} == {"sdft", "sdft_kernels"}
    assert {"sdft/py.typed", "sdft_kernels/py.typed"} <= set(names)
    modules = {p.relative_to(ROOT / "kernels").as_posix() for p in (ROOT / "kernels").rglob("*.py")}
    modules |= {p.relative_to(ROOT).as_posix() for p in (ROOT / "sdft").rglob("*.py")}
    assert modules <= set(names), "a folder that pyproject's list of packages lacks"
    assert {"sdft_kernels/compat/liger.py", "sdft/integrations/trl/__init__.py"} <= modules
    templates = {p.relative_to(ROOT).as_posix() for p in (ROOT / "sdft").rglob("*.jinja")}
    assert {"sdft/study/templates/report.html.jinja", "sdft/study/templates/report.md.jinja"} <= templates <= set(names)


def test_one_version(wheel: Path) -> None:
    assert wheel.name.split("-")[1] == sdft_kernels.__version__ == sdft.__version__


@pytest.mark.slow
def test_two_builds_of_a_commit_are_the_same_bytes(tmp_path: Path) -> None:
    """`make wheel` in two clones, whose files differ in time and mode, and one of which has left-overs."""
    epoch = int(run("git", "log", "-1", "--format=%ct", cwd=ROOT))
    wheels = []
    for name, umask, zone, age in (("a", 0o022, "UTC", 0), ("another", 0o077, "Asia/Tokyo", 400_000_000)):
        clone = tmp_path / name
        run("git", "clone", "--quiet", ROOT, clone, umask=umask)
        for path in clone.rglob("*.py"):
            os.utime(path, (epoch - age, epoch - age))
        if age:
            left = clone / "build" / "lib" / "sdft" / "gone.py"
            left.parent.mkdir(parents=True)
            left.write_text("")
        environment = os.environ | {"TZ": zone}
        run("make", "wheel", f"PYTHON={sys.executable}", "DIST=out", cwd=clone, env=environment, umask=umask)
        wheels += list(clone.glob("out/*.whl"))
    one, other = wheels
    assert one.read_bytes() == other.read_bytes()
    pinned = re.search(r"^setuptools==(.*)$", (ROOT / "constraints.txt").read_text(), re.M)
    assert pinned is not None
    with zipfile.ZipFile(one) as archive:
        assert {entry.date_time for entry in archive.infolist()} == {time.gmtime(epoch - epoch % 2)[:6]}
        about = next(name for name in archive.namelist() if name.endswith(".dist-info/WHEEL"))
        assert f"Generator: setuptools ({pinned[1]})" in archive.read(about).decode()


def about(wheel: Path) -> Message:
    """The metadata of the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return message_from_bytes(archive.read(name))


def test_metadata(wheel: Path) -> None:
    metadata = about(wheel)
    assert metadata["Name"] == "sdft-trainer"
    versions = re.findall(r"Python :: (3\.\d+)", str(metadata.get_all("Classifier")))
    assert versions == ["3.11", "3.12", "3.13"]
    assert all(version in SpecifierSet(metadata["Requires-Python"]) for version in versions)
    base = [Requirement(r) for r in metadata.get_all("Requires-Dist") if "extra ==" not in r]
    assert sorted(r.name for r in base) == ["torch", "triton"]


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PINS = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]


def test_every_range_admits_what_was_tested() -> None:
    pins = {canonicalize_name(Requirement(pin).name): Requirement(pin) for pin in PINS}
    optional = PROJECT["project"]["optional-dependencies"]
    extras = {extra: list(map(Requirement, listed)) for extra, listed in optional.items()}
    for extra in ("train", "dev", "trl", "bnb", "lm-eval"):  # the others are not installed with constraints.txt
        for wanted in extras[extra]:
            (pin,) = pins[canonicalize_name(wanted.name)].specifier
            assert wanted.specifier.contains(pin.version), wanted


def test_uv_has_the_same_constraints() -> None:
    assert PROJECT["tool"]["uv"]["constraint-dependencies"] == PINS


def test_the_syntax_is_that_of_the_oldest_python() -> None:
    for folder in ("sdft", "kernels", "bench", "examples", "tests"):
        for path in (ROOT / folder).rglob("*.py"):
            ast.parse(path.read_text(), str(path), feature_version=(3, 11))


@pytest.mark.parametrize(("top_level", "warns"), [("sdft\n", True), ("sdft\nsdft_kernels\n", False)])
def test_the_other_project_named_sdft_is_warned_of(top_level: str, warns: bool, tmp_path: Path) -> None:
    folder = tmp_path / "sdft-9.9.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: sdft\nVersion: 9.9\n")
    (folder / "top_level.txt").write_text(top_level)
    paths = os.pathsep.join([str(tmp_path), str(ROOT / "kernels"), str(ROOT)])
    command = [sys.executable, "-m", "sdft", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": paths}, check=True)
    assert ("sdft 9.9 is another project" in done.stderr) == warns
    assert done.stdout == f"sdft {sdft.__version__}\n"


@pytest.mark.parametrize("package", ["sdft_kernels", "sdft", "sdft.config"])
def test_light_imports_load_nothing_heavy(package: str) -> None:
    heavy = {"transformers", "peft", "datasets", "accelerate"}
    heavy |= {"sdft"} if package == "sdft_kernels" else {"torch"}
    code = f"import sys, {package}; print(*(m for m in {sorted(heavy)} if m in sys.modules))"
    assert run(sys.executable, "-c", code).strip() == ""


def test_no_package_of_ours_hides_hugging_faces_kernels() -> None:
    # If a regular package named `kernels` can be imported, `import transformers.activations` fails.
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "tests" / "__init__.py").exists()
    run(sys.executable, "-c", "import transformers.activations", cwd=ROOT)


@pytest.mark.slow
def test_fresh_install_gives_the_loss_without_the_trainer(wheel: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    # Triton's interpreter needs numpy, which the loss does not need.
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV", "TRITON_INTERPRET")}
    run(python, "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", wheel, env=environment)
    code = """
import sys, torch
from sdft_kernels import linear_divergence
x = torch.randn(8, 16, requires_grad=True)
w = torch.randn(50, 16, requires_grad=True)
linear_divergence(x, w, torch.randn(8, 16), torch.randn(50, 16)).backward()
assert x.grad.abs().sum() > 0 and w.grad.abs().sum() > 0
assert "transformers" not in sys.modules and "sdft" not in sys.modules
try:
    import transformers
except ImportError:
    print("alone")
"""
    assert run(python, "-c", code, cwd=tmp_path, env=environment).strip() == "alone"
    assert "self-test passed" in run(python, "-m", "sdft_kernels", cwd=tmp_path, env=environment)
    # The command is there, and names what is missing instead of printing a traceback.
    done = subprocess.run(
        [python.with_name("sdft"), "train", "x.toml"], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 2
    assert "pip install '.[train]' in a checkout" in done.stderr
    assert "Traceback" not in done.stderr
