//! The name of a class's provider.

use super::{Findings, names::is_slip, yaml::Node};

/// Providers that are often used.
const KNOWN: [&str; 7] = [
    "azure", "vault", "openbao", "aws", "gcp", "conjur", "akeyless",
];

/// Checks the name of the provider, and returns it.
pub(super) fn check<'a>(spec: &'a Node, file: &mut Findings<'_>) -> &'a str {
    let Some(provider) = spec.get("provider") else {
        file.add(
            spec.line,
            "spec.provider is missing: the name of the provider, such as azure, vault, aws or gcp",
        );
        return "";
    };
    let name = provider.text().unwrap_or_default();
    let is_allowed = |c: char| c.is_ascii_alphanumeric() || "-_".contains(c);
    if name.is_empty() || name.len() > 30 || !name.chars().all(is_allowed) {
        file.add(
            provider.line,
            format!(
                "{name:?} is no name of a provider; it has 1 to 30 letters, digits, \"-\" or \"_\""
            ),
        );
    } else if KNOWN.contains(&name.to_lowercase().as_str()) && name.to_lowercase() != name {
        file.add(
            provider.line,
            format!(
                "the provider is called {}, in lower case",
                name.to_lowercase()
            ),
        );
    } else if let Some(known) = misspelt(name) {
        file.add(
            provider.line,
            format!("no provider of the name {name} is known; did you mean {known}?"),
        );
    }
    name
}

/// Returns the provider that is meant by a name, if it is most likely a slip of the finger. Anybody may write a
/// provider, so that a name which is only unknown is right.
fn misspelt(name: &str) -> Option<&'static str> {
    let mut known = KNOWN.into_iter();
    known.find(|known| is_slip(name, known))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slip_of_a_providers_name_is_no_other_provider() {
        for (name, known) in [
            ("valut", Some("vault")),
            ("vualt", Some("vault")),
            ("vaul", Some("vault")),
            ("vaults", Some("vault")),
            ("azuer", Some("azure")),
            ("azur", Some("azure")),
            ("open-bao", Some("openbao")),
            ("opanbao", Some("openbao")),
            ("conjurr", Some("conjur")),
            ("vault", None),
            ("vault2", None),
            ("vault-dev", None),
            ("gcs", None),
            ("aws2", None),
            ("oci", None),
            ("azurekeyvault", None),
            ("infisical", None),
        ] {
            assert_eq!(misspelt(name), known, "{name}");
        }
    }
}
