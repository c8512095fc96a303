#!/bin/sh
# `make bench-operator`: a control plane, the operator as a process, a thousand models. bench_operator.sh STATE_FOLDER
set -eu
[ "$(id -u)" = 0 ] || { echo "a cluster needs root: namespaces, mounts and cgroups are made" >&2; exit 1; }
here=$(cd "$(dirname "$0")" && pwd); root=$(cd "$here/../.." && pwd)
mkdir -p "$1"; state=$(cd "$1" && pwd); export state
bin=$(sh "$here/build.sh"); export bin
export nodes=0
(cd "$root" && cargo build --release --locked --bin bindery-operator)
sh "$here/down.sh" "$state"
trap 'sh "$here/down.sh" "$state"' EXIT
mkdir -p "$state/images" "$state/models"
sh "$here/up.sh" "$state"
. "$here/machines.sh"
kubectl_ apply -f "$root/charts/bindery/templates/crds.yaml" >/dev/null
kubectl_ create namespace bench >/dev/null
cd "$root"
BINDERY_BENCH_OPERATOR=1 KUBECONFIG="$pki/admin.conf" \
    nsenter -t "$(cat "$vm/cp/pid")" --net -- cargo bench --locked --workspace --bench scale
