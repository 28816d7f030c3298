"""What is installed and what an import costs: wheels, fallbacks, names, the order of imports."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

import fastpref
from fastpref import backends

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "fastpref").rglob("*.py"))

# A module imports only what stands before it.
ORDER = [
    *("reference", "ops", "losses", "data", "policy", "reference_policy", "trainer", "rounds"),
    "cli",
]


# An editable install of this checkout would lend its files to another copy of the package.
ALONE = """
import sys
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in str(f).lower()]
"""


def run(*command: object, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """A child process that sees neither this checkout nor the network, unless told."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "FASTPREF_"))}
    return subprocess.run(
        [str(c) for c in command],
        cwd=cwd,
        env={**clean, "PIP_NO_INDEX": "1", "OMP_NUM_THREADS": "1", **env},
        capture_output=True,
        text=True,
    )


def python(code: str, *, cwd: Path, **env: str) -> str:
    done = run(sys.executable, "-c", code, cwd=cwd, **env)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what the build reads."""
    copy = tmp_path / "checkout"
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    for name in ("fastpref", "kernels", "csrc"):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=ignored)
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, copy / name)
    return copy


def pip(*arguments: object, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    offline = ("--no-build-isolation", "--no-deps", "--no-index")
    return run(sys.executable, "-m", "pip", *arguments, *offline, cwd=cwd, **env)


def test_import_is_light(tmp_path: Path) -> None:
    code = """
import sys, fastpref
heavy = {"torch", "triton", "transformers", "numpy"} & set(sys.modules)
assert not heavy, heavy
fastpref.linear_logprobs, fastpref.losses, fastpref.__version__
heavy = {"triton", "transformers", "datasets", "peft", "accelerate"} & set(sys.modules)
assert not heavy, heavy
import torch
assert not torch.cuda.is_initialized()
"""
    python(code, cwd=tmp_path, PYTHONPATH=str(ROOT))


@pytest.mark.parametrize("name", fastpref.__all__)
def test_every_public_name_resolves(name: str) -> None:
    assert getattr(fastpref, name) is not None
    assert name in dir(fastpref)


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match="no attribute 'linear_logprob'"):
        fastpref.linear_logprob  # noqa: B018


def test_a_missing_extra_is_named(tmp_path: Path) -> None:
    code = """
import sys, fastpref
sys.modules["transformers"] = None
try:
    fastpref.PreferenceConfig
except ImportError as error:
    print(error)
"""
    said = python(code, cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert said == (
        "fastpref.PreferenceConfig needs transformers. Try: pip install 'fastpref[train]'"
    )


def test_version_has_one_source(tmp_path: Path) -> None:
    declared = next(
        line.split('"')[1]
        for line in (ROOT / "pyproject.toml").read_text().splitlines()
        if line.startswith("version = ")
    )
    assert fastpref.__version__ == declared
    # not installed: no site-packages to read metadata from
    code = "import fastpref; print(fastpref.__version__)"
    alone = run(sys.executable, "-S", "-c", code, cwd=ROOT)
    assert alone.stdout.strip() == declared, alone.stderr


@pytest.mark.parametrize("installed", [True, False])
def test_source_folder_does_not_hide_the_package_named_kernels(
    installed: bool, tmp_path: Path
) -> None:
    """From the root of a checkout, where ``kernels/`` is on ``sys.path``. The Hugging Face package
    itself would bring a dozen others: ``.ci/run`` fetches it alone and imports it."""
    site = tmp_path / "site"
    if installed:
        (site / "kernels").mkdir(parents=True)
        (site / "kernels" / "__init__.py").write_text("get_kernel = print\n")
        (site / "kernels" / "layer.py").write_text("")
    code = """
import fastpref.kernels
from pathlib import Path
assert [Path(p).resolve() for p in fastpref.kernels.__path__] == [Path("kernels").resolve()]
from transformers import LlamaForCausalLM
try:
    from kernels import get_kernel
    import kernels.layer
    print("theirs")
except ImportError:
    print("none")
"""
    found = python(code, cwd=ROOT, PYTHONPATH=str(site))
    assert found == ("theirs" if installed else "none")
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_packages_are_listed() -> None:
    tomllib = pytest.importorskip("tomllib")
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    inits = (p.parent.relative_to(ROOT) for p in SOURCES if p.name == "__init__.py")
    assert set(setuptools["packages"]) == {".".join(p.parts) for p in inits} | {"fastpref.kernels"}
    assert os.readlink(ROOT / "fastpref" / "kernels") == "../kernels"


def test_files_stay_small() -> None:
    def lines(path: Path) -> int:
        return len(path.read_text().splitlines())

    assert lines(ROOT / "setup.py") <= 90
    native = [p for p in (ROOT / "csrc").rglob("*") if p.is_file()]
    kernels = list((ROOT / "kernels").glob("*.py"))
    sizes = {str(p.relative_to(ROOT)): lines(p) for p in [*SOURCES, *native, *kernels]}
    assert {name: n for name, n in sizes.items() if n > 400} == {}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in SOURCES}


def imports(module: str) -> set[str]:
    """The modules of this package that ``module`` imports, anywhere in its text."""
    path = MODULES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            up = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*up, *filter(None, [node.module])]) if node.level else node.module
            for alias in node.names:
                full = f"{base}.{alias.name}"
                found.add(full if full in MODULES else base)
    return (found & set(MODULES)) - {"fastpref", module}


def reachable(module: str) -> set[str]:
    seen: set[str] = set()
    todo = [module]
    while todo:
        new = imports(todo.pop()) - seen
        seen |= new
        todo.extend(new)
    return seen


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_one_way(module: str) -> None:
    below = reachable(module)
    assert module not in below, f"import cycle through {module}"
    layer = module.split(".")[1] if "." in module else module
    if layer in ORDER:
        above = set(ORDER[ORDER.index(layer) + 1 :])
        assert not {m for m in below if m.split(".")[1] in above}


def test_losses_need_only_torch() -> None:
    allowed = {*sys.stdlib_module_names, "torch", "fastpref"}
    for name in (m for m in MODULES if m.startswith("fastpref.losses")):
        for node in ast.walk(ast.parse(MODULES[name].read_text())):
            if isinstance(node, ast.Import):
                assert {a.name.split(".")[0] for a in node.names} <= allowed, name
            elif isinstance(node, ast.ImportFrom) and not node.level:
                assert (node.module or "").split(".")[0] in allowed, name
        assert all(m.startswith("fastpref.losses") for m in reachable(name)), name


def test_installs_without_a_compiler(checkout: Path, tmp_path: Path) -> None:
    pytest.importorskip("pybind11")
    target = tmp_path / "site"
    broken = {"CXX": "/bin/false", "CC": "/bin/false"}
    done = pip("install", "-v", "--target", target, checkout, cwd=tmp_path, **broken)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    assert "installing without native kernels" in output
    assert "isolated build does not see" not in output  # it does, and another thing is missing
    assert f"to build them: {backends.REBUILD}" in output
    log = checkout / "build" / "fastpref-build.log"
    assert str(log) in output
    assert "/bin/false" in log.read_text()
    code = f"""{ALONE}
