#!/bin/sh
# Removes a cluster that runs, then one whose start was killed, and looks that nothing of either is left: down_test.sh STATE_FOLDER
set -eu
here=$(cd "$(dirname "$0")" && pwd)
state=$(cd "$1" && pwd); export state
bin=$(sh "$here/build.sh"); export bin

namespaces() { for kind in net mnt pid; do readlink /proc/[0-9]*/ns/$kind || true; done 2>/dev/null | sort -u; }
sysctls() { sed 's/=.*//' "$state/sysctl.expected" | while read -r name; do echo "$name=$(sysctl -n "$name")"; done; }
# Says what is left; nothing where nothing is.
left() {
    # Such as `containerd -c /run/bindery-cluster/...`, and whatever was given a file of the cluster.
    pgrep -fa "$bin/|$(readlink -f "$bin/pause")|/run/bindery-cluster/|$state/(vm|pki)/" || true
    grep -F "$state/vm" /proc/self/mountinfo || true
    find /sys/fs/cgroup -maxdepth 2 -name "bindery-*" -type d
    [ ! -e "$state/vm" ] || echo "$state/vm"
    sysctls | diff "$state/sysctl.expected" - || true
}
check() {
    found=$(left)
    [ -z "$found" ] || { printf 'make cluster-down after %s left this:\n%s\n' "$1" "$found" >&2; exit 1; }
}

# What the machine had before the cluster that runs.
cp "$state/sysctl.saved" "$state/sysctl.expected"
[ -n "$(left)" ] || { echo "nothing of a cluster that runs is seen" >&2; exit 1; }
sh "$here/down.sh" "$state"
check "the tests"

before=$(namespaces)
# At a later moment each time; the last one is about that of the first Pods.
for moment in 0.3 1 2 4; do
    setsid sh "$here/up.sh" "$state" >/dev/null 2>&1 &
    starter=$!
    sleep "$moment"
    kill -9 "-$starter"
    wait "$starter" 2>/dev/null || true
    sh "$here/down.sh" "$state"
    check "a start that was killed after $moment s"
    new=$(namespaces | grep -vxF "$before" || true)
    [ -z "$new" ] || { echo "make cluster-down left the namespaces $new" >&2; exit 1; }
done
rm "$state/sysctl.expected"
