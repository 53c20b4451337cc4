//! The objects that a class asks for in its parameter `objects`, and the content of each.

use std::collections::BTreeMap;
use std::fmt;
use std::os::unix::ffi::OsStrExt;

use serde::de::value::MapAccessDeserializer;
use serde::de::{Deserializer, MapAccess, Visitor};
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::manners::Manners;
use super::source::{Stored, StoredObjects};
use super::tokens::{claims, digests, without_tokens};
use super::yaml::{decode_base64, parse_mode, parse_yaml};
use crate::server::{Object, Request, Token};

/// The version of an object for which none is given, as in upstream's provider.
const VERSION: &str = "v1";

/// The largest `contentSize`. A larger one is taken for a mistake.
pub(super) const MAX_INVENTED: usize = 1 << 30;

/// One object that a class asks for.
#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Asked {
    object_name: Option<String>,
    path: Option<String>,
    mode: Option<String>,
    version: Option<String>,
    content: Option<String>,
    content_base64: Option<String>,
    content_size: Option<usize>,
    content_from: Option<Echo>,
    whole_answer: bool,
}

/// A part of the request that an object can have as its content.
#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "camelCase")]
enum Echo {
    Attributes,
    Secrets,
    Permission,
    TargetPath,
    CurrentObjectVersion,
    TokenClaims,
    TokenDigests,
}

/// The sources of objects' content, besides the class.
pub(super) struct Material<'a> {
    pub(super) request: &'a Request,
    /// Objects set over HTTP or read from [`super::Options::objects`].
    pub(super) stored: &'a StoredObjects,
    /// Whether objects of upstream's table have their second content.
    pub(super) rotated: bool,
    /// The mode of a file that has none of its own.
    pub(super) mode: u32,
    pub(super) manners: Manners,
    /// The number of the request, in the order of arrival.
    pub(super) number: u64,
}

/// Parses the class parameter `objects`.
///
/// # Errors
///
/// A sentence that names the wrong entry by its place and does not quote it.
pub(super) fn parse_objects(parameter: &str) -> Result<Vec<Asked>, String> {
    #[derive(Deserialize)]
    struct Parameter {
        array: Option<Vec<Entry>>,
    }
    let parameter: Parameter =
        parse_yaml(parameter).map_err(|reason| format!("parameter objects: {reason}"))?;
    let asked = parameter
        .array
        .unwrap_or_default()
        .into_iter()
        .enumerate()
        .map(|(index, entry)| match entry {
            Entry::Map(asked) => Ok(*asked),
            Entry::Text(text) => parse_yaml(&text)
                .map_err(|reason| format!("parameter objects: array[{index}]: {reason}")),
        });
    asked.collect()
}

/// Returns an entry for each stored object.
pub(super) fn all_of(stored: &StoredObjects) -> Vec<Asked> {
    stored
        .keys()
        .map(|name| Asked {
            object_name: Some(name.clone()),
            ..Asked::default()
        })
        .collect()
}

impl Asked {
    /// Returns the object's name.
    pub(super) fn name(&self) -> &str {
        self.object_name.as_deref().unwrap_or_default()
    }

    /// Returns whether the object has a content in its entry, or among the stored ones.
    pub(super) fn is_there(&self, stored: &StoredObjects) -> bool {
        self.content.is_some()
            || self.content_base64.is_some()
            || self.content_size.is_some()
            || self.content_from.is_some()
            || stored.contains_key(self.name())
    }

