#!/usr/bin/env bash
# Tests of charts/weft that need no images: what it renders, what it refuses, and, when there is a
# cluster, what that makes of it. Nothing is installed but the CRDs, for a moment, and only where
# there are none yet. (Installing, upgrading and removing it is tested by tests/cluster.)
#
#   tests/chart.sh                   without a cluster
#   tests/chart.sh COMMAND…          COMMAND runs kubectl with a cluster: `env`, or `cluster run`
#
# Needs helm and Python 3 with PyYAML; kubernetes-validate and checkov are used when they are there.
set -euo pipefail
cd "$(dirname "$0")/.."
chart=charts/weft
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

fail() { echo "chart: $*" >&2; exit 1; }
render() { helm template weft "$chart" --namespace weft-system --kube-version 1.34.0 "$@"; }
everything=(
    --set tracing.otlp.endpoint=http://jaeger.tracing:4317 --set networkPolicy.enabled=true
    --set prometheus.monitors.enabled=true --set crds.keep=true --set injection.failurePolicy=Ignore
    --set certificates.caSecret=mine --set controlPlane.priorityClassName=system-cluster-critical
    --set 'capture.excludeInboundCidrs={10.0.5.0/24,fd05::/16}'
    --set 'capture.excludeOutboundPorts={3306,9000-9100}'
    --set 'capture.excludeOutboundCidrs={169.254.169.254/32}'
    --set 'injection.excludedNamespaces={cert-manager}'
    --set proxy.resources.limits.memory=128Mi --set 'imagePullSecrets[0].name=pull'
    --set "proxy.image.digest=sha256:$(printf 'a%.0s' {1..64})"
)

echo '--- lint, and what is rendered'
helm lint --strict --quiet "$chart" --namespace weft-system
render >"$work/default.yaml"
render "${everything[@]}" --api-versions monitoring.coreos.com/v1 >"$work/everything.yaml"
render --set injection.enabled=false --set crds.install=false \
    --set controlPlane.replicas=1 >"$work/least.yaml"

python3 - "$work" <<'PYTHON'
import sys, yaml
work = sys.argv[1]
def load(name):
    objects = [o for o in yaml.safe_load_all(open(f"{work}/{name}.yaml")) if o]
    return {(o["kind"], o["metadata"]["name"]): o for o in objects}
default, everything, least = load("default"), load("everything"), load("least")
kinds = lambda objects: {kind for kind, _ in objects}

assert {"PodDisruptionBudget", "MutatingWebhookConfiguration", "CustomResourceDefinition"} <= kinds(default)
assert not {"NetworkPolicy", "PodMonitor", "ServiceMonitor"} & kinds(default)
assert {"NetworkPolicy", "PodMonitor", "ServiceMonitor"} <= kinds(everything)
assert not {"PodDisruptionBudget", "MutatingWebhookConfiguration", "CustomResourceDefinition"} & kinds(least)

for objects in (default, everything, least):
    for (kind, name), found in objects.items():
        labels = found["metadata"].get("labels", {})
        assert labels.get("app.kubernetes.io/instance") == "weft", (kind, name)
    pod = objects["Deployment", "weft-control-plane"]["spec"]["template"]["spec"]
    container = pod["containers"][0]
    assert pod["securityContext"]["runAsNonRoot"] and container["securityContext"]["readOnlyRootFilesystem"]
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert "cpu" not in container["resources"].get("limits", {})
    for rule in objects["ClusterRole", "weft-control-plane"]["rules"]:
        assert "*" not in rule["verbs"] + rule["resources"] + rule["apiGroups"], rule
        # Secrets are the business of one Role, in one namespace.
        assert "secrets" not in rule["resources"], rule

hooks = {h["name"].split(".")[0]: h for h in default["MutatingWebhookConfiguration", "weft-injector"]["webhooks"]}
assert set(hooks) == {"namespace", "pod", "annotation"}
for name, hook in hooks.items():
    never = next(e for e in hook["namespaceSelector"]["matchExpressions"] if e["key"] == "kubernetes.io/metadata.name")
    assert never["operator"] == "NotIn" and {"kube-system", "weft-system"} <= set(never["values"]), hook
    assert hook["failurePolicy"] == "Fail" and hook["reinvocationPolicy"] == "IfNeeded"
    assert "caBundle" not in hook["clientConfig"], "an upgrade would take it away"
never = everything["MutatingWebhookConfiguration", "weft-injector"]["webhooks"][0]["namespaceSelector"]["matchExpressions"][0]
assert "cert-manager" in never["values"]

