{{/* The pod spec of the DaemonSet, before linux.podSpec is laid over it. */}}
{{- define "sscd.podSpec" -}}
{{- $linux := .Values.linux -}}
{{- $root := trimSuffix "/" $linux.kubeletRootDir -}}
serviceAccountName: secrets-store-csi-driver
automountServiceAccountToken: {{ ne (toString .Values.automountServiceAccountToken) "false" }}
{{- with .Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $linux.priorityClassName }}
priorityClassName: {{ . | quote }}
{{- end }}
securityContext:
  seccompProfile:
    type: RuntimeDefault
nodeSelector:
  kubernetes.io/os: linux
  {{- with $linux.nodeSelector }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- with $linux.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $linux.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
containers:
  {{- if eq (include "sscd.sidecars" .) "external" }}
  - {{ include "sscd.overlay" (dict "base" (include "sscd.registrar" .) "over" ($linux.registrar).container) | nindent 4 | trim }}
  {{- end }}
  - {{ include "sscd.overlay" (dict "base" (include "sscd.driver" .) "over" ($linux.driver).container) | nindent 4 | trim }}
  {{- if eq (include "sscd.sidecars" .) "external" }}
  - {{ include "sscd.overlay" (dict "base" (include "sscd.livenessProbe" .) "over" ($linux.livenessProbe).container) | nindent 4 | trim }}
  {{- end }}
volumes:
  - name: mountpoint-dir
    hostPath:
      path: {{ $root }}/pods
      type: DirectoryOrCreate
  - name: registration-dir
    hostPath:
      path: {{ $root }}/plugins_registry/
      type: Directory
  - name: plugin-dir
    hostPath:
      path: {{ $root }}/plugins/csi-secrets-store/
      type: DirectoryOrCreate
  - name: providers-dir
    hostPath:
      path: {{ $linux.providersDir }}
      type: DirectoryOrCreate
  {{- range $index, $dir := $linux.additionalProvidersDirs }}
  {{- if ne $dir $linux.providersDir }}
  - name: providers-dir-{{ $index }}
    hostPath:
      path: {{ $dir }}
      type: DirectoryOrCreate
  {{- end }}
  {{- end }}
  {{- with $linux.volumes }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end -}}

{{/* Tells kubelet where the driver's socket is. */}}
{{- define "sscd.registrar" -}}
{{- $linux := .Values.linux -}}
name: node-driver-registrar
image: {{ include "sscd.image" $linux.registrarImage | quote }}
imagePullPolicy: {{ $linux.registrarImage.pullPolicy }}
args:
  - --v={{ $linux.registrar.logVerbosity | int }}
  - --csi-address=/csi/csi.sock
  - --kubelet-registration-path={{ trimSuffix "/" $linux.kubeletRootDir }}/plugins/csi-secrets-store/csi.sock
  {{- with $linux.registrar.extraArgs }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- with $linux.registrar.resources }}
resources:
  {{- toYaml . | nindent 2 }}
{{- end }}
securityContext:
  {{- include "sscd.sidecarSecurityContext" . | nindent 2 }}
volumeMounts:
  - name: plugin-dir
    mountPath: /csi
  - name: registration-dir
    mountPath: /registration
{{- end -}}

