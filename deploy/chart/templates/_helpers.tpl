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

{{/* "true" if a switch is on, else empty. Charts without a schema took the words for it in quotes, too. */}}
{{- define "sscd.on" -}}
{{- if eq (toString .) "true" -}}true{{- end -}}
{{- end -}}

{{/*
The driver's image. Values reused from the chart of the existing driver name that driver's image, which
does not fit these templates. An image from that driver's own registries is replaced. A copy in another
registry is refused, because the place of a copy of this driver's image is not known. So is a name without
a registry, because no node can pull it.
*/}}
{{- define "sscd.driverImage" -}}
{{- $image := default dict .Values.linux.image -}}
{{- $repository := default .Chart.Annotations.driverImage $image.repository -}}
{{- $ours := dict "repository" $repository "digest" $image.digest "tag" (default .Chart.AppVersion $image.tag) -}}
{{- $named := printf "linux.image.repository=%s" $repository -}}
{{- if has $repository (list "registry.k8s.io/csi-secrets-store/driver" "k8s.gcr.io/csi-secrets-store/driver" "us.gcr.io/k8s-artifacts-prod/csi-secrets-store/driver") -}}
{{- $ours = dict "repository" .Chart.Annotations.driverImage "tag" .Chart.AppVersion -}}
{{- else if or (regexMatch "(^|[-_./])secrets?-store[-_./](csi[-_])?driver([-_](fips|rhel[0-9]*|linux|amd64|arm64))*([:@].*)?$" (lower $repository)) (regexMatch "(^|/)deislabs/secrets-store-csi([:@].*)?$" $repository) -}}
{{- fail (printf "%s is a copy of the existing driver's image, which this chart cannot run: copy %s:%s to your registry, under a name that ends in secrets-store-csi, and set linux.image.repository, linux.image.tag and linux.image.digest to that copy" $named .Chart.Annotations.driverImage .Chart.AppVersion) -}}
{{- end -}}
{{- include "sscd.checkRepository" (dict "image" "linux.image" "repository" $repository) -}}
{{- if and (regexMatch "^v(0[.]0|1[.][0-6])[.][0-9]+" (toString $ours.tag)) (not $ours.digest) -}}
{{- fail (printf "linux.image.tag=%s is a version of the existing driver, which this chart cannot run: set linux.image.repository and linux.image.tag to your copy of %s:%s; without linux.image.tag, it is %s" $ours.tag .Chart.Annotations.driverImage .Chart.AppVersion .Chart.AppVersion) -}}
{{- end -}}
{{- $parts := splitList "/" $ours.repository -}}
{{- $registry := and (gt (len $parts) 1) (or (regexMatch "[.:]" (first $parts)) (eq (first $parts) "localhost")) -}}
{{- if not (or $registry (eq $image.pullPolicy "Never")) -}}
{{- fail (printf "the driver's image would be %s, which names no registry to pull it from: push the image to your registry and set linux.image.repository=REGISTRY/secrets-store-csi (Docker Hub is docker.io/NAME) and linux.image.tag; or, if you have loaded it on every node by hand, set linux.image.pullPolicy=Never" (include "sscd.image" $ours)) -}}
{{- end -}}
{{- include "sscd.image" $ours -}}
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

{{/* The endpoint of a monitor. The name of the node is what somebody who is paged looks for. */}}
{{- define "sscd.endpoint" -}}
{{- $node := dict "sourceLabels" (list "__meta_kubernetes_pod_node_name") "targetLabel" "node" -}}
{{- toYaml (merge (deepCopy (default dict .)) (dict "port" "metrics" "relabelings" (list $node))) -}}
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
