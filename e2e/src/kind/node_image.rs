//! The choice of the nodes' image.

use super::tools::{A_MOMENT, Tools};
use crate::binaries::workspace;
use crate::cluster::{Error, Result};

/// Names an image, or a Kubernetes version of the table.
pub const IMAGE_VARIABLE: &str = "KIND_NODE_IMAGE";

/// A line of `kind/node-images`.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Row {
    version: String,
    image: String,
    default: bool,
}

/// Returns the image that was asked for; else the first of the table that Docker has; else the
/// default.
///
/// # Errors
/// When the table cannot be read, or does not have the version.
pub(super) async fn choose(tools: &Tools, asked: Option<&str>) -> Result<String> {
    let path = workspace().join("kind/node-images");
    let failed = |reason: String| Error::Start(format!("{}: {reason}", path.display()));
    let table = std::fs::read_to_string(&path).map_err(|error| failed(error.to_string()))?;
    let rows = parse(&table).map_err(failed)?;
    if let Some(asked) = asked {
        return asked_for(&rows, asked).map_err(failed);
    }
    for row in &rows {
        let there = [
            "image",
            "inspect",
            "--format",
            "{{.Id}}",
            row.image.as_str(),
        ];
        if tools.docker(there, A_MOMENT).await.is_ok() {
            return Ok(row.image.clone());
        }
    }
    let default = rows.into_iter().find(|row| row.default);
    default
        .map(|row| row.image)
        .ok_or_else(|| failed("no line is marked default".to_owned()))
}

fn asked_for(rows: &[Row], asked: &str) -> std::result::Result<String, String> {
    let version = asked.trim_start_matches('v');
    if let Some(row) = rows.iter().find(|row| row.version == version) {
        return Ok(row.image.clone());
    }
    if asked.contains([':', '/']) {
        return Ok(asked.to_owned());
    }
    let known: Vec<_> = rows.iter().map(|row| row.version.as_str()).collect();
    Err(format!(
        "{IMAGE_VARIABLE}={asked} is neither an image nor one of the versions {}",
        known.join(", ")
    ))
}

fn parse(table: &str) -> std::result::Result<Vec<Row>, String> {
    let mut rows = Vec::new();
    for line in table.lines() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let words: Vec<&str> = line.split_whitespace().collect();
        let (version, image, default) = match words[..] {
            [version, image] => (version, image, false),
            [version, image, "default"] => (version, image, true),
            _ => return Err(format!("not a version and an image: {line}")),
        };
        rows.push(Row {
            version: version.to_owned(),
            image: image.to_owned(),
            default,
        });
    }
    Ok(rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_has_the_versions_of_upstreams_matrix_with_digests() {
        let table = std::fs::read_to_string(workspace().join("kind/node-images")).unwrap();
        let rows = parse(&table).unwrap();
        for version in ["1.34.11", "1.35.8", "1.36.4", "1.37.0"] {
            let image = asked_for(&rows, version).unwrap();
            let digest = image
                .strip_prefix(&format!("kindest/node:v{version}@sha256:"))
                .unwrap();
            assert!(digest.len() == 64 && digest.bytes().all(|byte| byte.is_ascii_hexdigit()));
        }
        assert_eq!(rows.iter().filter(|row| row.default).count(), 1);
    }

    #[test]
    fn a_version_or_an_image_can_be_asked_for() {
        let rows = parse("# a comment\n\n1.2.3 node:v1.2.3\n1.2.4 node:v1.2.4 default\n").unwrap();
        assert_eq!(asked_for(&rows, "v1.2.3").unwrap(), "node:v1.2.3");
        assert_eq!(asked_for(&rows, "mine:9").unwrap(), "mine:9");
        let error = asked_for(&rows, "1.2.9").unwrap_err();
        assert!(error.contains("1.2.3, 1.2.4"), "{error}");
        assert!(parse("1.2.3\n").unwrap_err().contains("1.2.3"));
    }
}
