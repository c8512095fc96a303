#!/bin/sh
# Removes a cluster: processes, mounts, namespaces, cgroups, files and sysctls; also after a crash. down.sh STATE_FOLDER [MACHINE...]
# With machines named, only these end, and their disks stay: node.sh brings them back.
set -eu
state=$(cd "$1" 2>/dev/null && pwd) || exit 0
shift; only="$*"

for machine in ${only:-$(ls "$state/vm" 2>/dev/null)}; do
    folder=$state/vm/$machine
    if [ -e "$folder/pid" ]; then
        pid=$(cat "$folder/pid")
        # The number may have been given to another process since.
        case $(readlink "/proc/$pid/exe" || true) in
            */pause) kill -9 "$pid" ;;
        esac
        for _ in $(seq 200); do [ -d "/proc/$pid" ] || break; sleep 0.05; done
        rm -f "$folder/pid"
    fi
    for _ in $(seq 100); do
        left=$(find /sys/fs/cgroup -maxdepth 2 -name "bindery-$machine" -type d 2>/dev/null)
        [ -n "$left" ] || break
        for group in $left; do find "$group" -depth -type d -exec rmdir {} + 2>/dev/null || true; done
        sleep 0.05
    done
    if [ -n "$only" ]; then rm -rf "$folder/run"; else rm -rf "$folder"; fi
done
[ -z "$only" ] || exit 0

if [ -e "$state/sysctl.saved" ]; then
    sysctl -q -p "$state/sysctl.saved"
    rm "$state/sysctl.saved"
fi
# Mount points that were made on this machine, where nothing else is in them.
rmdir /var/lib/bindery /var/lib/bindery-models 2>/dev/null || true
rm -rf "$state/vm"
rm -f "$state/kubectl" "$state/helm" "$state/in"
