"""Build of sparsemtl._C: optional, one object per instruction set, CUDA where nvcc is found.

Everything declarative stands in pyproject.toml. Switches, all environment variables:
SPARSEMTL_NATIVE=0   no native module at all
SPARSEMTL_CUDA=0     no CUDA objects
SPARSEMTL_SANITIZE=1 address and undefined-behaviour sanitizers, for `make sanitize`
"""

from __future__ import annotations

import glob
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError

X86 = platform.machine().lower() in ("x86_64", "amd64")
ISA_FLAGS = {  # a file's name ends in its instruction set; no other file may use one
    "kernels_avx2.cpp": ["-mavx2", "-mfma", "-mf16c"],
    "kernels_avx512.cpp": [
        *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"),
        *("-mfma", "-mf16c", "-mprefer-vector-width=512"),
        "-Wno-maybe-uninitialized",  # gcc 12 says it of its own _mm512_undefined_epi32
    ],
}
COMMON_FLAGS = ["-std=c++17", "-O3", "-fvisibility=hidden", "-Wall", "-Wextra", "-ffp-contract=off"]
# -O1: instrumented templates take ten times as long at -O3
SANITIZE_FLAGS = ["-fsanitize=address,undefined", "-fno-omit-frame-pointer", "-g", "-O1"]
NVCC_FLAGS = [
    *("-std=c++17", "-O3", "--threads", "2", "-Xcompiler", "-fPIC,-fvisibility=hidden"),
    *("-gencode", "arch=compute_80,code=sm_80"),
    *("-gencode", "arch=compute_90a,code=sm_90a"),
    *("-gencode", "arch=compute_90,code=compute_90"),  # PTX for whatever comes later
]


def switch(name: str) -> bool | None:
    """Read a 0/1 variable; None where it is not set."""
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        raise SystemExit(f"setup.py: expected {name} to be 0 or 1, got {value!r}")
    return None if value == "" else value == "1"


def say(text: str) -> None:
    print(f"sparsemtl build: {text}", file=sys.stderr, flush=True)


def cpu_sources() -> list[str]:
    """Every C++ file of csrc, less the instruction sets that this machine's family lacks."""
    found = sorted(glob.glob("csrc/*.cpp") + glob.glob("csrc/*/*.cpp"))
    return [s for s in found if X86 or os.path.basename(s) not in ISA_FLAGS]


