{{/*
Refuses values that this chart does not have, each with the key that was probably meant. The schema cannot
do this: Helm's own message about an unknown key names no other key. "sscd.known" has the keys.
*/}}
{{- define "sscd.checkValues" -}}
{{- $known := include "sscd.known" . | fromYaml -}}
{{- /* The full keys by their last part. Those without effect are nobody's intention. */ -}}
{{- $places := dict -}}
{{- range $object, $keys := $known -}}
{{- if ne $object "linux.crds" -}}
{{- if ne $object "linux.crds.image" -}}
{{- range $keys -}}
{{- $_ := set $places . (append (default list (get $places .)) (printf "%s.%s" $object . | trimPrefix ".")) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- $wrong := list -}}
{{- range $object, $keys := $known -}}
{{- $value := $.Values -}}
{{- range splitList "." $object -}}
{{- if . -}}
{{- if kindIs "map" $value -}}
{{- $value = get $value . -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if kindIs "map" $value -}}
{{- range $key := keys $value | sortAlpha -}}
{{- if not (has $key $keys) -}}
{{- $found := dict "object" $object "key" $key "value" (get $value $key) "keys" $keys "places" $places "root" $ -}}
{{- with include "sscd.hint" $found -}}
{{- $wrong = append $wrong . -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if $wrong -}}
{{- fail (printf "this chart does not have all of these values:\n  %s" (join "\n  " $wrong)) -}}
{{- end -}}
{{- include "sscd.checkNeeded" . -}}
{{- if include "sscd.on" .Values.linux.enabled -}}
{{- include "sscd.checkArguments" .Values.linux.driver.extraArgs -}}
{{- include "sscd.checkPods" . -}}
{{- end -}}
{{- end -}}

{{/* Refuses values with which the pods cannot start or nobody finds them. The plugin has the same (lint/values/pods.rs). */}}
{{- define "sscd.checkPods" -}}
{{- $linux := .Values.linux -}}
{{- $metrics := include "sscd.metricsPort" . -}}
{{- if and $metrics (eq (int $metrics) (int .Values.livenessProbe.port)) -}}
{{- fail (printf "livenessProbe.port and linux.metricsAddr have the same port, %s, which only one of them can have: write another one" $metrics) -}}
{{- end -}}
{{- $name := include "sscd.name" . -}}
{{- range $key, $labels := dict "commonLabels" .Values.commonLabels "linux.podLabels" $linux.podLabels -}}
{{- $app := toString (default $name ($labels).app) -}}
{{- if ne $app $name -}}
{{- fail (printf "%s.app=%s is not what the DaemonSet finds its pods by, app=%s: leave it out, or write another label" $key $app $name) -}}
{{- end -}}
{{- end -}}
{{- if regexMatch "/pods/*$" $linux.kubeletRootDir -}}
{{- fail (printf "linux.kubeletRootDir=%s is kubelet's directory of pods: write the directory above it, %s" $linux.kubeletRootDir (regexReplaceAll "/pods/*$" $linux.kubeletRootDir "")) -}}
{{- end -}}
{{- $resources := include "sscd.driverResources" . | fromYaml -}}
{{- $limit := (((($linux.driver).container).resources).limits).memory | default (($resources).limits).memory -}}
{{- with include "sscd.bytes" $limit -}}
{{- if lt (float64 .) 67108864.0 -}}
{{- $limit = ternary $limit . (kindIs "string" $limit) -}}
{{- fail (printf "the memory limit of the driver is %s, and it needs 64Mi or more: raise limits.memory in linux.driver.resources, or in linux.driver.builtinResources with sidecars=builtin (docs/chart.md, Memory)" $limit) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* A quantity of Kubernetes in bytes; empty if it is written in a way that is not known here. */}}
{{- define "sscd.bytes" -}}
{{- if kindIs "invalid" . -}}
{{- else if kindIs "string" . -}}
{{- $units := dict "" 1 "k" 1e3 "M" 1e6 "G" 1e9 "T" 1e12 "Ki" 1024 "Mi" 1048576 "Gi" 1073741824 "Ti" 1099511627776 -}}
{{- $number := regexFind "^[0-9]+([.][0-9]*)?" . -}}
{{- $unit := trimPrefix $number . -}}
{{- if and $number (hasKey $units $unit) -}}
{{- mulf (float64 $number) (float64 (get $units $unit)) | printf "%.0f" -}}
{{- end -}}
{{- else -}}
{{- float64 . | printf "%.0f" -}}
{{- end -}}
{{- end -}}