settings = yaml.safe_load(everything["ConfigMap", "weft-injector"]["data"]["settings.yaml"])
assert settings["proxy"]["image"].endswith("weft-proxy@sha256:" + 64 * "a")
assert settings["capture"]["excludeOutboundPorts"] == ["3306", "9000-9100"]
assert settings["tracing"]["otlpEndpoint"] == "http://jaeger.tracing:4317"
for (kind, _), found in everything.items():
    if kind == "CustomResourceDefinition":
        assert found["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
open(f"{work}/settings.yaml", "w").write(everything["ConfigMap", "weft-injector"]["data"]["settings.yaml"])
PYTHON

# The settings that the chart writes are those that the programs read.
if weft=${WEFT:-$(command -v "${CARGO_TARGET_DIR:-target}/debug/weft")}; then
    "$weft" inject -f control-plane/src/inject/golden/job.in.yaml --settings "$work/settings.yaml" \
        2>/dev/null | grep -q WEFT_OTLP_ENDPOINT || fail 'weft inject does not take the settings'
fi

echo '--- what is refused'
refused() {
    local expected=$1 said
    shift
    if said=$(helm template weft "$chart" --namespace weft-system "$@" 2>&1); then
        fail "not refused: $*"
    fi
    grep -qF -- "$expected" <<<"$said" || fail "$*: '$expected' is not in: $said"
}
refused "additional properties 'endpoin' not allowed" --set tracing.otlp.endpoin=http://x
refused "additional properties 'replicaCount' not allowed" --set replicaCount=3
refused "additional properties 'contolPlane' not allowed" --set contolPlane.replicas=3
refused "/injection/failurePolicy" --set injection.failurePolicy=Maybe
refused "/tracing/otlp/endpoint" --set tracing.otlp.endpoint=jaeger:4317
refused "/tracing/samplingPercent" --set tracing.samplingPercent=101
refused "/certificates/lifetime" --set certificates.lifetime=1d
refused "/proxy/image/digest" --set proxy.image.digest=latest
refused "/proxy/logLevel" --set proxy.logLevel=loud
refused "/controlPlane/replicas" --set controlPlane.replicas=0
refused "installed in the namespace weft-system" --namespace other

if command -v kubernetes-validate >/dev/null; then
    echo '--- kubernetes-validate'
    # It knows no custom kinds, and refuses what it does not know.
    render "${everything[@]}" --set prometheus.monitors.enabled=false --set crds.install=false >"$work/known.yaml"
    kubernetes-validate --version 1.34 --strict --quiet "$work/known.yaml"
fi
if command -v checkov >/dev/null; then
    echo '--- checkov'
    # 11: no CPU limit, which would throttle what all proxies wait for. 38: it speaks to the
    # apiserver. 43 and 15: digests are the user's to choose, and with tags that do not change
    # IfNotPresent is right. 155: the one webhook configuration it may change, by name, is its own.
    # 8 and 9: a pod that runs once needs no probes. CKV2 6: the NetworkPolicy is optional.
    # What it says on standard error is that it cannot call home.
    checkov --quiet --compact --framework kubernetes --file "$work/default.yaml" --skip-check \
        CKV_K8S_11,CKV_K8S_38,CKV_K8S_43,CKV_K8S_15,CKV_K8S_155,CKV_K8S_8,CKV_K8S_9,CKV2_K8S_6 \
        2>"$work/checkov.log" || { tail -20 "$work/checkov.log" >&2; fail checkov; }
fi

[ $# != 0 ] || exit 0
within=("$@")
kubectl() { "${within[@]}" kubectl "$@"; }
namespace=weft-chart-test

echo '--- what the apiserver says'
made=()
cleanup() {
    rm -rf "$work"
    [ ${#made[@]} = 0 ] || kubectl delete --ignore-not-found --wait=false "${made[@]}" >/dev/null
}
trap cleanup EXIT
for name in weft-system "$namespace"; do
    if kubectl create namespace "$name" >/dev/null 2>&1; then
        made+=("namespace/$name")
    fi
done
for crd in "$chart"/files/crds/*.yaml; do
    name=$(sed -n 's/^  name: //p' "$crd" | head -1)
    if ! kubectl get crd "$name" >/dev/null 2>&1; then
        kubectl create --save-config -f - <"$crd" >/dev/null
        made+=("crd/$name")
    fi
    kubectl wait --for=condition=Established --timeout=30s "crd/$name" >/dev/null
done
kubectl apply --dry-run=server -f - <"$work/default.yaml" >/dev/null
render "${everything[@]}" --set prometheus.monitors.enabled=false | kubectl apply --dry-run=server -f - >/dev/null

echo '--- the examples of the documentation'
awk '/^```yaml$/ { inside = 1; print "---"; next } /^```$/ { inside = 0 } inside' \
    docs/reference/policies.md >"$work/examples.yaml"
python3 - "$work/examples.yaml" "$namespace" >"$work/ours.yaml" <<'PYTHON'
import sys, yaml
kinds = {"TrafficPolicy", "PeerAuthentication", "Telemetry"}
found = [o for o in yaml.safe_load_all(open(sys.argv[1])) if o and o["kind"] in kinds]
assert {o["kind"] for o in found} == kinds and len(found) >= 6, len(found)
for number, policy in enumerate(found):
    # One by one, so that those of one name are all seen.
    policy["metadata"].update(namespace=sys.argv[2], name=f"{policy['metadata']['name']}-{number}")
yaml.safe_dump_all(found, sys.stdout)
PYTHON
kubectl create --dry-run=server -f - <"$work/ours.yaml"

echo '--- and what makes no sense'
nonsense() {
    local kind=$1 spec=$2 expected=$3 said
    if said=$(printf '{"apiVersion":"policy.weft.dev/v1alpha1","kind":"%s","metadata":{"name":"x","namespace":"%s"},"spec":%s}' \
        "$kind" "$namespace" "$spec" | kubectl create --dry-run=server -f - 2>&1); then
        fail "the apiserver takes $kind $spec"
    fi
    grep -qF -- "$expected" <<<"$said" || fail "$kind $spec: '$expected' is not in: $said"
}
nonsense TrafficPolicy '{"timeout":{}}' 'unknown field "spec.timeout"'
nonsense TrafficPolicy '{"timeouts":{"request":"5 seconds"}}' 'spec.timeouts.request'
nonsense TrafficPolicy '{"timeouts":{"request":"25h"}}' 'is longer than a day'
nonsense TrafficPolicy '{"timeouts":{"request":"1s","perTry":"2s"}}' 'perTry is longer than request'
nonsense TrafficPolicy '{"targetRefs":[{"kind":"Deployment","name":"a"}]}' 'Unsupported value: "Deployment"'
nonsense TrafficPolicy '{"targetRefs":[{"kind":"Service"}]}' 'spec.targetRefs[0].name: Required value'
nonsense TrafficPolicy '{"loadBalancer":{"algorithm":"Best"}}' 'Unsupported value: "Best"'
nonsense TrafficPolicy '{"loadBalancer":{"hashKey":{"header":"a","cookie":"b"}}}' 'spec.loadBalancer.hashKey'
nonsense TrafficPolicy '{"loadBalancer":{"hashKey":{"sourceAddress":false}}}' 'spec.loadBalancer.hashKey.sourceAddress'
nonsense TrafficPolicy '{"loadBalancer":{"panicThreshold":101}}' 'less than or equal to 100'
nonsense TrafficPolicy '{"circuitBreaker":{"fallback":{}}}' 'spec.circuitBreaker.fallback'
nonsense TrafficPolicy '{"circuitBreaker":{"fallback":{"response":{"status":100}}}}' 'greater than or equal to 200'
nonsense TrafficPolicy '{"circuitBreaker":{"fallback":{"response":{"status":200,"headers":[{"name":"Content-Length","value":"1"}]}}}}' "are the proxy's own"
nonsense TrafficPolicy '{"circuitBreaker":{"outlierDetection":{"interval":"0s"}}}' 'makes no sense'
nonsense TrafficPolicy '{"circuitBreaker":{"outlierDetection":{"baseEjectionTime":"2m","maxEjectionTime":"1m"}}}' 'longer than maxEjectionTime'
nonsense TrafficPolicy '{"retries":{"attempts":11}}' 'less than or equal to 10'
nonsense TrafficPolicy '{"retries":{"codes":[200]}}' 'greater than or equal to 400'
nonsense TrafficPolicy '{"retries":{"grpcCodes":["OK"]}}' 'Unsupported value: "OK"'
nonsense TrafficPolicy '{"retries":{"backoff":{"base":"1s","max":"1ms"}}}' 'base is longer than max'
nonsense PeerAuthentication '{"mtls":{"mode":"strict"}}' 'Unsupported value: "strict"'
nonsense PeerAuthentication '{"portLevelMtls":{"8080":{"mode":"STRICT"}}}' 'portLevelMtls needs a selector'
nonsense PeerAuthentication '{"selector":{"matchLabels":{"a":"b"}},"portLevelMtls":{"http":{"mode":"STRICT"}}}' 'every key is a port number'
nonsense Telemetry '{"tracing":{"samplingPercent":101}}' 'less than or equal to 100'
nonsense Telemetry '{"tracing":{"otlpEndpoint":"jaeger:4317"}}' 'spec.tracing.otlpEndpoint'
nonsense Telemetry '{"accessLog":{"mode":"all"}}' 'Unsupported value: "all"'
echo 'the chart is as it should be'
