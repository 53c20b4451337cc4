//! Service account tokens: issued by the `token` subresource, and bound to their pod.
//!
//! A token has the form and claims of a JWT. Its signature is random: only this server can verify it,
//! because it remembers a digest of each token. Others ask for its review (`tokenreviews`).

use std::{collections::HashMap, sync::Mutex};

use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::lock;

use super::{
    body::{Target, items},
    field_error::FieldError,
    fields::time_text,
    objects::{random_uid, text},
    rbac::{Identity, service_account_groups},
    status::Status,
    store::Store,
};

/// The audience of the API server itself, and the issuer of every token.
pub(super) const ISSUER: &str = "https://kubernetes.default.svc.cluster.local";

/// The tokens that were issued and have not expired.
#[derive(Default)]
pub(super) struct Tokens {
    issued: Mutex<HashMap<[u8; 32], Grant>>,
}

struct Grant {
    namespace: String,
    account: String,
    account_uid: String,
    /// Name and uid.
    pod: Option<(String, String)>,
    audiences: Vec<String>,
    expires: Timestamp,
}

impl Tokens {
    /// Issues a token (`serviceaccounts/token`): returns the TokenRequest with its status.
    ///
    /// # Errors
    /// Returns 404 for an unknown account or pod, 409 for a pod that was replaced, 422 for a lifetime
    /// under ten minutes.
    pub(super) fn issue(
        &self,
        store: &Store,
        target: &Target,
        mut request: Value,
    ) -> Result<Value, Status> {
        let account = store
            .get("serviceaccounts", &target.namespace, &target.name)
            .ok_or_else(|| Status::not_found(&target.resource, &target.name))?;
        if !request["spec"].is_object() {
            return Err(Status::bad_request(
                "the body of a token request must be a TokenRequest",
            ));
        }
        let spec = &request["spec"];
        let mut audiences: Vec<String> = items(&spec["audiences"])
            .filter_map(|audience| audience.as_str().map(str::to_owned))
            .collect();
        if audiences.is_empty() {
            audiences.push(ISSUER.to_owned());
        }
        let seconds = lifetime(target, spec)?;
        let pod = bound_pod(store, target, &spec["boundObjectRef"])?;

        let now = Timestamp::now();
        let expires = now
            .checked_add(SignedDuration::from_secs(seconds))
            .map_err(|error| Status::internal(error.to_string()))?;
        let mut kubernetes = json!({
            "namespace": target.namespace,
            "serviceaccount": {"name": target.name, "uid": text(&account, "uid")},
        });
        if let Some((name, uid)) = &pod {
            kubernetes["pod"] = json!({"name": name, "uid": uid});
        }
        let claims = json!({
            "aud": audiences,
            "exp": expires.as_second(),
            "iat": now.as_second(),
            "nbf": now.as_second(),
            "iss": ISSUER,
            "jti": random_uid(),
            "sub": format!("system:serviceaccount:{}:{}", target.namespace, target.name),
            "kubernetes.io": kubernetes,
        });
        let token = sign(&claims);

        let mut issued = lock(&self.issued);
        issued.retain(|_, grant| grant.expires > now);
        issued.insert(
            digest(&token),
            Grant {
                namespace: target.namespace.clone(),
                account: target.name.clone(),
                account_uid: text(&account, "uid").to_owned(),
                pod,
                audiences: audiences.clone(),
                expires,
            },
        );
        drop(issued);

        request["kind"] = json!("TokenRequest");
        request["apiVersion"] = json!("authentication.k8s.io/v1");
        request["metadata"] = json!({"name": target.name, "namespace": target.namespace, "creationTimestamp": time_text(now)});
        request["spec"]["audiences"] = json!(audiences);
        request["spec"]["expirationSeconds"] = json!(seconds);
        request["status"] = json!({"token": token, "expirationTimestamp": time_text(expires)});
        Ok(request)
    }

    /// Returns the identity that a token proves.
    ///
    /// # Errors
    /// Returns 401 when it was not issued here, has expired, is for another audience, or its account
    /// or pod is gone.
    pub(super) fn identify(&self, store: &Store, token: &str) -> Result<Identity, Status> {
        let issued = lock(&self.issued);
        let grant = issued.get(&digest(token));
        let grant = grant.filter(|grant| grant.is_valid(store) && grant.is_for(ISSUER));
        let grant = grant.ok_or_else(Status::unauthorized)?;
        Ok(Identity::service_account(&grant.namespace, &grant.account))
    }

