#!/usr/bin/env python3
"""Fetches CUDA's compiler from PyPI and prints its folder (a CUDA_HOME): about 100 MB, no GPU or driver needed.

It lies in the cache, outside the working tree, where the kernels' build looks for it; a second run fetches nothing.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from fetch_model import FetchError, pip

VERSION = "13.0"
# The compiler, its own headers, its optimizer, the C++ headers and those of the runtime.
PACKAGES = {
    "nvidia-cuda-nvcc": "13.0.88",
    "nvidia-cuda-crt": "13.0.88",
    "nvidia-nvvm": "13.0.88",
    "nvidia-cuda-cccl": "13.0.85",
    "nvidia-cuda-runtime": "13.0.96",
}


def cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(Path.home(), ".cache")
    return Path(base) / "bindery" / f"cuda-{VERSION}"


def make(folder: Path) -> Path:
    home, stamp = folder / "nvidia" / "cu13", folder / "complete"
    wanted = "\n".join(f"{name}=={version}" for name, version in PACKAGES.items())
    if stamp.is_file() and stamp.read_text() == wanted:
        return home
    folder.mkdir(parents=True, exist_ok=True)
    options = ["install", "--quiet", "--disable-pip-version-check", "--root-user-action", "ignore", "--no-deps", "--upgrade"]
    with tempfile.TemporaryDirectory(prefix="bindery-cuda-") as scratch:
        command = [*pip(Path(scratch)), *options, "--target", str(folder), *wanted.split()]
        subprocess.run(command, stdout=sys.stderr, check=True)
    for program in [*(home / "bin").iterdir(), *(home / "nvvm" / "bin").iterdir()]:
        if program.is_file():
            program.chmod(0o755)
    stamp.write_text(wanted)
    return home


def main() -> int:
    try:
        print(make(cache_folder()))
    except (OSError, FetchError, subprocess.CalledProcessError) as error:
        print(f"cannot fetch CUDA's compiler: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
