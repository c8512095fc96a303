#!/bin/sh
# Whether a cluster can be started here; else says why not. can_run.sh
wanted=1.26
[ "$(id -u)" = 0 ] || { echo "It needs root: namespaces, mounts and cgroups are made."; exit 1; }
found=$(go env GOVERSION 2>/dev/null | sed 's/^go//')
if [ -z "$found" ] || [ "$(printf '%s\n%s\n' "$wanted" "$found" | sort -V | head -n 1)" != "$wanted" ]; then
    echo "Go: found ${found:-none}, wanted $wanted or later: https://go.dev/dl"; exit 1
fi
unshare --net --mount --pid --fork true 2>/dev/null || { echo "This machine does not let namespaces be made."; exit 1; }