    /// Reviews a token (`tokenreviews`): returns the TokenReview with its status.
    ///
    /// # Errors
    /// Returns 400 where the review has no token.
    pub(super) fn review(&self, store: &Store, mut review: Value) -> Result<Value, Status> {
        let token = review["spec"]["token"].as_str().unwrap_or_default();
        if token.is_empty() {
            let why = "token is required for TokenReview in authentication";
            return Err(Status::bad_request(why));
        }
        let mut audiences: Vec<&str> = items(&review["spec"]["audiences"])
            .filter_map(Value::as_str)
            .collect();
        if audiences.is_empty() {
            audiences.push(ISSUER);
        }
        let issued = lock(&self.issued);
        let grant = issued.get(&digest(token));
        audiences.retain(|audience| grant.is_some_and(|grant| grant.is_for(audience)));
        let valid = grant.filter(|grant| grant.is_valid(store) && !audiences.is_empty());
        let status = match valid {
            Some(grant) => {
                json!({"authenticated": true, "user": grant.user(), "audiences": audiences})
            }
            None => json!({"user": {}, "error": "invalid bearer token"}),
        };
        drop(issued);
        review["kind"] = json!("TokenReview");
        review["apiVersion"] = json!("authentication.k8s.io/v1");
        review["metadata"] = json!({"creationTimestamp": null});
        review["status"] = status;
        Ok(review)
    }
}

impl Grant {
    fn is_for(&self, audience: &str) -> bool {
        self.audiences.iter().any(|one| one == audience)
    }

    /// Returns whether the token has not expired, and its account and its pod are still there.
    fn is_valid(&self, store: &Store) -> bool {
        let is_there = |resource: &str, name: &str, uid: &str| {
            let found = store.get(resource, &self.namespace, name);
            found.is_some_and(|object| text(&object, "uid") == uid)
        };
        let mut pod = self.pod.iter();
        self.expires > Timestamp::now()
            && is_there("serviceaccounts", &self.account, &self.account_uid)
            && pod.all(|(name, uid)| is_there("pods", name, uid))
    }

    /// Returns the user in the status of a TokenReview.
    fn user(&self) -> Value {
        let name = format!("system:serviceaccount:{}:{}", self.namespace, self.account);
        let groups = service_account_groups(&self.namespace);
        let mut user = json!({"username": name, "uid": self.account_uid, "groups": groups});
        if let Some((name, uid)) = &self.pod {
            user["extra"] = json!({
                "authentication.kubernetes.io/pod-name": [name],
                "authentication.kubernetes.io/pod-uid": [uid],
            });
        }
        user
    }
}

/// Returns the seconds for which a token is requested.
fn lifetime(target: &Target, spec: &Value) -> Result<i64, Status> {
    let seconds = spec["expirationSeconds"].as_i64().unwrap_or(3600);
    if seconds >= 600 {
        return Ok(seconds);
    }
    let why = "may not specify a duration less than 10 minutes";
    let error = FieldError::invalid("spec.expirationSeconds", &json!(seconds), why);
    let mut status = Status::invalid(&target.resource, &target.name, &[error]);
    let kind = "TokenRequest.authentication.k8s.io ";
    status.message = status.message.replacen("ServiceAccount ", kind, 1);
    Err(status)
}

fn sign(claims: &Value) -> String {
    let part = |value: &Value| BASE64_URL_SAFE_NO_PAD.encode(value.to_string());
    let signature: [u8; 32] = rand::random();
    format!(
        "{}.{}.{}",
        part(&json!({"alg": "RS256", "kid": "embedded"})),
        part(claims),
        BASE64_URL_SAFE_NO_PAD.encode(signature)
    )
}

fn bound_pod(
    store: &Store,
    target: &Target,
    reference: &Value,
) -> Result<Option<(String, String)>, Status> {
    if reference.is_null() {
        return Ok(None);
    }
    if reference["kind"] != "Pod" {
        return Err(Status::bad_request(format!(
            "cannot bind token to object of type {}: this server binds tokens to pods only",
            reference["kind"]
        )));
    }
    let name = reference["name"].as_str().unwrap_or_default();
    let Some(pods) = store.resource("pods") else {
        return Err(Status::no_such_resource());
    };
    let pod = store
        .get("pods", &target.namespace, name)
        .ok_or_else(|| Status::not_found(&pods, name))?;
    let uid = text(&pod, "uid");
    match reference["uid"].as_str() {
        Some(asked) if !asked.is_empty() && asked != uid => {
            let why = format!(
                "the UID in the bound object reference ({asked}) does not match the UID in record. \
                 The object might have been deleted and then recreated"
            );
            Err(Status::conflict(&pods, name, &why))
        }
        _ => Ok(Some((name.to_owned(), uid.to_owned()))),
    }
}

fn digest(token: &str) -> [u8; 32] {
    Sha256::digest(token).into()
}
