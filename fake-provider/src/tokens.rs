//! The service account tokens that a pod's calls bring: who they are for, never what they are.

use std::collections::BTreeMap;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::Deserialize;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::objects::Strings;

/// The attribute, or secret, in which a pod's service account tokens arrive: JSON, audience
/// to token. Source: <https://kubernetes-csi.github.io/docs/token-requests.html>.
pub(crate) const TOKENS_KEY: &str = "csi.storage.k8s.io/serviceAccount.tokens";

/// A token as kubelet hands it over.
#[derive(Deserialize)]
struct Token {
    token: String,
}

/// Keeps the audiences, whose presence a test wants to see, and hides the tokens.
pub(crate) fn without_tokens(strings: &Strings) -> Strings {
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

/// The audiences for which there are tokens; `None` if it is no JSON object.
pub(crate) fn audiences_of(tokens: &str) -> Option<Vec<String>> {
    let tokens: BTreeMap<String, serde::de::IgnoredAny> = serde_json::from_str(tokens).ok()?;
    Some(tokens.into_keys().collect())
}

/// What each token says of itself, by audience: for whom it is, and to what it is bound. Whether
/// it is genuine only the API server knows.
///
/// # Errors
///
/// A sentence if a token is no JWT.
pub(crate) fn claims(attributes: &Strings) -> Result<BTreeMap<String, Value>, String> {
    let mut all = BTreeMap::new();
    for (audience, Token { token }) in tokens(attributes)? {
        let payload = token.split('.').nth(1).unwrap_or_default();
        let claims: Option<Value> = URL_SAFE_NO_PAD
            .decode(payload)
            .ok()
            .and_then(|json| serde_json::from_slice(&json).ok());
        let claims = claims.ok_or_else(|| format!("the token for {audience:?} is no JWT"))?;
        let bound = &claims["kubernetes.io"];
        let seconds = |name: &str| claims[name].as_i64().unwrap_or_default();
        let shown = json!({
            "audiences": claims["aud"],
            "namespace": bound["namespace"],
            "pod": bound["pod"]["name"],
            "serviceAccount": bound["serviceaccount"]["name"],
            "secondsToLive": seconds("exp") - seconds("iat"),
        });
        all.insert(audience, shown);
    }
    Ok(all)
}

/// A digest of each token, by audience, so that a renewal shows.
///
/// # Errors
///
/// A sentence if what came are no tokens.
pub(crate) fn digests(attributes: &Strings) -> Result<BTreeMap<String, String>, String> {
    let digest = |Token { token }| {
        let digest = Sha256::digest(token);
        digest
            .iter()
            .take(6)
            .map(|byte| format!("{byte:02x}"))
            .collect()
    };
    let tokens = tokens(attributes)?.into_iter();
    Ok(tokens
        .map(|(audience, token)| (audience, digest(token)))
        .collect())
}

fn tokens(attributes: &Strings) -> Result<BTreeMap<String, Token>, String> {
    let Some(tokens) = attributes.get(TOKENS_KEY) else {
        return Ok(BTreeMap::new());
    };
    // The parser's own words quote the input.
    serde_json::from_str(tokens)
        .map_err(|_| "the service account tokens are not what kubelet sends".to_owned())
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
        let attributes = Strings::from([(TOKENS_KEY.to_owned(), tokens.to_string())]);
        let claims = claims(&attributes).unwrap();
        let expected = json!({
            "audiences": ["vault"], "namespace": "shop", "pod": "web",
            "serviceAccount": "default", "secondsToLive": 600,
        });
        assert_eq!(claims["vault"], expected);
        let digests = digests(&attributes).unwrap();
        assert_eq!(digests["vault"].len(), 12);
        assert!(super::claims(&Strings::new()).unwrap().is_empty());
        let garbled = Strings::from([(TOKENS_KEY.to_owned(), "hunter2".to_owned())]);
        assert!(!super::claims(&garbled).unwrap_err().contains("hunter2"));
    }
}
