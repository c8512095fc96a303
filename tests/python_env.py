#!/usr/bin/env python3
"""Makes the Python environment of the serving tests and prints the path of its interpreter.

It lies in the cache, outside the working tree, under a name that changes with tests/requirements.txt and with the
version of Python; a second run installs nothing.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

REQUIREMENTS = Path(__file__).resolve().parent / "requirements.txt"


def cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(Path.home(), ".cache")
    return Path(base) / "bindery" / "python"


def key() -> str:
    digest = hashlib.sha256(REQUIREMENTS.read_bytes())
    digest.update(sys.version.encode())
    digest.update(sys.executable.encode())
    return digest.hexdigest()[:16]


def run(command: list) -> None:
    subprocess.run(command, stdout=sys.stderr, check=True)


def make(folder: Path) -> Path:
    python = folder / "bin" / "python"
    stamp = folder / "complete"
    if stamp.is_file() and python.exists():
        return python
    # An environment holds absolute paths, so it is made in place and only its stamp says that it is whole.
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    run([sys.executable, "-m", "venv", str(folder)])
    run([str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r", str(REQUIREMENTS)])
    handle, name = tempfile.mkstemp(dir=folder)
    os.close(handle)
    os.replace(name, stamp)
    return python


def main() -> int:
    try:
        print(make(cache_folder() / key()))
    except (OSError, subprocess.CalledProcessError) as error:
        print(
            f"cannot make the tests' Python environment: {error}\n"
            "on Debian or Ubuntu: apt-get install python3-venv",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
