#!/bin/sh
# One node: node.sh up|kubelet N, with `state` and `bin` in the environment. `kubelet` starts the kubelet again.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
. "$here/machines.sh"
i=$2; name=node$i; ip=$(node_ip "$i"); run=$vm/$name/run

start_kubelet() {
    start "$name" kubelet "$bin/kubelet" --config=/run/bindery-cluster/kubelet.yaml --kubeconfig="$pki/kubelet$i.conf" \
        --node-ip="$ip" --hostname-override="$name" --v=2
}
if [ "$1" = kubelet ]; then start_kubelet; exit; fi

machine "$name"
ip link add "v$i" netns "$(cat "$vm/cp/pid")" type veth peer name eth0 netns "$(cat "$vm/$name/pid")"
inside cp sh -c "ip link set v$i master nodes up; ip route replace 10.98.$i.0/24 via $ip; ip route replace 10.96.0.0/16 via $(node_ip 1)"
inside "$name" sh -c "ip addr add $ip/24 dev eth0; ip link set eth0 up; ip route add 10.96.0.0/16 dev eth0; sysctl -qw net.ipv4.ip_forward=1"
for j in $(seq "$nodes"); do
    [ "$j" = "$i" ] || inside "$name" ip route replace "10.98.$j.0/24" via "$(node_ip "$j")"
done

settings=$run/bindery-cluster
mkdir -p "$settings/cni"; : >"$settings/resolv.conf"
cat >"$settings/kubelet.yaml" <<CONF
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
failCgroupV1: false
cgroupDriver: cgroupfs
cgroupRoot: /bindery-$name
failSwapOn: false
enforceNodeAllocatable: []
containerRuntimeEndpoint: unix:///run/containerd/containerd.sock
resolvConf: /run/bindery-cluster/resolv.conf
clusterDNS: ["10.96.0.10"]
clusterDomain: cluster.local
volumePluginDir: /var/lib/kubelet/volume-plugins
tlsCertFile: $pki/kubelet-server$i.crt
tlsPrivateKeyFile: $pki/kubelet-server$i.key
authentication: {anonymous: {enabled: false}, webhook: {enabled: true, cacheTTL: 5s}, x509: {clientCAFile: $pki/ca.crt}}
authorization: {mode: Webhook}
evictionHard: {memory.available: 100Mi, nodefs.available: 1Gi, imagefs.available: 1Gi}
imageGCHighThresholdPercent: 100
nodeStatusUpdateFrequency: 1s
nodeStatusReportFrequency: 1m
nodeLeaseDurationSeconds: 8
maxPods: 60
CONF
cat >"$settings/containerd.toml" <<CONF
version = 2
root = "$vm/$name/containerd"
state = "/run/containerd/state"
[grpc]
  address = "/run/containerd/containerd.sock"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "localhost/pause:1"
  restrict_oom_score_adj = true
  disable_apparmor = true
  disable_hugetlb_controller = true
  tolerate_missing_hugetlb_controller = true
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
      SystemdCgroup = false
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "/run/bindery-cluster/cni"
CONF
cat >"$settings/cni/10-bridge.conflist" <<CONF
{"cniVersion": "1.0.0", "name": "pods", "plugins": [
  {"type": "bridge", "bridge": "pods", "isGateway": true, "isDefaultGateway": true, "hairpinMode": true, "ipMasq": false,
   "ipam": {"type": "host-local", "dataDir": "/run/cni-ipam", "ranges": [[{"subnet": "10.98.$i.0/24"}]]}},
  {"type": "portmap", "capabilities": {"portMappings": true}}]}
CONF
cat >"$settings/proxy.yaml" <<CONF
apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
mode: iptables
hostnameOverride: $name
clusterCIDR: 10.98.0.0/16
clientConnection: {kubeconfig: $pki/proxy.conf}
conntrack: {maxPerCore: 0, tcpEstablishedTimeout: 0s, tcpCloseWaitTimeout: 0s}
iptables: {minSyncPeriod: 100ms}
CONF

# Under cgroup v1 the node's root must be there in every hierarchy, and cpuset wants its values.
for hierarchy in cpu cpuacct cpuset memory devices freezer blkio pids systemd; do
    [ -d "/sys/fs/cgroup/$hierarchy" ] && mkdir -p "/sys/fs/cgroup/$hierarchy/bindery-$name"
done
if [ -d /sys/fs/cgroup/cpuset ]; then
    for value in cpus mems; do
        cat "/sys/fs/cgroup/cpuset/cpuset.$value" >"/sys/fs/cgroup/cpuset/bindery-$name/cpuset.$value"
    done
else
    mkdir -p "/sys/fs/cgroup/bindery-$name"
fi

start "$name" containerd containerd -c /run/bindery-cluster/containerd.toml
wait_for 20 "containerd of $name" inside "$name" ctr version
for image in "$state"/images/*.tar; do
    inside "$name" ctr -n k8s.io image import "$image" >>"$vm/$name/log/import.log" 2>&1
done
# The same programs under another name: what an upgrade goes to.
inside "$name" ctr -n k8s.io image tag --force localhost/bindery:dev localhost/bindery:next >>"$vm/$name/log/import.log" 2>&1
# Links, not copies: nobody writes into a model folder.
for model in "$state"/models/*; do
    ln -f "$model" "$vm/$name/var/lib/bindery-models/" 2>/dev/null || cp "$model" "$vm/$name/var/lib/bindery-models/"
done
start_kubelet
start "$name" proxy "$bin/kube-proxy" --config=/run/bindery-cluster/proxy.yaml --v=2
