#!/bin/sh
# Removes a cluster: processes, mounts, namespaces, cgroups, files and sysctls; also after a crash. down.sh STATE_FOLDER [MACHINE...]
# With machines named, only these end, and their disks stay: node.sh brings them back.
set -eu
state=$(cd "$1" 2>/dev/null && pwd) || exit 0
shift; only="$*"

# A process 1 is a zombie only once all in its machine have ended.
runs() { case $(sed 's/.*) //; s/ .*//' "/proc/$1/stat" 2>/dev/null) in "" | Z | X) return 1 ;; esac; }

for machine in ${only:-$(ls "$state/vm" 2>/dev/null)}; do
    folder=$state/vm/$machine
    # The machine's process 1 and the one that made it, which ends with it; also when whoever started them was killed before
    # it wrote down their numbers.
    pids=$(pgrep -f "/pause $folder\$" || true); first=
    for pid in $pids; do
        case $(readlink "/proc/$pid/exe" || true) in
            */pause) first=$pid ;;
        esac
    done
    # shellcheck disable=SC2086
    [ -z "$pids" ] || kill -9 ${first:-$pids} || true
    for pid in $pids; do
        for _ in $(seq 200); do runs "$pid" || break; sleep 0.05; done
    done
    rm -f "$folder/pid"
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
