//! The parameters of the providers, and the fields of their objects, as their sources read them.

use super::{Findings, names::slip, yaml::Node};

/// What a provider reads.
pub(super) struct Keys {
    parameters: &'static [&'static str],
    object: &'static [&'static str],
    /// Whether the fields of an object are read in any case: AWS reads them as Go's JSON.
    pub(super) any_case: bool,
    /// The types of objects, if they have one.
    types: &'static [&'static str],
}

// internal/config/config.go of vault-csi-provider 1.7.4.
const VAULT: Keys = Keys {
    parameters: &[
        "objects",
        "roleName",
        "vaultAddress",
        "vaultNamespace",
        "vaultCACertPath",
        "vaultCADirectory",
        "vaultTLSServerName",
        "vaultTLSClientCertPath",
        "vaultTLSClientKeyPath",
        "vaultKubernetesMountPath",
        "vaultAuthMountPath",
        "vaultSkipTLSVerify",
        "audience",
    ],
    object: &[
        "objectName",
        "secretPath",
        "secretKey",
        "method",
        "secretArgs",
        "filePermission",
        "encoding",
    ],
    any_case: false,
    types: &[],
};

// internal/config/config.go of openbao-csi-provider 2.0.2: each with one of three prefixes, see PREFIXES.
const OPENBAO: Keys = Keys {
    parameters: &["objects", "roleName", "audience"],
    object: VAULT.object,
    any_case: false,
    types: &[],
};

const PREFIXES: [&str; 3] = ["bao", "openbao", "vault"];
const PREFIXED: [&str; 11] = [
    "RoleName",
    "Address",
    "Namespace",
    "CACertPath",
    "CADirectory",
    "TLSServerName",
    "TLSClientCertPath",
    "TLSClientKeyPath",
    "KubernetesMountPath",
    "AuthMountPath",
    "SkipTLSVerify",
];

// pkg/provider/types of the Azure provider 1.8.2; it reads both tenantID and tenantId.
const AZURE: Keys = Keys {
    parameters: &[
        "objects",
        "keyvaultName",
        "cloudName",
        "usePodIdentity",
        "useVMManagedIdentity",
        "userAssignedIdentityID",
        "tenantID",
        "tenantId",
        "cloudEnvFileName",
        "clientID",
        "useAzureTokenProxy",
    ],
    object: &[
        "objectName",
        "objectAlias",
        "objectVersion",
        "objectVersionHistory",
        "objectType",
        "objectFormat",
        "objectEncoding",
        "filePermission",
    ],
    any_case: false,
    types: &["secret", "key", "cert"],
};

// server/server.go and provider/secret_descriptor.go of the AWS provider 3.1.1.
const AWS: Keys = Keys {
    parameters: &[
        "objects",
        "region",
        "pathTranslation",
        "failoverRegion",
        "usePodIdentity",
        "preferredAddressType",
    ],
    object: &[
        "objectName",
        "objectAlias",
        "objectVersion",
        "objectVersionLabel",
        "objectType",
        "filePermission",
        "jmesPath",
        "failoverObject",
    ],
    any_case: true,
    types: &["secretsmanager", "ssmparameter"],
};

// config/config.go of the Google provider 1.15.0.
const GCP: Keys = Keys {
    parameters: &["secrets", "auth"],
    object: &[
        "resourceName",
        "fileName",
        "path",
        "extractJSONKey",
        "extractYAMLKey",
        "mode",
    ],
    any_case: false,
    types: &[],
};

/// Returns what a provider reads, if its source has been looked at.
pub(super) fn of(provider: &str) -> Option<&'static Keys> {
    match provider {
        "vault" => Some(&VAULT),
        "openbao" => Some(&OPENBAO),
        "azure" => Some(&AZURE),
        "aws" => Some(&AWS),
        "gcp" => Some(&GCP),
        _ => None,
    }
}

/// Checks the names of parameters. Returns whether one of them is likely the one that lists the objects.
pub(super) fn check_parameters(
    parameters: &Node,
    provider: &str,
    keys: &Keys,
    file: &mut Findings<'_>,
) -> bool {
    let prefixed: Vec<String> = match provider {
        "openbao" => PREFIXES
            .iter()
            .flat_map(|prefix| PREFIXED.map(|name| format!("{prefix}{name}")))
            .collect(),
        _ => Vec::new(),
    };
    let known = keys.parameters.iter().copied();
    let known: Vec<&str> = known.chain(prefixed.iter().map(String::as_str)).collect();
    let mut lists_objects = false;
    for (key, _) in parameters.fields() {
        if known.contains(&key.text.as_str()) {
            continue;
        }
        if let Some(name) = slip(&key.text, &known) {
            lists_objects |= ["objects", "secrets"].contains(&name);
            file.add(
                key.line,
                format!(
                    "`{}` is not a parameter of {provider}; `{name}` is meant",
                    key.text
                ),
            );
        }
    }
    lists_objects
}

/// Checks the names of an object's fields, and its type. `before` is the number of lines before those that
/// the fields have.
pub(super) fn check_object(
    object: &Node,
    before: usize,
    provider: &str,
    keys: &Keys,
    file: &mut Findings<'_>,
) {
    for (key, value) in object.fields() {
        let text = key.text.as_str();
        let is_known =
            |name: &&str| text == *name || keys.any_case && text.eq_ignore_ascii_case(name);
        if let Some(name) = keys.object.iter().find(|name| is_known(name)) {
            if *name == "objectType" {
                check_type(value, before, provider, keys.types, file);
            }
        } else if let Some(name) = slip(text, keys.object) {
            file.add(
                before + key.line,
                format!("`{text}` is not a key of an object of {provider}; `{name}` is meant"),
            );
        }
    }
}

fn check_type(
    value: &Node,
    before: usize,
    provider: &str,
    types: &[&str],
    file: &mut Findings<'_>,
) {
    let Some(text) = value.text().map(str::trim) else {
        return;
    };
    // A placeholder is not known here; an empty text is as none.
    if text.is_empty() || text.contains(['$', '{']) || types.is_empty() || types.contains(&text) {
        return;
    }
    let meant = slip(text, types).map_or_else(String::new, |name| format!("; {name} is meant"));
    let (last, others) = types.split_last().unwrap_or((&"", &[]));
    file.add(
        before + value.line,
        format!(
            "objectType of {provider} is {} or {last}, not {text:?}{meant}",
            others.join(", ")
        ),
    );
}