    /// Returns the object with its content.
    ///
    /// # Errors
    ///
    /// A sentence that names the object and the mistake in its entry.
    pub(super) fn resolve(&self, material: &Material<'_>) -> Result<Object, String> {
        let name = self.name();
        let named = |reason: String| format!("object {name:?}: {reason}");

        let found = match self.given(material).map_err(named)? {
            Some(contents) => Stored {
                mode: None,
                contents,
                version: VERSION.to_owned(),
            },
            None => look_up(name, material),
        };
        let mode = self
            .mode
            .as_deref()
            .map(parse_mode)
            .transpose()
            .map_err(named)?;
        let mut object = Object {
            id: format!("secret/{name}"),
            path: self.path.as_deref().unwrap_or(name).to_owned(),
            mode: mode.or(found.mode).unwrap_or(material.mode),
            contents: found.contents,
            version: self.version.clone().unwrap_or(found.version),
        };
        if self.whole_answer {
            let value = String::from_utf8_lossy(&object.contents);
            let answer = json!({"request_id": material.number, "data": {"value": value}});
            object.contents = answer.to_string().into_bytes();
        }
        material.manners.name(&mut object, name, mode);
        Ok(object)
    }

    /// Returns the content that the entry itself gives, if it gives one.
    fn given(&self, material: &Material<'_>) -> Result<Option<Vec<u8>>, String> {
        match (
            &self.content,
            &self.content_base64,
            self.content_size,
            self.content_from,
        ) {
            (None, None, None, None) => Ok(None),
            (Some(text), None, None, None) => Ok(Some(text.clone().into_bytes())),
            (None, Some(base64), None, None) => decode_base64(base64).map(Some),
            (None, None, Some(size), None) => pattern(size).map(Some),
            (None, None, None, Some(echo)) => material.echo(echo).map(Some),
            _ => Err("give one of content, contentBase64, contentSize and contentFrom".to_owned()),
        }
    }
}

/// Looks up an object that the class only names: among the stored ones, then in the table of
/// upstream's test provider (`test/e2eprovider/server/server.go`).
fn look_up(name: &str, material: &Material<'_>) -> Stored {
    if let Some(stored) = material.stored.get(name) {
        return Stored {
            mode: stored.mode,
            contents: stored.contents.clone(),
            version: stored.version.clone(),
        };
    }
    let (contents, version) = match name {
        _ if material.rotated => ("rotated", "v2"),
        "foo" => ("secret", VERSION),
        "fookey" => (
            "-----BEGIN PUBLIC KEY-----\nThis is mock key\n-----END PUBLIC KEY-----",
            VERSION,
        ),
        _ => ("", VERSION),
    };
    Stored {
        mode: None,
        contents: contents.into(),
        version: version.to_owned(),
    }
}

impl Material<'_> {
    /// Returns a part of the request.
    fn echo(&self, echo: Echo) -> Result<Vec<u8>, String> {
        #[derive(Serialize)]
        struct Version<'a> {
            id: &'a str,
            version: &'a str,
        }
        let request = self.request;
        let json = match echo {
            Echo::Permission => return Ok(request.permission().to_string().into_bytes()),
            Echo::TargetPath => {
                return Ok(request.target_path().as_os_str().as_bytes().to_vec());
            }
            Echo::Secrets => serde_json::to_vec_pretty(&request.secrets().map(without_tokens)),
            Echo::Attributes => serde_json::to_vec_pretty(&without_tokens(request.attributes())),
            Echo::TokenClaims => serde_json::to_vec_pretty(&claims(&tokens_of(request)?)?),
            Echo::TokenDigests => serde_json::to_vec_pretty(&digests(&tokens_of(request)?)),
            Echo::CurrentObjectVersion => {
                let versions = request.mounted_versions().iter();
                let versions = versions.map(|v| Version {
                    id: &v.id,
                    version: &v.version,
                });
                serde_json::to_vec_pretty(&versions.collect::<Vec<_>>())
            }
        };
        json.map_err(|error| error.to_string())
    }
}

