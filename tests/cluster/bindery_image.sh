#!/bin/sh
# The image of Bindery from the programs of $PROFILE (default: release) and what they link to: bindery_image.sh OUT.tar [NAME]
set -eu
here=$(cd "$(dirname "$0")" && pwd); root=$(cd "$here/../.." && pwd)
out=$1; name=${2:-localhost/bindery:dev}
profile=${PROFILE:-release}; [ "$profile" != dev ] || profile=debug
built=${CARGO_TARGET_DIR:-$root/target}/$profile
said=$out.of
if [ "$(cat "$said" 2>/dev/null)" = "$profile" ] && [ "$out" -nt "$built/bindery" ] && [ "$out" -nt "$built/bindery-operator" ]; then exit 0; fi
stripped=$(mktemp -d); trap 'rm -rf "$stripped"' EXIT
for program in bindery bindery-operator; do strip --strip-debug -o "$stripped/$program" "$built/$program"; done
"${PYTHON:-python3}" "$here/image.py" "$out" "$name" --entrypoint /usr/bin/bindery \
    "$stripped/bindery:/usr/bin/bindery" "$stripped/bindery-operator:/usr/bin/bindery-operator"
size=$(wc -c <"$out")
echo "$out: $((size / 1000000)) MB, of which 100 may be used by a release" >&2
[ "$profile" != release ] || [ "$size" -lt 100000000 ] || { rm "$out"; exit 1; }
echo "$profile" >"$said"
