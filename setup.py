"""Builds the native module ``fastpref._C``. Everything declarative lives in pyproject.toml.

The package installs with or without it: with no torch to compile against, no compiler, or a
compilation that fails, a message says so and the Python backends remain. Switches:

    FASTPREF_NO_CPP=1       do not compile anything
    FASTPREF_FORCE_BUILD=1  a module that cannot be built fails the installation
    FASTPREF_CUDA=1 or 0    with or without csrc/cuda; else: torch is a CUDA build and nvcc is there
"""

import os
import sys
from pathlib import Path

from setuptools import setup

CPU = ["module", "cpu/rows", "cpu/sweep", "cpu/combine", "cpu/kl", "cpu/segments"]
CUDA, NVCC = ["sweep", "combine", "kl", "rows", "segments"], ["-O3", "--expt-relaxed-constexpr"]
TORCH_TARGET = "0x020a000000000000"  # stable ABI of torch 2.10: the binary loads there and later
LOG = Path("build/fastpref-build.log").absolute()
REMEDY = "pip install ninja pybind11 setuptools wheel && FASTPREF_FORCE_BUILD=1 "
REMEDY += "pip install -v --no-build-isolation --no-deps ."


def without_kernels(why: str, error: Exception | None = None) -> dict:
    """Say what will be missing, or fail where that was asked for."""
    if error and os.environ.get("FASTPREF_FORCE_BUILD") == "1":
        raise error
    print(f"fastpref: installing without native kernels: {why}", file=sys.stderr)
    print(f"fastpref: to build them: {REMEDY}", file=sys.stderr, flush=True)
    return {}


def native_module() -> dict:
    """The arguments of ``setup`` that build ``fastpref._C``; none where that is not possible."""
    if os.environ.get("FASTPREF_NO_CPP") == "1":
        return without_kernels("FASTPREF_NO_CPP=1")
    try:
        import pybind11
        import torch
        from torch.utils import cpp_extension as ext
    except ImportError as error:
        hint = " (an isolated build does not see your torch)" if error.name == "torch" else ""
        return without_kernels(f"{error}{hint}", error)

    class Build(ext.BuildExtension):
        def build_extensions(self) -> None:
            LOG.parent.mkdir(exist_ok=True)
            streams = os.dup(1), os.dup(2)  # compilers write past sys.stdout
            try:
                with LOG.open("w") as log:
                    os.dup2(log.fileno(), 1), os.dup2(log.fileno(), 2)
                    super().build_extensions()
            except Exception as error:
                os.dup2(streams[1], 2)
                LOG.write_text(f"{LOG.read_text()}{error}\n")
                hint = "; FASTPREF_CUDA=0 builds the CPU part alone" if cuda else ""
                without_kernels(f"{error}; the compiler's output is in {LOG}{hint}", error)
                self.extensions = []
            finally:
                os.dup2(streams[0], 1), os.dup2(streams[1], 2)
                print(LOG.read_text(), flush=True)

    able = bool(torch.version.cuda and ext.CUDA_HOME)
    cuda = os.environ.get("FASTPREF_CUDA", "01"[able]) == "1"
    if cuda and not able:
        found = f"torch {torch.__version__}, CUDA toolkit {ext.CUDA_HOME or 'not found'}"
        sys.exit(f"fastpref: FASTPREF_CUDA=1 needs a CUDA build of torch and nvcc; found {found}")
    target = [f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"] + (["-DUSE_CUDA"] if cuda else [])
    flags = "-O3 -Wall -Wextra -fvisibility=hidden -ffp-contract=fast".split()
    flags += ["-fno-math-errno", "-fno-trapping-math"]  # else the exp loops stay scalar
    facts = {
        "FLAGS": " ".join(flags),
        "TORCH_TARGET": TORCH_TARGET,
        "TORCH_BUILT_WITH": torch.__version__,
        "CUDA_VERSION": str(torch.version.cuda) if cuda else "none",
        "CUDA_ARCHS": os.environ.get("TORCH_CUDA_ARCH_LIST", "default") if cuda else "none",
    }
    # no py_limited_api: pybind11 uses more of CPython; a wheel serves one Python and every torch
    extension = (ext.CUDAExtension if cuda else ext.CppExtension)(
        "fastpref._C",
        [f"csrc/{name}.cpp" for name in CPU] + [f"csrc/cuda/{name}.cu" for name in CUDA if cuda],
        include_dirs=[pybind11.get_include()],
        define_macros=[(f"FASTPREF_{name}", f'"{fact}"') for name, fact in facts.items()],
        extra_compile_args={"cxx": target + flags, "nvcc": target + NVCC},
    )
    return {"ext_modules": [extension], "cmdclass": {"build_ext": Build}}


setup(**native_module())
