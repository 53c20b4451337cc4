//! Tests of authorisation and disturbances.

use kube::config::{KubeConfigOptions, Kubeconfig};

use super::*;

#[tokio::test]
async fn service_accounts_may_do_what_roles_say() {
    let setup = Setup::new().await;
    setup.define_classes().await;
    let rules = json!([
        {"apiGroups": [""], "resources": ["pods"], "verbs": ["get"]},
        {"apiGroups": ["storage.k8s.io"], "resources": ["csidrivers"], "verbs": ["list"],
            "resourceNames": ["secrets-store.csi.k8s.io"]},
    ]);
    setup.allow("driver", rules).await;
    let client = setup.pod_client("driver").await;

    let pods: Api<Pod> = Api::namespaced(client.clone(), "default");
    assert_refused(pods.get("p").await, 404, "pods \"p\" not found");
    assert_refused(
        pods.patch_status("p", &PatchParams::default(), &Patch::Merge(json!({})))
            .await,
        403,
        "pods \"p\" is forbidden: User \"system:serviceaccount:default:driver\" cannot patch resource \
         \"pods/status\" in API group \"\" in the namespace \"default\"",
    );
    assert_refused(
        classes(client.clone(), "v1", "x").get("spc").await,
        403,
        "secretproviderclasses.secrets-store.csi.x-k8s.io \"spc\" is forbidden: User \
         \"system:serviceaccount:default:driver\" cannot get resource \"secretproviderclasses\" in API group \
         \"secrets-store.csi.x-k8s.io\" in the namespace \"x\"",
    );
    let drivers: Api<k8s_openapi::api::storage::v1::CSIDriver> = Api::all(client.clone());
    let ours = ListParams::default().fields("metadata.name=secrets-store.csi.k8s.io");
    drivers.list(&ours).await.unwrap();
    let (code, message) = refusal(drivers.list(&ListParams::default()).await);
    assert_eq!(code, 403);
    assert!(
        message.ends_with("in API group \"storage.k8s.io\" at the cluster scope"),
        "{message}"
    );
    client.apiserver_version().await.unwrap();

    let statuses: Vec<_> = setup
        .server
        .requests()
        .into_iter()
        .map(|r| (r.verb, r.resource, r.status))
        .collect();
    assert_eq!(statuses[0], ("get".to_owned(), "pods".to_owned(), 404));
    assert_eq!(statuses.len(), 6);
    setup.server.reset_requests();
    assert_eq!(setup.server.requests(), []);
}

#[tokio::test]
async fn tokens_are_worth_what_they_are_bound_to() {
    let setup = Setup::new().await;
    let bad = setup.client_with(Some("a.b.c".to_owned())).await;
    assert_refused(bad.apiserver_version().await, 401, "Unauthorized");
    let nobody: Api<Pod> = Api::namespaced(setup.client_with(None).await, "default");
    let (code, message) = refusal(nobody.get("p").await);
    assert!(
        code == 403 && message.contains("User \"system:anonymous\""),
        "{message}"
    );

    let pods: Api<Pod> = setup.api();
    pods.create(&POST, &pod("p", None)).await.unwrap();
    let mut spec = TokenRequestSpec {
        bound_object_ref: Some(BoundObjectReference {
            kind: Some("Pod".to_owned()),
            name: Some("p".to_owned()),
            ..BoundObjectReference::default()
        }),
        ..TokenRequestSpec::default()
    };
    let client = setup
        .client_with(Some(setup.token("default", &spec).await.unwrap()))
        .await;
    client.apiserver_version().await.unwrap();
    pods.delete("p", &DeleteParams::default()).await.unwrap();
    assert_eq!(refusal(client.apiserver_version().await).0, 401);
    assert_eq!(refusal(setup.token("default", &spec).await).0, 404);

    spec.bound_object_ref = None;
    spec.audiences = Some(vec!["vault".to_owned()]);
    let foreign = setup
        .client_with(Some(setup.token("default", &spec).await.unwrap()))
        .await;
    assert_eq!(refusal(foreign.apiserver_version().await).0, 401);
    spec.expiration_seconds = Some(60);
    assert_eq!(refusal(setup.token("default", &spec).await).0, 422);
}

/// A server that gets a token asks for its review: it needs the right to, and the token has to be for
/// one of its audiences.
#[tokio::test]
async fn tokens_are_reviewed_for_their_audiences() {
    let setup = Setup::new().await;
    let pods: Api<Pod> = setup.api();
    pods.create(&POST, &pod("p", None)).await.unwrap();
    let spec = TokenRequestSpec {
        audiences: Some(vec!["vault".to_owned(), "other".to_owned()]),
        bound_object_ref: Some(BoundObjectReference {
            kind: Some("Pod".to_owned()),
            name: Some("p".to_owned()),
            ..BoundObjectReference::default()
        }),
        ..TokenRequestSpec::default()
    };
    let token = setup.token("default", &spec).await.unwrap();
    let client = setup.pod_client("server").await;
    let review = async |token: &str, audiences: &[&str]| {
        let audiences = audiences.iter().map(|&audience| audience.to_owned());
        let review = TokenReview {
            spec: TokenReviewSpec {
                token: token.to_owned(),
                audiences: Some(audiences.collect()),
            },
            ..TokenReview::default()
        };
        let reviews: Api<TokenReview> = Api::all(client.clone());
        let answer = reviews.create(&POST, &review).await?;
        Ok::<_, KubeError>(answer.status.unwrap())
    };
    let forbidden = refusal(review(&token, &["vault"]).await);
    assert_eq!(forbidden.0, 403, "{forbidden:?}");
    let rules = json!([{"apiGroups": ["authentication.k8s.io"], "resources": ["tokenreviews"],
        "verbs": ["create"]}]);
    setup.allow("server", rules).await;

    let status = review(&token, &["mine", "vault"]).await.unwrap();
    assert_eq!(status.authenticated, Some(true));
    assert_eq!(status.audiences, Some(vec!["vault".to_owned()]));
    let user = status.user.unwrap();
    let name = user.username.as_deref();
    assert_eq!(name, Some("system:serviceaccount:default:default"));
    let pod_names = &user.extra.unwrap()["authentication.kubernetes.io/pod-name"];
    assert_eq!(*pod_names, ["p"]);
    // Without audiences, the token has to be one for the API server.
    for (token, audiences) in [
        (&*token, &["mine"][..]),
        (&token, &[]),
        ("a.b.c", &["vault"]),
    ] {
        let status = review(token, audiences).await.unwrap();
        assert_eq!((status.authenticated, status.audiences), (None, None));
        assert_eq!(status.error.as_deref(), Some("invalid bearer token"));
    }
    let own = setup.token("default", &TokenRequestSpec::default()).await;
    let status = review(&own.unwrap(), &[]).await.unwrap();
    assert_eq!(status.authenticated, Some(true));
    assert_eq!(refusal(review("", &[]).await).0, 400);
    pods.delete("p", &DeleteParams::default()).await.unwrap();
    let status = review(&token, &["vault"]).await.unwrap();
    assert_eq!(status.authenticated, None, "its pod is gone");
}