/// Returns `size` bytes in lines of 16, each with its own offset, so that a missing or misplaced
/// piece shows.
///
/// # Errors
///
/// A sentence if `size` is over [`MAX_INVENTED`].
pub(super) fn pattern(size: usize) -> Result<Vec<u8>, String> {
    if size > MAX_INVENTED {
        return Err(format!(
            "{size} bytes are more than the {MAX_INVENTED} that can be made up"
        ));
    }
    let mut bytes = Vec::with_capacity(size + 16);
    while bytes.len() < size {
        bytes.extend_from_slice(format!("{:015x}\n", bytes.len()).as_bytes());
    }
    bytes.truncate(size);
    Ok(bytes)
}

/// Returns the tokens of a request, or a sentence if they do not have kubelet's form.
fn tokens_of(request: &Request) -> Result<BTreeMap<String, Token>, String> {
    request.tokens().map_err(|failure| failure.to_string())
}

/// An entry of the array: the map, or as upstream writes it, a string that is YAML of the map.
enum Entry {
    Text(String),
    Map(Box<Asked>),
}

/// Written by hand, because `untagged` would turn the mode `0640` into a number.
impl<'de> Deserialize<'de> for Entry {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct EntryVisitor;
        impl<'de> Visitor<'de> for EntryVisitor {
            type Value = Entry;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object's map, or a string that is YAML of it")
            }

