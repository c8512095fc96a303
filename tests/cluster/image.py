"""Writes an OCI image archive without any tool: image.py OUT.tar NAME [--entrypoint PATH] SOURCE:TARGET...

One layer with the files that are named, the shared libraries that the programs among them link to, and the certificate
authorities of this machine. The same files give the same bytes.
"""

import argparse
import gzip
import hashlib
import io
import json
import pathlib
import re
import subprocess
import tarfile

AUTHORITIES = "/etc/ssl/certs/ca-certificates.crt"


def libraries(program):
    """Paths of the shared libraries of a program; none for a static one."""
    said = subprocess.run(["ldd", program], capture_output=True, text=True, check=False).stdout
    return re.findall(r"(?:=> )?(/\S+) \(0x", said)


def add(layer, folders, target, data, mode):
    """Adds a file and the folders above it."""
    for parent in reversed(pathlib.PurePosixPath(target).parents):
        name = str(parent).strip("/")
        if name and name not in folders:
            folders.add(name)
            entry = tarfile.TarInfo(name)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o755
            layer.addfile(entry)
    entry = tarfile.TarInfo(target.lstrip("/"))
    entry.size, entry.mode = len(data), mode
    layer.addfile(entry, io.BytesIO(data))


def build_layer(files):
    wanted = {}
    for pair in files:
        source, target = pair.split(":")
        wanted[target] = (source, 0o755)
        for library in libraries(source):
            wanted[library] = (library, 0o755)
    if pathlib.Path(AUTHORITIES).exists():
        wanted[AUTHORITIES] = (AUTHORITIES, 0o644)
    packed, folders = io.BytesIO(), set()
    with tarfile.open(fileobj=packed, mode="w") as layer:
        for target, (source, mode) in sorted(wanted.items()):
            add(layer, folders, target, pathlib.Path(source).read_bytes(), mode)
    return packed.getvalue()


def digest(data):
    return "sha256:" + hashlib.sha256(data).hexdigest()


def document(value):
    return json.dumps(value, sort_keys=True).encode()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("name")
    parser.add_argument("--entrypoint", required=True)
    parser.add_argument("files", nargs="+")
    given = parser.parse_args()
    raw = build_layer(given.files)
    layer = gzip.compress(raw, 1, mtime=0)
    config = document({
        "architecture": "amd64", "os": "linux",
        "config": {"Entrypoint": [given.entrypoint]},
        "rootfs": {"type": "layers", "diff_ids": [digest(raw)]},
    })
    manifest = document({
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": digest(config), "size": len(config)},
        "layers": [{"mediaType": "application/vnd.oci.image.layer.v1.tar+gzip", "digest": digest(layer), "size": len(layer)}],
    })
    index = document({
        "schemaVersion": 2,
        "manifests": [{
            "mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": digest(manifest), "size": len(manifest),
            "annotations": {"io.containerd.image.name": given.name, "org.opencontainers.image.ref.name": given.name.rpartition(":")[2]},
        }],
    })
    blobs = {"blobs/sha256/" + digest(blob)[7:]: blob for blob in (config, manifest, layer)}
    written = given.out.with_suffix(".new")
    with tarfile.open(written, "w") as archive:
        for name, data in [("oci-layout", b'{"imageLayoutVersion":"1.0.0"}'), ("index.json", index), *blobs.items()]:
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(data), 0o644
            archive.addfile(entry, io.BytesIO(data))
    written.rename(given.out)


main()
