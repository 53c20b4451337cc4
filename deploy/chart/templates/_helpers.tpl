{{/*
A value that the chart of the existing driver does not have is read so that its absence means its
default: `helm upgrade --reuse-values` renders these templates with the values of the old chart.
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
The driver's image. Values reused from the chart of the existing driver name the image of that
driver, which does not fit these templates: where it comes from that driver's own registry it is
replaced, and where it is somebody's copy of it we cannot know where a copy of ours would be.
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
Whether kubelet hands service account tokens over among the secrets of a request, "true" or
"false". A driver older than 1.6 looks for them in the volume context only, and its pods are still
there while an upgrade rolls out. So `auto` never moves the tokens of a cluster that has them: it
keeps what the cluster says, and moves only where no tokens were asked for before.
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

{{/* What a sidecar may do: talk to a socket. */}}
{{- define "sscd.sidecarSecurityContext" -}}
allowPrivilegeEscalation: false
capabilities:
  drop:
    - ALL
readOnlyRootFilesystem: true
{{- end -}}

{{/* A container as the chart has it, with what the values say of it laid over it. */}}
{{- define "sscd.overlay" -}}
{{- toYaml (mustMergeOverwrite (fromYaml .base) (deepCopy (default dict .over))) -}}
{{- end -}}