{{/* The driver. With builtin sidecars it registers itself and answers kubelet's probe. */}}
{{- define "sscd.driver" -}}
{{- $linux := .Values.linux -}}
{{- $root := trimSuffix "/" $linux.kubeletRootDir -}}
{{- $builtin := eq (include "sscd.sidecars" .) "builtin" -}}
name: secrets-store
image: {{ include "sscd.driverImage" . | quote }}
imagePullPolicy: {{ ($linux.image).pullPolicy }}
args:
  {{- with .Values.logVerbosity }}
  - -v={{ . | int }}
  {{- end }}
  {{- if include "sscd.on" .Values.logFormatJSON }}
  - --log-format-json=true
  {{- end }}
  - --endpoint=$(CSI_ENDPOINT)
  - --nodeid=$(KUBE_NODE_NAME)
  - --provider-volume={{ $linux.providersDir }}
  - --additional-provider-volume-paths={{ $linux.additionalProvidersDirs | default list | join "," }}
  {{- if include "sscd.on" .Values.enableSecretRotation }}
  - --enable-secret-rotation=true
  {{- end }}
  {{- with .Values.rotationPollInterval }}
  - --rotation-poll-interval={{ . }}
  {{- end }}
  {{- with .Values.minRotationPollInterval }}
  - --min-rotation-poll-interval={{ . }}
  {{- end }}
  {{- if eq (toString .Values.republishErrors) "surface" }}
  - --republish-errors=surface
  {{- end }}
  {{- if eq (toString (.Values.syncSecret).errors) "fail" }}
  - --sync-errors=fail
  {{- end }}
  {{- with (.Values.syncSecret).interval }}
  - --sync-interval={{ . }}
  {{- end }}
  - --metrics-addr={{ $linux.metricsAddr }}
  {{- if include "sscd.on" .Values.providerHealthCheck }}
  - --provider-health-check=true
  {{- end }}
  {{- with .Values.providerHealthCheckInterval }}
  - --provider-health-check-interval={{ . }}
  {{- end }}
  {{- with .Values.maxCallRecvMsgSize }}
  - --max-call-recv-msg-size={{ . | int64 }}
  {{- end }}
  {{- with .Values.providerMaxCalls }}
  - --provider-max-calls={{ . | int64 }}
  {{- end }}
  {{- with .Values.providerMaxBytes }}
  - --provider-max-bytes={{ . | int64 }}
  {{- end }}
  {{- with .Values.providerUIDs }}
  - --provider-uids={{ . }}
  {{- end }}
  {{- if ne (toString $linux.driver.checkKubeletRootDir) "false" }}
  - --kubelet-root-dir={{ $root }}
  {{- end }}
  {{- if $builtin }}
  - --registration-dir=/registration
  - --kubelet-registration-path={{ $root }}/plugins/csi-secrets-store/csi.sock
  - --healthz-addr=:{{ .Values.livenessProbe.port | int }}
  {{- end }}
  {{- with $linux.driver.extraArgs }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
env:
  {{- with $linux.env }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
  - name: CSI_ENDPOINT
    value: unix:///csi/csi.sock
  - name: KUBE_NODE_NAME
    valueFrom:
      fieldRef:
        apiVersion: v1
        fieldPath: spec.nodeName
ports:
  - name: healthz
    containerPort: {{ .Values.livenessProbe.port | int }}
    protocol: TCP
  {{- with include "sscd.metricsPort" . }}
  - name: metrics
    containerPort: {{ . }}
    protocol: TCP
  {{- end }}
livenessProbe:
  httpGet:
    path: /healthz
    port: healthz
  initialDelaySeconds: 30
  timeoutSeconds: 10
  periodSeconds: 15
  failureThreshold: 5
{{- with include "sscd.driverResources" . }}
resources:
  {{- . | nindent 2 }}
{{- end }}
# Pods see the mounts through Bidirectional, which Kubernetes allows only to privileged containers.
securityContext:
  privileged: true
  readOnlyRootFilesystem: true
volumeMounts:
  - name: plugin-dir
    mountPath: /csi
  - name: mountpoint-dir
    mountPath: {{ $root }}/pods
    mountPropagation: Bidirectional
  - name: providers-dir
    mountPath: {{ $linux.providersDir }}
  {{- range $index, $dir := $linux.additionalProvidersDirs }}
  {{- if ne $dir $linux.providersDir }}
  - name: providers-dir-{{ $index }}
    mountPath: {{ $dir }}
  {{- end }}
  {{- end }}
  {{- if $builtin }}
  - name: registration-dir
    mountPath: /registration
  {{- end }}
  {{- with $linux.volumeMounts }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end -}}

{{/* Requests and limits of the driver; empty if there are none. */}}
{{- define "sscd.driverResources" -}}
{{- $driver := .Values.linux.driver -}}
{{- $wanted := $driver.resources -}}
{{- if eq (include "sscd.sidecars" .) "builtin" -}}
{{- /* Who has set resources for the container knows nothing of others for the same container. */ -}}
{{- $limits := dict "cpu" "200m" "memory" "200Mi" -}}
{{- $usual := dict "limits" $limits "requests" (dict "cpu" "50m" "memory" "100Mi") -}}
{{- $smaller := dict "limits" $limits "requests" (dict "cpu" "10m" "memory" "20Mi") -}}
{{- $builtin := default $smaller $driver.builtinResources -}}
{{- $isTheirs := and (eq (toJson $builtin) (toJson $smaller)) $wanted (ne (toJson $wanted) (toJson $usual)) -}}
{{- $wanted = ternary $wanted $builtin (not (empty $isTheirs)) -}}
{{- end -}}
{{- with $wanted -}}
{{- toYaml . -}}
{{- end -}}
{{- end -}}

{{/* Probes the driver, and answers kubelet's probe of it. */}}
{{- define "sscd.livenessProbe" -}}
{{- $linux := .Values.linux -}}
name: liveness-probe
image: {{ include "sscd.image" $linux.livenessProbeImage | quote }}
imagePullPolicy: {{ $linux.livenessProbeImage.pullPolicy }}
args:
  - --csi-address=/csi/csi.sock
  - --probe-timeout=3s
  - --http-endpoint=0.0.0.0:{{ .Values.livenessProbe.port | int }}
  - -v={{ .Values.livenessProbe.logLevel | int }}
  {{- with $linux.livenessProbe.extraArgs }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- with $linux.livenessProbe.resources }}
resources:
  {{- toYaml . | nindent 2 }}
{{- end }}
securityContext:
  {{- include "sscd.sidecarSecurityContext" . | nindent 2 }}
volumeMounts:
  - name: plugin-dir
    mountPath: /csi
{{- end -}}
