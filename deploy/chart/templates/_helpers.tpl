{{/*
Each value that the chart of the existing driver does not have may be absent, which means its default:
`helm upgrade --reuse-values` renders these templates with the values of the old chart.
*/}}

{{- define "sscd.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{- define "sscd.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 63 | trimSuffix "-" -}}
{{- else if contains (include "sscd.name" .) .Release.Name -}}
{{- .Release.Name | trunc 63 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "sscd.name" .) | trunc 63 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{/* The labels of every object and of the pods. */}}
{{- define "sscd.labels" -}}
app.kubernetes.io/instance: {{ .Release.Name | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service | quote }}
app.kubernetes.io/name: {{ include "sscd.name" . | quote }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app: {{ include "sscd.name" . }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | quote }}
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* An image of a sidecar: repository, and digest or tag. */}}
{{- define "sscd.image" -}}
{{- if .digest -}}
{{ .repository }}@{{ .digest }}
{{- else -}}
{{ .repository }}:{{ .tag }}
{{- end -}}
{{- end -}}

{{/*
The driver's image. Values reused from the chart of the existing driver name that driver's image, which
does not fit these templates. An image from that driver's own registry is replaced. A copy in another
registry is refused, because the place of a copy of this driver's image is not known.
*/}}
{{- define "sscd.driverImage" -}}
{{- $ours := printf "secrets-store-csi:%s" .Chart.AppVersion -}}
{{- $image := .Values.linux.image -}}
{{- if has $image.repository (list "registry.k8s.io/csi-secrets-store/driver" "k8s.gcr.io/csi-secrets-store/driver") -}}
{{ $ours }}
{{- else if hasSuffix "csi-secrets-store/driver" $image.repository -}}
{{- fail (printf "linux.image.repository=%s is a copy of the existing driver's image, which this chart cannot run: copy %s to your registry and set linux.image.repository, linux.image.tag and linux.image.digest to that copy" $image.repository $ours) -}}
{{- else -}}
{{- include "sscd.image" (dict "repository" $image.repository "digest" $image.digest "tag" (default .Chart.AppVersion $image.tag)) -}}
{{- end -}}
{{- end -}}

{{/* external: three containers. builtin: one. */}}
{{- define "sscd.sidecars" -}}
{{ default "external" .Values.sidecars }}
{{- end -}}

{{/* The port of the metrics; empty when there are none. An address may have a host before it. */}}
{{- define "sscd.metricsPort" -}}
{{- $port := splitList ":" (toString .Values.linux.metricsAddr) | last -}}
{{- if ne $port "0" -}}{{ $port }}{{- end -}}
{{- end -}}

{{/*
"true" if kubelet passes service account tokens among the secrets of a request, else "false". A driver
older than 1.6 reads them only from the volume context, and its pods still run during an upgrade. So
`auto` keeps what the cluster's CSIDriver says, and uses the secrets only where no tokens were requested
before.
*/}}
{{- define "sscd.tokensInSecrets" -}}
{{- $wish := ternary .Values.tokenRequestsInSecrets "auto" (hasKey .Values "tokenRequestsInSecrets") | toString -}}
{{- $able := semverCompare ">=1.35.0-0" .Capabilities.KubeVersion.Version -}}
{{- if eq $wish "auto" -}}
{{- $live := dig "spec" (dict) (lookup "storage.k8s.io/v1" "CSIDriver" "" "secrets-store.csi.k8s.io" | default dict) -}}
{{- if $live.tokenRequests -}}
{{- default false $live.serviceAccountTokenInSecrets -}}
{{- else -}}
{{- $able -}}
{{- end -}}
{{- else if and (eq $wish "true") (not $able) -}}
{{- fail (printf "tokenRequestsInSecrets=true needs Kubernetes 1.35, and this is %s: write auto or false" .Capabilities.KubeVersion.Version) -}}
{{- else -}}
{{ $wish }}
{{- end -}}
{{- end -}}

{{/* The security context of a sidecar, which only uses a socket. */}}
{{- define "sscd.sidecarSecurityContext" -}}
allowPrivilegeEscalation: false
capabilities:
  drop:
    - ALL
readOnlyRootFilesystem: true
{{- end -}}

{{/* A container of the chart, merged with the fields of it in the values. */}}
{{- define "sscd.overlay" -}}
{{- toYaml (mustMergeOverwrite (fromYaml .base) (deepCopy (default dict .over))) -}}
{{- end -}}
