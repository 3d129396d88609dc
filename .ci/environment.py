"""Make the virtual environment that `make` works in, on any machine with Python 3.10 or newer.

usage: python .ci/environment.py FOLDER

A usable torch that this Python already imports is kept, with the triton and numpy beside it;
otherwise constraints.txt decides. Standard library only: it runs before anything is installed.
"""

import importlib.util
import os
import re
import subprocess
import sys
import sysconfig

OLDEST_PYTHON = (3, 10)
OLDEST_TORCH = (2, 9)
BUILD_TOOLS = ["setuptools", "wheel", "pybind11", "ninja"]
PROBE = "import torch; torch.ones(2).sum(); print(torch.__version__)"


def importable_torch(python):
    """Version of the torch that `python` imports and that works, or None."""
    done = subprocess.run([python, "-c", PROBE], capture_output=True, text=True)
    version = done.stdout.strip()
    found = re.match(r"(\d+)\.(\d+)", version)
    if done.returncode != 0 or not found:
        return None
    return version if tuple(map(int, found.groups())) >= OLDEST_TORCH else None


def create(folder, keep_torch):
    """Create the environment; one that sees this Python's packages if torch is to be kept."""
    flags = ["--system-site-packages"] if keep_torch else []
    if importlib.util.find_spec("ensurepip") is None:  # Debian without python3-venv
        flags.append("--without-pip")
    subprocess.check_call([sys.executable, "-m", "venv", "--clear", *flags, folder])
    python = os.path.join(folder, "bin", "python")
    if keep_torch and sys.prefix != sys.base_prefix:
        # A venv made inside a venv sees the base interpreter's packages, not its parent's.
        query = "import sysconfig; print(sysconfig.get_path('purelib'))"
        site = subprocess.check_output([python, "-c", query], text=True).strip()
        with open(os.path.join(site, "parent_environment.pth"), "w") as file:
            file.write(sysconfig.get_path("purelib") + "\n")
    return python


def pip_for(python):
    """Command that installs into the environment, by its own pip or by this Python's."""
    own = [python, "-m", "pip"]
    if subprocess.run([*own, "--version"], capture_output=True).returncode == 0:
        return own
    return [sys.executable, "-m", "pip", "--python", python]


def constraints_for(python, folder, keep_torch):
    """Path of the pins to install under: all of them, or all but those of packages to keep."""
    if not keep_torch:
        return "constraints.txt"
    query = "import importlib.util as u, sys; sys.exit(u.find_spec(sys.argv[1]) is None)"
    kept = [
        name
        for name in ("torch", "triton", "numpy")
        if subprocess.run([python, "-c", query, name]).returncode == 0
    ]
    kept.append("setuptools")  # some releases of torch bound it from above
    path = os.path.join(folder, "constraints.txt")
    with open("constraints.txt") as source, open(path, "w") as target:
        pins = (line for line in source if re.split(r"[=;\s]", line)[0] not in kept)
        target.writelines(pins)
        # Without a line of its own, pip might replace it for some other package's sake.
        version = re.sub(r"\+.*", "", keep_torch)
        target.write(f"torch=={version}\n")
    return path


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    if sys.version_info < OLDEST_PYTHON:
        sys.exit(
            f"environment.py: expected Python 3.10 or newer, got {sys.version.split()[0]}; "
            "name another with: make PYTHON=python3.12 ..."
        )
    folder = sys.argv[1]
    keep_torch = importable_torch(sys.executable)
    print(f"set-up: {sys.executable}, torch {keep_torch or 'from constraints.txt'}", flush=True)
    python = create(folder, keep_torch)
    if keep_torch and importable_torch(python) is None:
        print("set-up: that torch does not work in the environment, installing one", flush=True)
        keep_torch = None
    pins = constraints_for(python, folder, keep_torch)
    install = [*pip_for(python), "install", "--quiet", "--disable-pip-version-check", "-c", pins]
    subprocess.check_call([*install, *BUILD_TOOLS])
    # The Makefile builds the native module afterwards, with these tools, where its words are seen.
    without_native = {**os.environ, "SPARSEMTL_NATIVE": "0"}
    command = [*install, "--no-build-isolation", "-e", ".[report,dev]"]
    subprocess.check_call(command, env=without_native)


if __name__ == "__main__":
    main()
