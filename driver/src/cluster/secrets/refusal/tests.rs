//! Tests what is said of refusals, also of texts that have content in the place of a name.

use super::*;
use crate::cluster::secrets::{error::SyncError, tests::quoted};
use proptest::prelude::*;
use rstest::rstest;

fn refused(code: u16, reason: &str, message: &str) -> Failure {
    Failure::Refused {
        code,
        reason: reason.to_owned(),
        message: message.to_owned(),
        object: "creds".to_owned(),
        namespace_ends: false,
    }
}

/// Describes a failure about a Secret with these values.
fn told(failure: &Failure, values: &[&str]) -> String {
    let values: Vec<Secret> = values.iter().map(|v| (*v).to_owned().into()).collect();
    let subject = Subject {
        namespace: "shop",
        name: "creds",
        values: values.iter().collect(),
    };
    describe(failure, Some(&subject))
}

const FORBIDDEN: &str = "secrets \"creds\" is forbidden: ";
const READ: &str = "kubectl create secret generic -n shop creds --from-literal=KEY=x --dry-run=server. Or ask those who run ";

#[rstest]
#[case::webhook(
    "admission webhook \"values.policy.example.com\" denied the request: hunter2 is weak",
    "admission webhook values.policy.example.com denied it, HTTP 422 Invalid",
    "the webhook"
)]
#[case::webhook_without_a_message(
    "admission webhook \"values.policy.example.com\" denied the request without explanation",
    "admission webhook values.policy.example.com denied it, HTTP 422 Invalid",
    "the webhook"
)]
#[case::webhook_that_is_away(
    "Internal error occurred: failed calling webhook \"values.policy.example.com\": failed to call webhook: Post \"https://hunter2\"",
    "admission webhook values.policy.example.com could not be called, HTTP 422 Invalid",
    "Look at the webhook's pods"
)]
#[case::policy(
    &format!("{FORBIDDEN}ValidatingAdmissionPolicy 'no.weak-ones' with binding 'all' denied request: hunter2"),
    "ValidatingAdmissionPolicy no.weak-ones with binding all denied it, HTTP 422 Invalid",
    "the policy"
)]
#[case::policy_without_a_binding(
    "secrets is forbidden: ValidatingAdmissionPolicy 'no-weak-ones' denied request: hunter2",
    "ValidatingAdmissionPolicy no-weak-ones denied it, HTTP 422 Invalid",
    "the policy"
)]
#[case::mutating_policy(
    "policy 'labels' with binding 'all' denied request: hunter2",
    "admission policy labels with binding all denied it, HTTP 422 Invalid",
    "the policy"
)]
#[case::quota(
    &format!("{FORBIDDEN}exceeded quota: few, requested: secrets=1, used: secrets=3, limited: secrets=3"),
    "ResourceQuota few is used up, HTTP 422 Invalid",
    "kubectl describe quota -n shop few"
)]
#[case::field(
    "Secret \"creds\" is invalid: metadata.labels: Invalid value: \"hunter2!\": a valid label must",
    "its field metadata.labels is not accepted, HTTP 422 Invalid",
    "entry of secretObjects"
)]
#[case::fields(
    "Secret \"creds\" is invalid: [data[hunter2]: Required value, data[tls.key]: Required value]",
    "its field data is not accepted, HTTP 422 Invalid",
    "entry of secretObjects"
)]
#[case::owners(
    "Secret \"creds\" is invalid: metadata.ownerReferences.uid: Invalid value: \"\": hunter2",
    "its field metadata.ownerReferences is not accepted, HTTP 422 Invalid",
    ""
)]
fn what_refuses_is_named_and_nothing_else(
    #[case] message: &str,
    #[case] begins: &str,
    #[case] help: &str,
) {
    let failure = refused(422, "Invalid", message);
    let said = told(&failure, &["hunter2", "b", "shop", "all-of-it"]);
    let rest = said.strip_prefix(begins);
    let ours = "; the rest of the message is not repeated because it may quote the content";
    assert!(rest.is_some_and(|rest| rest.starts_with(ours)), "{said}");
    assert!(said.ends_with(help), "{said}");
    assert!(!said.contains("hunter2"), "{said}");
    // Without knowledge of the values, no name is taken.
    let said = describe(&failure, None);
    let plain = "HTTP 422 Invalid; the message is not repeated because it may quote the content";
    assert_eq!(said, plain);
}