def find_nvcc() -> str | None:
    homes = (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda")
    candidates = [os.path.join(home, "bin", "nvcc") for home in homes if home]
    for candidate in [*candidates, shutil.which("nvcc")]:
        if candidate and os.access(candidate, os.X_OK):
            return candidate
    return None


class BuildNative(build_ext):
    """Compile with per-file flags; a failure leaves the package without _C and says so once."""

    built = False

    def run(self) -> None:
        in_source = self.inplace or self.editable_mode  # setuptools clears the first meanwhile
        if switch("SPARSEMTL_NATIVE") is False:
            say("SPARSEMTL_NATIVE=0, so without the native module; the reference backend is used")
        else:
            super().run()
        if in_source and not self.built:
            # A module of older sources would otherwise stay in their place.
            stale = Path("sparsemtl", os.path.basename(self.get_ext_filename("sparsemtl._C")))
            stale.unlink(missing_ok=True)

    def build_extension(self, ext: Extension) -> None:
        try:
            self.build_native(ext)
            self.built = True
        except (BaseError, CCompilerError, OSError) as error:
            # Without this, setuptools would pack the module of an earlier build.
            Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)
            reason = str(error).strip().splitlines()[-1]
            say(
                f"WARNING: sparsemtl._C was not built ({reason}); the package works without it, "
                "on the slower reference backend. Install a C++17 compiler and reinstall for speed"
            )

    def build_native(self, ext: Extension) -> None:
        # Objects of another choice of switches must not be packed again.
        self.force = True
        sanitize = SANITIZE_FLAGS if switch("SPARSEMTL_SANITIZE") else []
        openmp = ["-fopenmp"] if self.compiles("-fopenmp") else []
        if not openmp:
            say("the compiler has no -fopenmp, so native kernels will use one thread")
        ext.extra_compile_args = [*COMMON_FLAGS, *openmp, *sanitize]
        ext.define_macros = [("SPARSEMTL_X86", "1")] if X86 else []
        ext.extra_link_args = [*openmp, *sanitize]
        ext.extra_objects = self.cuda_objects()
        if ext.extra_objects:
            ext.define_macros += [("SPARSEMTL_CUDA", "1")]
            lib = Path(find_nvcc() or "").resolve().parent.parent / "lib64"
            lib = lib if lib.is_dir() else Path("/usr/local/cuda/lib64")
            ext.library_dirs = [str(lib)]
            ext.extra_link_args += ["-lcudart_static", "-lrt", "-ldl", "-lpthread"]
        self.wrap_compiler()
        super().build_extension(ext)

    def compiles(self, flag: str) -> bool:
        """Whether the compiler takes a flag, asked with an empty program."""
        folder = Path(self.build_temp)
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / "probe.cpp"
        probe.write_text("int main() { return 0; }\n")
        compiler = getattr(self.compiler, "compiler_so_cxx", self.compiler.compiler_so)
        command = [*compiler, flag, "-c", str(probe)]
        done = subprocess.run([*command, "-o", str(folder / "probe.o")], capture_output=True)
        return done.returncode == 0

    def wrap_compiler(self) -> None:
        """Append a file's own instruction-set flags."""
        compile_one = self.compiler._compile

        def compile_with_isa(obj, src, ext, cc_args, extra_postargs, pp_opts):
            flags = [*extra_postargs, *ISA_FLAGS.get(os.path.basename(src), [])]
            compile_one(obj, src, ext, cc_args, flags, pp_opts)

        self.compiler._compile = compile_with_isa

    def cuda_objects(self) -> list[str]:
        """Compile csrc/cuda/*.cu; without nvcc, or where it fails, one line and an empty list."""
        if switch("SPARSEMTL_CUDA") is False:
            say("SPARSEMTL_CUDA=0, so without CUDA kernels")
            return []
        nvcc = find_nvcc()
        if nvcc is None:
            say("nvcc was not found, so without CUDA kernels")
            return []
        folder = Path(self.build_temp)
        folder.mkdir(parents=True, exist_ok=True)
        children = {}
        for source in sorted(glob.glob("csrc/cuda/*.cu")):  # side by side
            target = str(folder / (Path(source).stem + ".cu.o"))
            command = [nvcc, *NVCC_FLAGS, "-Icsrc", "-c", source, "-o", target]
            children[target] = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        words = {target: child.communicate()[0] for target, child in children.items()}
        for target, child in children.items():
            if child.returncode != 0:
                lines = words[target].strip().splitlines() or ["no message"]
                say(f"WARNING: nvcc failed, so without CUDA kernels ({lines[0]})")
                return []
        return list(children)


def extensions() -> list[Extension]:
    try:
        import pybind11
        from pybind11.setup_helpers import ParallelCompile
    except ImportError:  # only without build isolation, which would have brought it
        say("WARNING: pybind11 is not installed, so without the native module")
        return []
    ParallelCompile("SPARSEMTL_BUILD_JOBS").install()  # files side by side
    headers = sorted(glob.glob("csrc/**/*.h", recursive=True))
    include = ["csrc", pybind11.get_include()]
    return [
        Extension(
            "sparsemtl._C",
            cpu_sources(),
            include_dirs=include,
            depends=headers,
            language="c++",
            optional=True,  # setuptools then copies nothing where nothing was built
        )
    ]


setup(
    packages=[
        *sorted({str(p.parent).replace(os.sep, ".") for p in Path("sparsemtl").rglob("*.py")}),
        "sparsemtl.kernels",
    ],
    package_dir={"sparsemtl.kernels": "kernels"},
    package_data={"sparsemtl": ["py.typed", "**/*.html", "**/*.j2", "**/*.css"]},
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildNative},
    zip_safe=False,
)
