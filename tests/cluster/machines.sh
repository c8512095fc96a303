# Machines in one machine: each is a process 1 with network, mount and process namespaces of its own, so that ending that one
# process ends all that runs in it and unmounts all that it mounted. Source it; it needs `state` (a folder) and `bin`.

nodes=${nodes:-2}
vm=$state/vm
pki=$state/pki
# Folders of the real machine that each machine sees its own of.
own_folders="/run /var/lib/kubelet /var/lib/cni /var/log /var/lib/bindery /var/lib/bindery-models"

node_ip() { echo "10.99.0.$((10 + $1))"; }

# Starts a machine: machine NAME. Its process 1 names its folder, by which down.sh finds it.
machine() {
    local outer inner folder
    mkdir -p "$vm/$1/log"
    setsid unshare --net --mount --pid --fork --mount-proc --propagation private --kill-child "$bin/pause" "$vm/$1" \
        >/dev/null 2>&1 </dev/null &
    outer=$!
    for _ in $(seq 200); do
        inner=$(cat "/proc/$outer/task/$outer/children" 2>/dev/null) || true
        inner=${inner%% *}
        # Only once it is `pause` are its mounts its own.
        [ -n "$inner" ] && [ "$(readlink "/proc/$inner/exe")" = "$(readlink -f "$bin/pause")" ] && break
        sleep 0.02
    done
    echo "$inner" >"$vm/$1/pid"
    for folder in $own_folders; do
        mkdir -p "$folder" "$vm/$1$folder"
        inside "$1" mount --bind "$vm/$1$folder" "$folder"
    done
    inside "$1" ip link set lo up
    inside "$1" mkdir -p /run/lock
}

# Runs a command in a machine: inside NAME COMMAND...
inside() {
    local machine=$1; shift
    nsenter -t "$(cat "$vm/$machine/pid")" --net --mount --pid --wd=. -- "$@"
}

# Starts a program in a machine, with a log: start NAME PROGRAM_NAME COMMAND...
start() {
    local machine=$1 program=$2; shift 2
    setsid nsenter -t "$(cat "$vm/$machine/pid")" --net --mount --pid -- "$@" >>"$vm/$machine/log/$program.log" 2>&1 </dev/null &
}

# The pid of a program in a machine, as this machine sees it: pid_of NAME PROGRAM_PATH.
pid_of() {
    for pid in $(pgrep -f "^$2" || true); do
        [ "$(readlink "/proc/$pid/ns/pid")" = "$(readlink "/proc/$(cat "$vm/$1/pid")/ns/pid")" ] && echo "$pid"
    done
}

kubectl_() { inside cp env KUBECONFIG="$pki/admin.conf" "$bin/kubectl" "$@"; }

# Waits up to some seconds until a command succeeds: wait_for SECONDS WHAT COMMAND...
wait_for() {
    local until=$(($(date +%s) + $1)) what=$2; shift 2
    while ! "$@" >/dev/null 2>&1; do
        if [ "$(date +%s)" -ge "$until" ]; then
            echo "not in time: $what; the logs are in $vm/*/log" >&2
            return 1
        fi
        sleep 0.1
    done
}
