use super::*;
use crate::{
    cluster::{
        classes::{Classes, Freshness, Wanted, tests::paused},
        resources::SecretObject,
    },
    error::{Error, Result},
};
use proptest::prelude::*;
use tokio::time::sleep;
use tonic::Code;

/// What the API server says of a class.
#[derive(Debug, Clone, Copy)]
enum Kind {
    Missing,
    /// So many bytes of parameters.
    Parameters(usize),
    /// So many bytes in `secretObjects`.
    Text(usize),
}

impl Kind {
    fn answer(self) -> Result<Class> {
        match self {
            Self::Missing => Err(Error::new(Code::NotFound, "no such class")),
            Self::Parameters(bytes) => Ok(Class {
                parameters: [(String::new(), "x".repeat(bytes))].into(),
                ..Class::with_secrets(Vec::new())
            }),
            Self::Text(bytes) => Ok(Class::with_secrets(vec![SecretObject {
                secret_name: "x".repeat(bytes),
                ..SecretObject::default()
            }])),
        }
    }
}

/// Needs a class. Returns whether it was read.
async fn is_read(classes: &Classes, namespace: &str, name: &str, kind: Kind) -> bool {
    sleep(Duration::from_millis(1)).await;
    let wanted = Wanted {
        freshness: Freshness::Within(UNUSED),
        known: None,
        with_parameters: false,
    };
    let was_read = std::cell::Cell::new(false);
    let read = async |_| {
        was_read.set(true);
        kind.answer()
    };
    let _ = classes.get(namespace, name, &wanted, read).await;
    was_read.get()
}

fn has_parameters(classes: &Classes, key: &str) -> bool {
    let class = classes.newest(key);
    class.is_some_and(|class| !class.parameters.is_empty())
}

#[test]
fn what_is_remembered_is_bounded() {
    paused(async {
        let classes = Classes::default();
        let too_large = Kind::Parameters(MOST_PARAMETERS_OF_ONE + 1);
        is_read(&classes, "shop", "large", too_large).await;
        assert!(classes.newest("shop/large").is_some());
        assert!(!has_parameters(&classes, "shop/large"));
        let large = Kind::Parameters(MOST_PARAMETERS_OF_ONE);
        for number in 0..40 {
            is_read(&classes, "shop", &format!("{number}"), large).await;
        }
        assert_eq!(classes.store().sum(|_, of| of.parameters), MOST_PARAMETERS);
        for number in 0..2 * MOST {
            is_read(&classes, "shop", "0", large).await;
            let name = format!("small-{number}");
            is_read(&classes, "shop", &name, Kind::Parameters(1)).await;
        }
        assert_eq!(classes.store().classes.len(), MOST);
        assert!(
            classes.newest("shop/0").is_some(),
            "it is needed all the time"
        );
        assert!(classes.newest("shop/1").is_none());
        sleep(UNUSED).await;
        is_read(&classes, "shop", "0", Kind::Parameters(1)).await;
        assert_eq!(classes.store().classes.len(), 1);
    });
}

#[test]
fn text_of_secrets_is_bounded() {
    paused(async {
        let classes = Classes::default();
        let text = 100 << 10;
        for number in 0..200 {
            is_read(&classes, "shop", &number.to_string(), Kind::Text(text)).await;
        }
        let store = classes.store();
        assert_eq!(store.classes.len(), MOST_TEXT / text);
        assert!(store.classes.contains_key("shop/199"));
    });
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(5))]

    /// Whatever classes the pods of a tenant name, those of others stay remembered.
    #[test]
    fn a_tenant_takes_nothing_from_others(
        wanted in prop::collection::vec(
            (0..1200_u32, prop_oneof![
                3 => Just(Kind::Missing),
                1 => (1..200_000_usize).prop_map(Kind::Parameters),
                1 => (1..130_000_usize).prop_map(Kind::Text),
            ]),
            1100..1500,
        ),
    ) {
        paused(async {
            let classes = Classes::default();
            let others: Vec<_> = (0..40)
                .map(|number| match number % 2 {
                    0 => (format!("{number}"), Kind::Parameters(4_000)),
                    _ => (format!("{number}"), Kind::Text(4_000)),
                })
                .collect();
            for (name, kind) in &others {
                is_read(&classes, "shop", name, *kind).await;
            }
            for (name, kind) in wanted {
                is_read(&classes, "evil", &name.to_string(), kind).await;
            }
            for (name, kind) in &others {
                if let Kind::Parameters(_) = kind {
                    assert!(has_parameters(&classes, &format!("shop/{name}")));
                }
                assert!(!is_read(&classes, "shop", name, *kind).await, "{name}");
            }
            let store = classes.store();
            assert!(store.classes.len() <= MOST);
            assert!(store.sum(|_, of| of.text) <= MOST_TEXT);
            assert!(store.sum(|_, of| of.parameters) <= MOST_PARAMETERS);
        });
    }
}