{{/* Refuses an argument of the driver that is no flag and no value of one: the driver would not start. */}}
{{- define "sscd.checkArguments" -}}
{{- $before := "" -}}
{{- range . -}}
{{- $isValue := and (hasPrefix "-" $before) (not (contains "=" $before)) -}}
{{- if not (or $isValue (hasPrefix "-" .)) -}}
{{- fail (printf "linux.driver.extraArgs has %q, which is neither a flag nor the value of the flag before it: write --flag=value" .) -}}
{{- end -}}
{{- $before = . -}}
{{- end -}}
{{- end -}}

{{/* Refuses a repository with a tag or a digest in it, because the chart adds one. A port has a slash behind it. */}}
{{- define "sscd.checkRepository" -}}
{{- if regexMatch "@|:[^/]*$" .repository -}}
{{- fail (printf "%s.repository=%s has a tag or a digest in it, and the chart adds one: write a tag in %s.tag, and a digest in %s.digest" .image .repository .image .image) -}}
{{- end -}}
{{- end -}}

{{/*
Refuses what the chart cannot do without and does not get, which Helm reports as a nil pointer or not at all.
A null in the values takes the chart's own value away.
*/}}
{{- define "sscd.checkNeeded" -}}
{{- $linux := .Values.linux | default dict -}}
{{- $needed := list "linux" "rbac" -}}
{{- $sidecars := list -}}
{{- if include "sscd.on" $linux.enabled -}}
{{- $needed = concat $needed (list "livenessProbe" "livenessProbe.port" "linux.driver" "linux.kubeletRootDir" "linux.providersDir" "linux.metricsAddr") -}}
{{- if eq (include "sscd.sidecars" .) "external" -}}
{{- $sidecars = list "linux.registrar" "linux.livenessProbe" -}}
{{- end -}}
{{- end -}}
{{- $missing := list -}}
{{- range $sidecars -}}
{{- $needed = append $needed . -}}
{{- $image := printf "%sImage" . -}}
{{- $found := get $linux (trimPrefix "linux." $image) -}}
{{- if not $found -}}
{{- $missing = append $missing $image -}}
{{- else if not $found.repository -}}
{{- $missing = append $missing (printf "%s.repository" $image) -}}
{{- else -}}
{{- include "sscd.checkRepository" (dict "image" $image "repository" $found.repository) -}}
{{- if not (or $found.tag $found.digest) -}}
{{- $missing = append $missing (printf "%s.tag" $image) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- range $full := $needed -}}
{{- $value := $.Values -}}
{{- $parent := true -}}
{{- range splitList "." $full -}}
{{- $parent = kindIs "map" $value -}}
{{- $value = ternary (index (ternary $value dict $parent) .) nil $parent -}}
{{- end -}}
{{- /* What is below something missing is not named as well. */ -}}
{{- if and $parent (kindIs "invalid" $value) -}}
{{- $missing = append $missing $full -}}
{{- end -}}
{{- end -}}
{{- if $missing -}}
{{- fail (printf "these values are null, empty or missing, and the chart cannot do without them: leave them out of your values to have the chart's own:\n  %s" (join "\n  " $missing)) -}}
{{- end -}}
{{- end -}}

