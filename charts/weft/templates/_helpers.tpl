{{/* The name of everything of the control plane; others depend on it. */}}
{{- define "weft.name" -}}
weft-control-plane
{{- end }}

{{- define "weft.selector" -}}
app.kubernetes.io/name: weft-control-plane
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "weft.labels" -}}
{{ include "weft.selector" . }}
app.kubernetes.io/part-of: weft
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{/* An image: dict "image" .Values.x.image "chart" .Chart */}}
{{- define "weft.image" -}}
{{- if .image.digest -}}
{{ .image.repository }}@{{ .image.digest }}
{{- else -}}
{{ .image.repository }}:{{ .image.tag | default .chart.AppVersion }}
{{- end -}}
{{- end }}

{{/* What the code and the identities are made for. */}}
{{- define "weft.check" -}}
{{- if ne .Release.Namespace "weft-system" }}
{{- fail (printf "Weft is installed in the namespace weft-system, not in %s: helm install weft … --namespace weft-system --create-namespace" .Release.Namespace) }}
{{- end }}
{{- end }}

{{- define "weft.injectorSettings" -}}
proxy:
  image: {{ include "weft.image" (dict "image" .Values.proxy.image "chart" .Chart) | quote }}
  imagePullPolicy: {{ .Values.proxy.image.pullPolicy }}
  logLevel: {{ .Values.proxy.logLevel | quote }}
  drainSeconds: {{ .Values.proxy.drainSeconds | int64 }}
  resources:
    requests: {{- toYaml (.Values.proxy.resources.requests | default dict) | nindent 6 }}
    limits: {{- toYaml (.Values.proxy.resources.limits | default dict) | nindent 6 }}
controlPlane: {{ include "weft.name" . }}.{{ .Release.Namespace }}.svc:15010
trustDomain: {{ .Values.trustDomain | quote }}
systemNamespace: {{ .Release.Namespace }}
capture:
  excludeInboundPorts: {{- range .Values.capture.excludeInboundPorts }}
    - {{ . | toString | quote }}
  {{- else }} []
  {{- end }}
  excludeInboundCidrs: {{- range .Values.capture.excludeInboundCidrs }}
    - {{ . | quote }}
  {{- else }} []
  {{- end }}
  excludeOutboundPorts: {{- range .Values.capture.excludeOutboundPorts }}
    - {{ . | toString | quote }}
  {{- else }} []
  {{- end }}
  excludeOutboundCidrs: {{- range .Values.capture.excludeOutboundCidrs }}
    - {{ . | quote }}
  {{- else }} []
  {{- end }}
tracing:
  otlpEndpoint: {{ .Values.tracing.otlp.endpoint | quote }}
prometheus:
  annotations: {{ .Values.prometheus.podAnnotations }}
{{- end }}
