#!/bin/sh
# `make cluster-up`: builds what is missing, starts the cluster, installs the chart, says what to try. install.sh STATE_FOLDER
set -eu
# Before anything is built.
[ "$(id -u)" = 0 ] || { echo "a cluster needs root: namespaces, mounts and cgroups are made" >&2; exit 1; }
here=$(cd "$(dirname "$0")" && pwd); root=$(cd "$here/../.." && pwd)
mkdir -p "$1"; state=$(cd "$1" && pwd); export state
bin=$(sh "$here/build.sh"); export bin
python=${PYTHON:-python3}
PROFILE=${PROFILE:-release}; export PROFILE
# Beside tests the libraries have the features that the tests want: what `make test` has built is used again.
targets=--bins; [ "$PROFILE" != dev ] || targets="--bins --tests"
# shellcheck disable=SC2086
(cd "$root" && cargo build --profile "$PROFILE" --locked --workspace $targets)
model=$("$python" "$root/tests/fetch_model.py")

if [ -e "$state/vm/cp/pid" ]; then sh "$here/down.sh" "$state"; fi
mkdir -p "$state/images" "$state/models"
ln -f "$model" "$state/models/" 2>/dev/null || cp "$model" "$state/models/"
[ -e "$state/models/small.gguf" ] || "$python" "$here/small_model.py" "$model" "$state/models/small.gguf" 2
image() { [ "$state/images/$1.tar" -nt "$2" ] || "$python" "$here/image.py" "$state/images/$1.tar" "localhost/$1:$3" --entrypoint "$4" "$2:$4"; }
image pause "$bin/pause" 1 /pause
image coredns "$bin/coredns" 1 /coredns
sh "$here/bindery_image.sh" "$state/images/bindery.tar" localhost/bindery:dev

begun=$(date +%s)
sh "$here/up.sh" "$state"

# program NAME WORDS...: a small program that enters the cluster's network.
program() {
    path=$state/$1; shift
    cat >"$path" <<SCRIPT
#!/bin/sh
exec nsenter -t "\$(cat '$state/vm/cp/pid')" --net --mount --pid --wd=. -- env KUBECONFIG='$state/pki/admin.conf' $* "\$@"
SCRIPT
    chmod +x "$path"
}
program kubectl "'$bin/kubectl'"
program helm "'$bin/helm'"
program in ""

"$state/helm" upgrade --install bindery "$root/charts/bindery" --namespace bindery-system --create-namespace \
    --set image.tag=dev --set cpuNodes.enabled=true --set cpuNodes.memory=4Gi --set cpuNodes.cpu=100m \
    --set gpuNodes.enabled=false ${HELM_ARGS:-} >"$state/helm.log"
"$state/kubectl" --namespace bindery-system rollout status deployment/bindery-operator --timeout=60s >/dev/null
echo "the operator is Ready $(($(date +%s) - begun)) s after the start"
"$state/kubectl" --namespace bindery-system rollout status daemonset/bindery-node-cpu --timeout=60s >/dev/null
short=$(realpath --relative-to="$PWD" "$state")
cat <<TRY

Try:
  $short/kubectl apply -f examples/smollm2.yaml
  $short/kubectl wait --for=condition=Ready imodel/smollm2 --timeout=60s
  $short/in curl -s http://\$($short/kubectl get service smollm2 -o 'jsonpath={.spec.clusterIP}')/v1/chat/completions -H 'Content-Type: application/json' -d '{"model": "smollm2", "messages": [{"role": "user", "content": "What is the capital of Germany?"}], "max_tokens": 32, "temperature": 0}'
Remove it with: make cluster-down
TRY