            fn visit_str<E>(self, text: &str) -> Result<Entry, E> {
                Ok(Entry::Text(text.to_owned()))
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Entry, A::Error> {
                Asked::deserialize(MapAccessDeserializer::new(map))
                    .map(|asked| Entry::Map(Box::new(asked)))
            }
        }
        deserializer.deserialize_any(EntryVisitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::server::{Strings, TOKENS_KEY};
    use proto::provider::{MountRequest, ObjectVersion};
    use rstest::rstest;

    fn resolve(parameter: &str) -> Result<Vec<Object>, String> {
        let tokens = r#"{"aud1":{"token":"hunter2"},"aud2":{"token":"hunter2"}}"#;
        let strings = Strings::from([(TOKENS_KEY.into(), tokens.into()), ("k".into(), "v".into())]);
        let json = serde_json::to_string(&strings).unwrap();
        let request = Request::parse(MountRequest {
            attributes: json.clone(),
            secrets: json,
            permission: "420".into(),
            target_path: "/t".into(),
            current_object_version: vec![ObjectVersion {
                id: "secret/a".into(),
                version: "v1".into(),
            }],
        })
        .unwrap();
        let stored = Stored {
            mode: Some(0o600),
            contents: b"stored".to_vec(),
            version: "s1".into(),
        };
        let material = Material {
            request: &request,
            stored: &StoredObjects::from([("kept".to_owned(), stored)]),
            rotated: false,
            mode: 0,
            manners: Manners::Common,
            number: 7,
        };
        parse_objects(parameter)?
            .iter()
            .map(|asked| asked.resolve(&material))
            .collect()
    }

    fn one(entry: &str) -> Result<(String, u32, String, String), String> {
        let o = resolve(&format!("array:\n- {entry}"))?.remove(0);
        Ok((
            o.path,
            o.mode,
            String::from_utf8_lossy(&o.contents).into_owned(),
            o.version,
        ))
    }

    #[rstest]
    #[case::as_upstream_writes_it(
        "|\n  objectName: foo\n  objectVersion: v7\n  objectType: x",
        "foo",
        0,
        "secret",
        "v1"
    )]
    #[case::a_map("{objectName: foo}", "foo", 0, "secret", "v1")]
    #[case::unknown("{objectName: bar}", "bar", 0, "", "v1")]
    #[case::no_name("{objectVersion: v1}", "", 0, "", "v1")]
    #[case::numeric_name("{objectName: 12}", "12", 0, "", "v1")]
    #[case::path_and_text(
        "{objectName: a, path: ../b, content: x, version: 9}",
        "../b",
        0,
        "x",
        "9"
    )]
    #[case::quoted_mode("{objectName: a, mode: '0640', content: x}", "a", 0o640, "x", "v1")]
    #[case::bare_mode("{objectName: a, mode: 0640, content: x}", "a", 0o640, "x", "v1")]
    #[case::mode_in_text("\"{objectName: a, mode: 0640, content: x}\"", "a", 0o640, "x", "v1")]
    #[case::short_mode("{objectName: a, mode: 4755, content: x}", "a", 0o4755, "x", "v1")]
    #[case::base64("{objectName: a, contentBase64: c2Vj cmV0}", "a", 0, "secret", "v1")]
    #[case::size(
        "{objectName: a, contentSize: 18}",
        "a",
        0,
        "000000000000000\n00",
        "v1"
    )]
    #[case::whole(
        "{objectName: a, content: x, wholeAnswer: true}",
        "a",
        0,
        r#"{"data":{"value":"x"},"request_id":7}"#,
        "v1"
    )]
    #[case::stored("{objectName: kept}", "kept", 0o600, "stored", "s1")]
    #[case::stored_overridden(
        "{objectName: kept, mode: 444, version: s2}",
        "kept",
        0o444,
        "stored",
        "s2"
    )]
    #[case::permission("{objectName: a, contentFrom: permission}", "a", 0, "420", "v1")]
    #[case::target_path("{objectName: a, contentFrom: targetPath}", "a", 0, "/t", "v1")]
    fn an_entry_becomes_a_file(
        #[case] entry: &str,
        #[case] path: &str,
        #[case] mode: u32,
        #[case] contents: &str,
        #[case] version: &str,
    ) {
        assert_eq!(
            one(entry).unwrap(),
            (
                path.to_owned(),
                mode,
                contents.to_owned(),
                version.to_owned()
            )
        );
    }

    #[rstest]
    #[case("attributes")]
    #[case("secrets")]
    fn an_echo_shows_audiences_and_no_token(#[case] from: &str) {
        let contents = one(&format!("{{objectName: a, contentFrom: {from}}}"))
            .unwrap()
            .2;
        let echoed: Strings = serde_json::from_str(&contents).unwrap();
        assert_eq!(echoed[TOKENS_KEY], r#"{"aud1":"<token>","aud2":"<token>"}"#);
        assert_eq!(echoed["k"], "v");
    }

    #[test]
    fn versions_are_echoed_as_json() {
        let contents = one("{objectName: a, contentFrom: currentObjectVersion}")
            .unwrap()
            .2;
        let echoed: serde_json::Value = serde_json::from_str(&contents).unwrap();
        assert_eq!(
            echoed,
            serde_json::json!([{"id": "secret/a", "version": "v1"}])
        );
    }

    #[rstest]
    #[case(
        "array:\n- {objectName: a, content: hunter2, contentSize: 1}",
        "object \"a\": give one of"
    )]
    #[case(
        "array:\n- {objectName: a, contentBase64: hunter2}",
        "object \"a\": contentBase64 is not base64"
    )]
    #[case(
        "array:\n- {objectName: a, mode: '0o8', content: hunter2}",
        "object \"a\": mode must be octal"
    )]
    #[case(
        "array:\n- {objectName: a, mode: '-1', content: hunter2}",
        "object \"a\": mode must be octal"
    )]
    #[case(
        "array:\n- {objectName: a, contentSize: 2000000000}",
        "object \"a\": 2000000000 bytes"
    )]
    #[case(
        "array:\n- {objectName: a, contentFrom: hunter2}",
        "YAML not understood at line 2"
    )]
    #[case(
        "array:\n- 'content: [hunter2'",
        "array[0]: YAML not understood at line 1"
    )]
    #[case("hunter2", "parameter objects: YAML not understood")]
    fn mistakes_are_named_without_quoting(#[case] parameter: &str, #[case] expected: &str) {
        let error = resolve(parameter).err().unwrap();
        assert!(error.contains(expected), "{error}");
        assert!(!error.contains("hunter2"), "{error}");
    }
}
