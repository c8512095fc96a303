#!/usr/bin/env python3
"""Brings every model of the tests into the cache, in every layout, and prints the folder that holds them.

SmolLM2 must come. Where another cannot be had, a loud line says so, and so do the tests that want it.
"""

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import fetch_model
import split_gguf
import to_safetensors


def make(converter, source: Path, folder: Path) -> None:
    """Converts `source` once. A folder is renamed to its place when it is whole, with the converter's checksum."""
    wanted = fetch_model.sha256(Path(converter.__file__))
    stamp = folder / "converter.sha256"
    if stamp.is_file() and stamp.read_text() == wanted:
        return
    print(f"making {folder.name} of {source.name}", file=sys.stderr)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        converter.convert(source, partial)
        (partial / stamp.name).write_text(wanted)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def main() -> int:
    folder = fetch_model.cache_folder()
    failures = (fetch_model.FetchError, OSError, subprocess.SubprocessError, zipfile.BadZipFile)
    try:
        smollm2 = fetch_model.fetch("smollm2", folder)
        make(to_safetensors, smollm2, folder / "smollm2-safetensors")
        make(split_gguf, smollm2, folder / "smollm2-split")
    except failures as error:
        print(f"cannot fetch the model: {error}", file=sys.stderr)
        return 1
    for name in ("gemma3", "qwen2.5-coder"):
        try:
            fetch_model.fetch(name, folder)
        except failures as error:
            print(f"\n*** NOT RUN: the tests with {name}. {error} ***", file=sys.stderr)
    print(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
