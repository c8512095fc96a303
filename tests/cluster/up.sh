#!/bin/sh
# A real Kubernetes on this machine: a control plane and two nodes, without an uplink. up.sh STATE_FOLDER; `make cluster-up`
# calls it, `down.sh STATE_FOLDER` removes all of it.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$1"; state=$(cd "$1" && pwd); bin=${bin:?the folder that build.sh printed}
export state bin
. "$here/machines.sh"
begun=$(date +%s%N)
elapsed() { echo "$((($(date +%s%N) - begun) / 100000000))" | sed 's/.$/.&/; s/^\./0./'; }

sh "$here/pki.sh" "$pki" "$nodes"
# The kubelets set these for the whole machine.
if [ ! -e "$state/sysctl.saved" ]; then
    for name in vm.overcommit_memory vm.panic_on_oom kernel.panic kernel.panic_on_oops kernel.keys.root_maxkeys kernel.keys.root_maxbytes; do
        echo "$name=$(sysctl -n "$name")"
    done >"$state/sysctl.new"
    mv "$state/sysctl.new" "$state/sysctl.saved"
fi

machine cp
inside cp sh -c "ip link add nodes type bridge; ip addr add 10.99.0.1/24 dev nodes; ip link set nodes up"
start cp etcd "$bin/etcd" --data-dir "$vm/cp/etcd" --unsafe-no-fsync --log-level warn \
    --listen-client-urls http://127.0.0.1:2379 --advertise-client-urls http://127.0.0.1:2379 --listen-peer-urls http://127.0.0.1:2380
start cp apiserver "$bin/kube-apiserver" --etcd-servers=http://127.0.0.1:2379 --service-cluster-ip-range=10.96.0.0/16 \
    --advertise-address=10.99.0.1 --secure-port=6443 --allow-privileged=true \
    --authorization-mode=Node,RBAC --enable-admission-plugins=NodeRestriction \
    --tls-cert-file="$pki/apiserver.crt" --tls-private-key-file="$pki/apiserver.key" --client-ca-file="$pki/ca.crt" \
    --kubelet-client-certificate="$pki/apiserver-kubelet.crt" --kubelet-client-key="$pki/apiserver-kubelet.key" \
    --kubelet-certificate-authority="$pki/ca.crt" --kubelet-preferred-address-types=InternalIP \
    --service-account-issuer=https://kubernetes.default.svc.cluster.local \
    --service-account-key-file="$pki/service-account.pub" --service-account-signing-key-file="$pki/service-account.key" \
    --requestheader-client-ca-file="$pki/ca.crt" --requestheader-allowed-names=front-proxy-client \
    --requestheader-username-headers=X-Remote-User --requestheader-group-headers=X-Remote-Group \
    --requestheader-extra-headers-prefix=X-Remote-Extra- \
    --proxy-client-cert-file="$pki/front-proxy.crt" --proxy-client-key-file="$pki/front-proxy.key"

# The nodes' containerd and images, while the API server starts.
pids=
for i in $(seq "$nodes"); do sh "$here/node.sh" up "$i" & pids="$pids $!"; done
wait_for 60 "the API server" kubectl_ get --raw /readyz
for part in controller-manager scheduler; do
    own="--kubeconfig=$pki/$part.conf --authentication-kubeconfig=$pki/$part.conf --authorization-kubeconfig=$pki/$part.conf
        --leader-elect=false --bind-address=127.0.0.1 --kube-api-qps=200 --kube-api-burst=400"
    if [ "$part" = controller-manager ]; then
        own="$own --use-service-account-credentials=true --service-account-private-key-file=$pki/service-account.key
            --root-ca-file=$pki/ca.crt --flex-volume-plugin-dir=/run/flex --node-monitor-period=1s --node-monitor-grace-period=12s"
    fi
    # shellcheck disable=SC2086
    start cp "$part" "$bin/kube-$part" $own
done
for pid in $pids; do wait "$pid"; done
node_ready() { [ "$(kubectl_ get node "$1" -o 'jsonpath={.status.conditions[?(@.type=="Ready")].status}')" = True ]; }
for i in $(seq "$nodes"); do wait_for 60 "node$i" node_ready "node$i"; done
wait_for 60 "the service account default" kubectl_ -n default get serviceaccount default
kubectl_ apply -f "$here/dns.yaml" >/dev/null
echo "$nodes nodes are Ready after $(elapsed) s"
