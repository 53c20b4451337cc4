//! Paths that a provider must not send: they are refused, and nothing is written.

use rstest::rstest;

use crate::{
    harness::Scenario,
    objects::{class, pod},
};

#[rstest]
#[case::absolute("absolute", "- {badPath: /etc/passwd}")]
#[case::parent("parent", "- {badPath: ../escape}")]
#[case::parent_inside("parent_inside", "- {badPath: a/../../escape}")]
#[case::reserved("reserved", "- {badPath: ..data}")]
#[case::empty("empty", "- {badPath: ''}")]
#[case::not_clean("not_clean", "- {badPath: a//b}")]
#[case::nul("nul", r#"- {badPath: "a\0b"}"#)]
#[case::long_name("long_name", &format!("- {{badPath: {}}}", "n".repeat(256)))]
#[case::long_path("long_path", &format!("- {{badPath: {}x}}", "n/".repeat(2048)))]
#[case::twice("twice", "- {badPath: password}")]
#[case::file_and_directory("file_and_directory", "- {badPath: password/deeper}")]
#[tokio::test]
async fn bad_paths(#[case] name: &str, #[case] fault: &str) {
    let s = Scenario::start().await;
    let object = "- {objectName: password, content: hunter2}";
    s.apply(class("db", object).faults(fault)).await;
    s.apply(pod("web", &["db"])).await;
    insta::assert_snapshot!(
        format!("bad_path_{name}"),
        s.failed_mount("web", "rpc error").await
    );
    s.nothing_of_the_driver_is_left().await;
    assert!(s.pod_status_objects().await.is_empty());
    assert!(
        s.metric(
            "node_publish_error_total",
            &["error_type=\"FileWriteError\""]
        )
        .await
            >= 1.0
    );
    s.apply(class("db", object)).await;
    s.ready("web").await;
}