{{/* The line about one unknown value, empty if the value is none of this chart's business. */}}
{{- define "sscd.hint" -}}
{{- $full := printf "%s.%s" .object .key | trimPrefix "." -}}
{{- /* Other charts have values of these names, and the names alone say too little. */ -}}
{{- $moved := dict
  "podMonitor.interval" "podMonitor.endpoint.interval"
  "podMonitor.scrapeTimeout" "podMonitor.endpoint.scrapeTimeout"
  "serviceMonitor.interval" "serviceMonitor.endpoint.interval"
  "serviceMonitor.scrapeTimeout" "serviceMonitor.endpoint.scrapeTimeout"
  "linux.hostNetwork" "linux.podSpec.hostNetwork"
  "linux.dnsPolicy" "linux.podSpec.dnsPolicy"
  "linux.securityContext" "linux.podSpec.securityContext or linux.driver.container.securityContext"
  "linux.extraVolumes" "linux.volumes"
  "linux.extraVolumeMounts" "linux.volumeMounts"
  "logLevel" "logVerbosity"
  "linux.logLevel" "logVerbosity"
  "enableRotation" "enableSecretRotation"
  "enabledSecretRotation" "enableSecretRotation"
  "installCRDs" "linux.crds.enabled, which has no effect, as Helm installs the CRDs"
-}}
{{- $name := splitList "." .key | last -}}
{{- $same := default list (get .places $name) -}}
{{- $similar := list -}}
{{- $here := list -}}
{{- $plain := lower $name | replace "-" "" | replace "_" "" -}}
{{- range $other, $places := .places -}}
{{- $plainOther := lower $other -}}
{{- /* A plural in the place of a singular is the most usual mistake. */ -}}
{{- $begins := or (eq ($plainOther | replace "s" "") ($plain | replace "s" "")) (and (hasPrefix $plainOther $plain) (ge (len $plainOther) 3)) (and (hasPrefix $plain $plainOther) (ge (len $plain) 4)) -}}
{{- if and $begins (ne $other $name) -}}
{{- if le (len $plainOther) (add 4 (len $plain) | int) -}}
{{- $similar = concat $similar $places -}}
{{- end -}}
{{- if has $other $.keys -}}
{{- $here = append $here (printf "%s.%s" $.object $other | trimPrefix ".") -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- $chart := .root.Chart -}}
{{- if and (not .object) (has .key (list "global" "enabled" "install" "filteredWatchSecret" "grpcSupportedProviders" "minimumProviderVersions")) -}}
{{- /* A parent chart gives global, and switches this chart on and off. Charts before 1.1 had the others. */ -}}
{{- else if and (not .object) (regexMatch "^(x-|_|[.])" .key) -}}
{{- /* By custom, these hold anchors and notes. */ -}}
{{- else if and (eq .key $chart.Name) (kindIs "map" .value) -}}
{{- $inner := list -}}
{{- range keys .value | sortAlpha -}}
{{- $write := ternary "leave it out" (printf "write %s" .) (has . (list "global" "enabled" "install" "filteredWatchSecret")) -}}
{{- $inner = append $inner (printf "%s.%s: %s" $full . $write) -}}
{{- end -}}
{{- printf "%s (that is for charts that this one is a part of)" (default (list (printf "%s: leave it out" $full)) $inner | join "\n  ") -}}
{{- else if and (ne $name .key) (or (has $full $same) (has .key $same)) -}}
{{- $meant := ternary .key $full (has .key $same) -}}
{{- printf "%q: the dot is part of this key's name; write %s as nested keys, %s" .key $meant (printf "%s: …%s" (replace "." ": {" $meant) (repeat (sub (len (splitList "." $meant)) 1 | int) "}")) -}}
{{- else if hasKey $moved $full -}}
{{- printf "%s: did you mean %s?" $full (get $moved $full) -}}
{{- else if and $same (ne $full "csiDriver.annotations") -}}
{{- printf "%s: did you mean %s?" $full (join " or " $same) -}}
{{- else if $here -}}
{{- printf "%s: did you mean %s?" $full (join " or " $here) -}}
{{- else if $similar -}}
{{- printf "%s: did you mean %s?" $full (uniq $similar | sortAlpha | join " or ") -}}
{{- else if and (not .object) (not $chart.IsRoot) (has (toString .value) (list "true" "false")) -}}
{{- /* The condition of a parent chart, under a name of its own. */ -}}
{{- else -}}
{{- printf "%s: %s has %s" $full (default "the top level" .object) (sortAlpha .keys | join ", ") -}}
{{- end -}}
{{- end -}}