/// Texts that have content in the place of a name, or that the API server does not begin so.
#[rstest]
#[case::value_for_a_webhook("admission webhook \"hunter2.example\" denied the request: no")]
#[case::value_in_other_case("admission webhook \"a.sesame-open\" denied the request: no")]
#[case::value_for_a_webhook_that_is_away(
    "Internal error occurred: failed calling webhook \"hunter2.example\": no"
)]
#[case::value_for_a_policy(&format!("{FORBIDDEN}ValidatingAdmissionPolicy 'hunter2' with binding 'all' denied request: no"))]
#[case::value_for_a_binding(&format!("{FORBIDDEN}ValidatingAdmissionPolicy 'p' with binding 'hunter2' denied request: no"))]
#[case::value_for_a_quota(&format!("{FORBIDDEN}exceeded quota: hunter2, requested: secrets=1"))]
#[case::short_value(&format!("{FORBIDDEN}exceeded quota: pin, requested: secrets=1"))]
#[case::piece_of_a_value(&format!("{FORBIDDEN}exceeded quota: correct-horse, requested: secrets=1"))]
#[case::digits_of_a_value(&format!("{FORBIDDEN}exceeded quota: 68756e74657232, requested: secrets=1"))]
#[case::base64_of_a_value(&format!("{FORBIDDEN}exceeded quota: ahvudgvymg, requested: secrets=1"))]
#[case::base64_of_a_piece(&format!("{FORBIDDEN}exceeded quota: dw50zxiy, requested: secrets=1"))]
#[case::a_quote_in_the_name("admission webhook \"a.b\\\"c\" denied the request: no")]
#[case::a_line_break_in_the_name("admission webhook \"a.b\nc\" denied the request: no")]
#[case::words_in_the_name("admission webhook \"the value x.y\" denied the request: no")]
#[case::capitals_in_the_name("admission webhook \"Secr.et\" denied the request: no")]
#[case::no_domain("admission webhook \"value\" denied the request: no")]
#[case::too_long(&format!("admission webhook \"{}.x\" denied the request: no", "a".repeat(300)))]
#[case::long_binding(&format!("{FORBIDDEN}ValidatingAdmissionPolicy 'p' with binding '{}' denied request: no", "a".repeat(254)))]
#[case::two_bindings(&format!("{FORBIDDEN}ValidatingAdmissionPolicy 'p' with binding 'b' with binding 'c' denied request: no"))]
#[case::a_policy_with_words(&format!("{FORBIDDEN}ValidatingAdmissionPolicy 'it is x' denied request: no"))]
#[case::a_quota_without_an_end(&format!("{FORBIDDEN}exceeded quota: value"))]
#[case::other_words_before("said: admission webhook \"a.b\" denied the request: no")]
#[case::a_value_before(
    "secrets \"it is x\" is forbidden: exceeded quota: few, requested: secrets=1"
)]
#[case::a_field_of_no_secret("Secret \"creds\" is invalid: hunter2: Invalid value")]
#[case::a_field_that_goes_on("Secret \"creds\" is invalid: datahunter2: Invalid value")]
#[case::a_field_in_another_sentence("no: Secret \"creds\" is invalid: data: no")]
fn no_name_is_taken(#[case] message: &str) {
    let values = [
        "hunter2",
        "Sesame-Open\n",
        "pin",
        r#"{"p":"correct-horse"}"#,
    ];
    for code in [403, 422] {
        let said = told(&refused(code, "Forbidden", message), &values);
        let plain = format!(
            "HTTP {code} Forbidden; the message is not repeated because it may quote the content. To read it, try other content: {READ}the cluster"
        );
        assert_eq!(said, plain);
    }
}

#[test]
fn a_missing_permission_is_not_looked_for_with_those_of_others() {
    let message = format!(
        "{FORBIDDEN}User \"driver\" cannot patch resource \"secrets\" in API group \"\" in the namespace \"shop\""
    );
    let subject = Subject {
        namespace: "shop",
        name: "creds",
        values: Vec::new(),
    };
    let failure = refused(403, "Forbidden", &message);
    let said = SyncError::refused(failure, Some(&subject)).to_string();
    assert!(said.contains("syncSecret.enabled"), "{said}");
    assert!(!said.contains("kubectl create"), "{said}");
}

#[test]
fn a_reason_of_a_webhooks_own_is_not_repeated() {
    let said = told(&refused(418, "hunter2", "no"), &[]);
    let plain = "HTTP 418; the message is not repeated because it may quote the content";
    assert_eq!(said, plain);
}

/// The sentences of the API server, with a star in the place of a name.
const PLACES: [&str; 6] = [
    "",
    "admission webhook \"*\" denied the request: ",
    "admission webhook \"*.example\" denied the request: ",
    "secrets \"creds\" is forbidden: exceeded quota: *, requested: ",
    "secrets \"creds\" is forbidden: ValidatingAdmissionPolicy '*' with binding 'b' denied request: ",
    "policy 'p' with binding '*' denied request: ",
];

proptest! {
    /// Whatever a value is and however a message quotes it, in the place of a name too, no six
    /// bytes of it come through.
    #[test]
    fn no_piece_of_a_value_is_repeated(
        value in proptest::collection::vec(any::<u8>(), 6..60),
        how in 0..8_usize,
        around in "[ -~\\n]{0,40}",
        code in prop::sample::select(vec![400_u16, 401, 403, 404, 409, 413, 422, 429, 500, 503, 504]),
        in_reason in any::<bool>(),
        place in prop::sample::select(PLACES.to_vec()),
    ) {
        let quoted = quoted(&value, how);
        let secret = Secret::from(value);
        // The driver's own words, which a value might happen to contain.
        let subject = || Subject {
            namespace: "shop",
            name: "creds",
            values: vec![&secret],
        };
        let error = |failure| format!("{:?}", SyncError::refused(failure, Some(&subject())));
        let mut plain = error(refused(code, "", ""));
        for place in PLACES {
            plain += &error(refused(code, "", &place.replace('*', "a.b")));
        }
        let (reason, message) = if in_reason {
            (quoted.clone(), around)
        } else {
            let named = place.replace('*', &quoted);
            ("Invalid".to_owned(), format!("{named}{around}{quoted}{around}"))
        };
        let said = error(refused(code, &reason, &message));
        let pieces = quoted.as_bytes().windows(6);
        for piece in pieces.filter_map(|piece| std::str::from_utf8(piece).ok()) {
            let ours = plain.contains(piece) || "Invalid".contains(piece.trim());
            prop_assert!(ours || !said.contains(piece), "{piece:?} is in {said:?}");
        }
    }
}