import fastpref
from fastpref.backends import cpp
assert sys.argv[1] in fastpref.__file__, fastpref.__file__
assert not cpp.available() and "FASTPREF_FORCE_BUILD" in cpp.why_unavailable()
"""
    used = run(sys.executable, "-c", code, target, cwd=tmp_path, PYTHONPATH=str(target))
    assert used.returncode == 0, used.stderr

    forced = pip(
        *("install", "--target", tmp_path / "other", checkout),
        **{"cwd": tmp_path, "FASTPREF_FORCE_BUILD": "1", **broken},
    )
    assert forced.returncode != 0


@pytest.mark.parametrize("missing", ["torch", "pybind11"])
def test_the_build_says_which_package_it_lacks(checkout: Path, missing: str) -> None:
    code = f"""
import runpy, sys
sys.modules[{missing!r}] = None
sys.argv = ["setup.py", "--version"]
runpy.run_path("setup.py", run_name="__main__")
"""
    done = run(sys.executable, "-c", code, cwd=checkout)
    assert done.returncode == 0, done.stderr
    assert f"installing without native kernels: import of {missing} halted" in done.stderr
    assert ("an isolated build does not see your torch" in done.stderr) == (missing == "torch")
    assert f"to build them: {backends.REBUILD}\n" in done.stderr
    forced = run(sys.executable, "-c", code, cwd=checkout, FASTPREF_FORCE_BUILD="1")
    assert forced.returncode != 0


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch is a CUDA build here")
@pytest.mark.parametrize("force", ["0", "1"])
def test_cuda_kernels_for_a_torch_without_cuda_are_refused(
    checkout: Path, tmp_path: Path, force: str
) -> None:
    pytest.importorskip("pybind11")
    switches = {"FASTPREF_CUDA": "1", "FASTPREF_FORCE_BUILD": force}
    done = run(sys.executable, "setup.py", "build", cwd=checkout, **switches)
    assert done.returncode != 0
    said = f"FASTPREF_CUDA=1 needs a CUDA build of torch and nvcc; found torch {torch.__version__}"
    assert said in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_wheel_built_from_the_sdist_works_anywhere(checkout: Path, tmp_path: Path) -> None:
    pytest.importorskip("pybind11")
    pack = "import setuptools.build_meta as b, sys; print(b.build_sdist(sys.argv[1]))"
    packed = run(sys.executable, "-c", pack, tmp_path, cwd=checkout)
    assert packed.returncode == 0, packed.stderr
    (sdist,) = tmp_path.glob("fastpref-*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {Path(*Path(n).parts[1:]).as_posix() for n in archive.getnames()}
    for folder, pattern in (("csrc", "*"), ("kernels", "*.py")):
        wanted = (p for p in (ROOT / folder).rglob(pattern) if p.is_file() and p.suffix != ".pyc")
        assert {p.relative_to(ROOT).as_posix() for p in wanted} <= names

    built = pip("wheel", "-w", tmp_path, sdist, cwd=tmp_path, FASTPREF_FORCE_BUILD="1")
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = tmp_path.glob("fastpref-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    tops = {name.split("/")[0].split("-")[0] for name in names}
    assert tops == {"fastpref"}
    assert "fastpref/py.typed" in names
    assert any(name.startswith("fastpref/_C.") for name in names)
    for path in [*SOURCES, *(ROOT / "kernels").glob("*.py")]:
        relative = path.relative_to(ROOT).as_posix()
        assert ("fastpref/" if path.parent.name == "kernels" else "") + relative in names

    site = tmp_path / "site"
    assert pip("install", "--target", site, wheel, cwd=tmp_path).returncode == 0
    code = f"""{ALONE}
import fastpref, torch
h, w, y = torch.randn(5, 8), torch.randn(11, 8), torch.arange(5)
from fastpref.backends import cpp
assert cpp.available(), cpp.why_unavailable()
got = fastpref.linear_logprobs(h, w, y, backend="cpp")
torch.testing.assert_close(got, (h @ w.T).log_softmax(-1)[range(5), y])
print(fastpref.__file__)
"""
    assert python(code, cwd=tmp_path, PYTHONPATH=str(site)).startswith(str(site))
