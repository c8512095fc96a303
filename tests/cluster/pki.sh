#!/bin/sh
# Certificates and kubeconfigs of a cluster, once: pki.sh FOLDER NODES.
set -eu
mkdir -p "$1"; cd "$1"
[ -e complete ] && exit 0

key() { openssl ecparam -name prime256v1 -genkey -noout -out "$1.key" 2>/dev/null; }
key ca
openssl req -x509 -new -key ca.key -subj /CN=bindery-test-ca -days 3650 -out ca.crt \
    -addext basicConstraints=critical,CA:TRUE -addext keyUsage=critical,keyCertSign,cRLSign

# certificate NAME SUBJECT EXTENSIONS
certificate() {
    key "$1"
    printf '%s\n' "$3" >"$1.ext"
    openssl req -new -key "$1.key" -subj "$2" -out "$1.csr"
    openssl x509 -req -in "$1.csr" -CA ca.crt -CAkey ca.key -CAcreateserial -days 3650 -out "$1.crt" -extfile "$1.ext" 2>/dev/null
    rm "$1.csr" "$1.ext"
}
client() { certificate "$1" "$2" "keyUsage=digitalSignature
extendedKeyUsage=clientAuth"; }
server() { certificate "$1" "$2" "keyUsage=digitalSignature
extendedKeyUsage=serverAuth
subjectAltName=$3"; }
# kubeconfig NAME
kubeconfig() {
    cat >"$1.conf" <<CONF
apiVersion: v1
kind: Config
clusters: [{name: bindery, cluster: {server: "https://10.99.0.1:6443", certificate-authority: $PWD/ca.crt}}]
users: [{name: $1, user: {client-certificate: $PWD/$1.crt, client-key: $PWD/$1.key}}]
contexts: [{name: bindery, context: {cluster: bindery, user: $1}}]
current-context: bindery
CONF
}

service=kubernetes.default.svc
server apiserver /CN=kube-apiserver \
    "DNS:kubernetes,DNS:kubernetes.default,DNS:$service,DNS:$service.cluster.local,DNS:localhost,IP:10.96.0.1,IP:10.99.0.1,IP:127.0.0.1"
client apiserver-kubelet /O=system:masters/CN=apiserver-kubelet-client
client front-proxy /CN=front-proxy-client
client admin /O=system:masters/CN=admin; kubeconfig admin
client controller-manager /CN=system:kube-controller-manager; kubeconfig controller-manager
client scheduler /CN=system:kube-scheduler; kubeconfig scheduler
client proxy /CN=system:kube-proxy; kubeconfig proxy
for i in $(seq "$2"); do
    client "kubelet$i" "/O=system:nodes/CN=system:node:node$i"; kubeconfig "kubelet$i"
    server "kubelet-server$i" "/O=system:nodes/CN=system:node:node$i" "DNS:node$i,IP:10.99.0.$((10 + i))"
done
openssl genrsa -out service-account.key 2048 2>/dev/null
openssl rsa -in service-account.key -pubout -out service-account.pub 2>/dev/null
touch complete
