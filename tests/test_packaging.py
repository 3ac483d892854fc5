"""What `pip install .` gives: two import packages, and a loss that needs torch and triton alone."""

import os
import re
import subprocess
import sys
import time
import venv
import zipfile
from importlib.metadata import requires
from pathlib import Path

import pytest
import sdft_kernels

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
    assert {"sdft_kernels/compat/liger.py", "sdft/integrations/trl.py"} <= modules
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


def test_base_dependencies_are_torch_and_triton() -> None:
    base = [r for r in requires("sdft") or [] if "extra ==" not in r]
    assert sorted(re.split(r"[>=;\s]", r)[0] for r in base) == ["torch", "triton"]


@pytest.mark.parametrize("package", ["sdft_kernels", "sdft", "sdft.config"])
def test_light_imports_load_nothing_heavy(package: str) -> None:
    heavy = {"transformers", "peft", "datasets", "accelerate"}
    heavy |= {"sdft"} if package == "sdft_kernels" else {"torch"}
    code = f"import sys, {package}; print(*(m for m in {sorted(heavy)} if m in sys.modules))"
    assert run(sys.executable, "-c", code).strip() == ""


def test_no_package_of_ours_hides_hugging_faces_kernels() -> None:
    # With a regular package named `kernels` beside us, `import transformers.activations` fails (design section 5).
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "tests" / "__init__.py").exists()
    run(sys.executable, "-c", "import transformers.activations", cwd=ROOT)


@pytest.mark.slow
def test_fresh_install_gives_the_loss_without_the_trainer(wheel: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    # Triton's interpreter wants numpy, which is not among what the loss needs.
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
    # The command is there, and says what is missing instead of a traceback.
    done = subprocess.run(
        [python.with_name("sdft"), "train", "x.toml"], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 2
    assert "pip install '.[train]' in a checkout" in done.stderr
    assert "Traceback" not in done.stderr