#[tokio::test]
async fn disturbances_hit_everybody_but_administrators() {
    let setup = Setup::new().await;
    let client = setup.pod_client("default").await;
    let ask =
        async || tokio::time::timeout(Duration::from_millis(500), client.apiserver_version()).await;
    assert!(ask().await.unwrap().is_ok());

    setup.server.disturb(Disturbance::Fail {
        status: 500,
        verb: Some("get".to_owned()),
        resource: Some("pods".to_owned()),
        times: 1,
    });
    assert!(ask().await.unwrap().is_ok(), "another resource");
    let pods: Api<Pod> = Api::namespaced(client.clone(), "default");
    assert_eq!(refusal(pods.get("p").await).0, 500);
    assert_eq!(refusal(pods.get("p").await).0, 403, "one time only");

    setup.server.disturb(Disturbance::Hang);
    assert!(ask().await.is_err());
    setup.server.client().apiserver_version().await.unwrap();
    setup
        .server
        .disturb(Disturbance::Slow(Duration::from_millis(200)));
    let start = std::time::Instant::now();
    assert!(ask().await.unwrap().is_ok());
    assert!(start.elapsed() >= Duration::from_millis(200));

    setup.server.disturb(Disturbance::Refuse);
    assert!(matches!(ask().await, Ok(Err(error)) if !matches!(error, KubeError::Api(_))));
    setup.server.disturb(Disturbance::None);
    assert!(ask().await.unwrap().is_ok());
}

/// A body that is too large does not hide who asks, and escapes no disturbance.
#[tokio::test]
async fn a_large_body_is_refused_where_nothing_else_is() {
    let setup = Setup::new().await;
    let create = async |client: &Client| {
        let body = vec![b' '; 3 * 1024 * 1024 + 1];
        let create = http::Request::post("/api/v1/namespaces/default/pods").body(body);
        client.request::<Value>(create.unwrap()).await
    };
    let stranger = setup.client_with(Some("a.b.c".to_owned())).await;
    let client = setup.pod_client("default").await;
    assert_eq!(refusal(create(&setup.server.client()).await).0, 413);
    assert_eq!(refusal(create(&stranger).await).0, 401);
    assert_eq!(refusal(create(&client).await).0, 403);
    setup.server.disturb(Disturbance::Fail {
        status: 500,
        verb: Some("create".to_owned()),
        resource: Some("pods".to_owned()),
        times: 1,
    });
    assert_eq!(refusal(create(&client).await).0, 500);
    let requests = setup.server.requests();
    let codes: Vec<u16> = requests.iter().map(|request| request.status).collect();
    assert_eq!(codes, [401, 403, 500]);
    setup.server.disturb(Disturbance::Refuse);
    assert!(matches!(create(&client).await, Err(error) if !matches!(error, KubeError::Api(_))));
}

#[tokio::test]
async fn requests_by_a_kubeconfig_are_intercepted_disturbed_and_counted() {
    let setup = Setup::new().await;
    let kubeconfig = setup.server.kubeconfig().await.unwrap();
    let kubeconfig = Kubeconfig::from_yaml(&kubeconfig).unwrap();
    let options = KubeConfigOptions::default();
    let config = Config::from_custom_kubeconfig(kubeconfig, &options).await;
    let client = Client::try_from(config.unwrap()).unwrap();
    let pods: Api<Pod> = Api::namespaced(client, "default");

    setup.server.intercept(|call| {
        if call.uri.contains("/pods/p") {
            let refusal = json!({"code": 418, "message": "intercepted"});
            Reaction::Answer(418, refusal.to_string())
        } else {
            Reaction::Serve
        }
    });
    assert_refused(pods.get("p").await, 418, "intercepted");
    assert_eq!(refusal(pods.get("q").await).0, 404);
    let requests = setup.server.requests();
    let requests: Vec<_> = requests.iter().map(|r| (&*r.name, r.status)).collect();
    assert_eq!(requests, [("p", 418), ("q", 404)]);

    let changes = pods.watch(&WatchParams::default(), "0").await.unwrap();
    setup.server.disturb(Disturbance::Refuse);
    let ended = tokio::time::timeout(Duration::from_secs(10), changes.count()).await;
    assert!(ended.is_ok(), "the watch goes on");
    assert!(matches!(pods.get("q").await, Err(error) if !matches!(error, KubeError::Api(_))));
}
