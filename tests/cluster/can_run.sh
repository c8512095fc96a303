#!/bin/sh
# Whether a cluster can be started here; else says why not. can_run.sh
wanted=1.26
[ "$(id -u)" = 0 ] || { echo "It needs root: namespaces, mounts and cgroups are made."; exit 1; }
found=$(go env GOVERSION 2>/dev/null | sed 's/^go//')
if [ -z "$found" ] || [ "$(printf '%s\n%s\n' "$wanted" "$found" | sort -V | head -n 1)" != "$wanted" ]; then
    echo "Go: found ${found:-none}, wanted $wanted or later: https://go.dev/dl"; exit 1
fi
for group in /sys/fs/cgroup /sys/fs/cgroup/memory; do
    [ -d "$group" ] || continue
    { mkdir "$group/bindery-probe" && rmdir "$group/bindery-probe"; } 2>/dev/null ||
        { echo "This machine does not let cgroups be made."; exit 1; }
done
unshare --net --mount --pid --fork true 2>/dev/null || { echo "This machine does not let namespaces be made."; exit 1; }
# What it installs and builds is wanted in any case; only packages that cannot be had are a reason not to run.
said=$(sh "$(dirname "$0")/build.sh" 2>&1 >/dev/null) || { [ $? != 3 ] || { echo "$said" | tail -n 1; exit 1; }; }
