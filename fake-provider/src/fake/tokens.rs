//! Service account tokens as objects show them: their audiences, claims and digests, never the
//! tokens.

use std::collections::BTreeMap;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::server::{Strings, TOKENS_KEY, Token};

/// Replaces each token by `<token>` and keeps the audiences, so that a test sees which ones arrived.
pub(super) fn without_tokens(strings: &Strings) -> Strings {
    let mut strings = strings.clone();
    if let Some(tokens) = strings.get_mut(TOKENS_KEY) {
        let hidden = audiences_of(tokens).map(|audiences| {
            let hidden: BTreeMap<_, _> = audiences
                .into_iter()
                .map(|name| (name, "<token>"))
                .collect();
            serde_json::json!(hidden).to_string()
        });
        *tokens = hidden.unwrap_or_else(|| "<token>".to_owned());
    }
    strings
}

/// Returns the audiences for which there are tokens, or `None` if `tokens` is not a JSON object.
pub(super) fn audiences_of(tokens: &str) -> Option<Vec<String>> {
    let tokens: BTreeMap<String, serde::de::IgnoredAny> = serde_json::from_str(tokens).ok()?;
    Some(tokens.into_keys().collect())
}

/// Returns the claims of each token by audience: whom it is for, and which pod and account it is
/// bound to. The signature is not checked.
///
/// # Errors
///
/// A sentence if a token is not a JWT.
pub(super) fn claims(tokens: &BTreeMap<String, Token>) -> Result<BTreeMap<String, Value>, String> {
    let mut all = BTreeMap::new();
    for (audience, token) in tokens {
        let payload = token.reveal().split('.').nth(1).unwrap_or_default();
        let claims: Option<Value> = URL_SAFE_NO_PAD
            .decode(payload)
            .ok()
            .and_then(|json| serde_json::from_slice(&json).ok());
        let claims = claims.ok_or_else(|| format!("the token for {audience:?} is not a JWT"))?;
        let bound = &claims["kubernetes.io"];
        let seconds = |name: &str| claims[name].as_i64().unwrap_or_default();
        let shown = json!({
            "audiences": claims["aud"],
            "namespace": bound["namespace"],
            "pod": bound["pod"]["name"],
            "serviceAccount": bound["serviceaccount"]["name"],
            "secondsToLive": seconds("exp") - seconds("iat"),
        });
        all.insert(audience.clone(), shown);
    }
    Ok(all)
}

/// Returns a digest of each token by audience, which changes when a token is renewed.
pub(super) fn digests(tokens: &BTreeMap<String, Token>) -> BTreeMap<&str, String> {
    let digest = |token: &Token| {
        let digest = Sha256::digest(token.reveal());
        digest
            .iter()
            .take(6)
            .map(|byte| format!("{byte:02x}"))
            .collect()
    };
    tokens
        .iter()
        .map(|(audience, token)| (audience.as_str(), digest(token)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn claims_and_digests_show_whose_a_token_is_and_never_the_token() {
        let payload = json!({
            "aud": ["vault"], "iat": 100, "exp": 700,
            "kubernetes.io": {"namespace": "shop", "pod": {"name": "web"}, "serviceaccount": {"name": "default"}},
        });
        let payload = URL_SAFE_NO_PAD.encode(payload.to_string());
        let tokens =
            json!({"vault": {"token": format!("e30.{payload}.c2ln"), "expirationTimestamp": "x"}});
        let tokens: BTreeMap<String, Token> = serde_json::from_value(tokens).unwrap();
        let claims = claims(&tokens).unwrap();
        let expected = json!({
            "audiences": ["vault"], "namespace": "shop", "pod": "web",
            "serviceAccount": "default", "secondsToLive": 600,
        });
        assert_eq!(claims["vault"], expected);
        assert_eq!(digests(&tokens)["vault"].len(), 12);
        assert!(super::claims(&BTreeMap::new()).unwrap().is_empty());
        let garbled = json!({"vault": {"token": "hunter2"}});
        let garbled = serde_json::from_value(garbled).unwrap();
        assert!(!super::claims(&garbled).unwrap_err().contains("hunter2"));
    }
}
