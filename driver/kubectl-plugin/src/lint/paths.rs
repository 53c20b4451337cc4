//! The paths of a class's objects, as far as its text says them.

use driver::files::FilePath;

use super::yaml::{self, Node};

/// The fields that name the file of an object, over all providers: the first one that is there counts.
const FIELDS: [&str; 5] = [
    "objectAlias",
    "path",
    "fileName",
    "objectName",
    "resourceName",
];

/// An object of a class.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Placed {
    /// Its name in the store.
    pub(crate) name: String,
    /// The field that names its file.
    pub(crate) field: &'static str,
    /// The path of its file.
    pub(crate) path: String,
}

/// Reads the objects of a class from its parameter: a list, or `array` with texts or maps. What cannot be read is
/// left out.
pub(crate) fn placed(objects: &str) -> Vec<Placed> {
    let Ok(Some(tree)) = yaml::document(objects) else {
        return Vec::new();
    };
    let items = match tree.get("array") {
        Some(array) => array.items(),
        None => tree.items(),
    };
    let read = |item: &Node| match item.text() {
        Some(text) => yaml::document(text).ok().flatten(),
        None => Some(item.clone()),
    };
    let objects = items.iter().filter_map(read);
    objects.filter_map(|object| of_object(&object)).collect()
}

fn of_object(object: &Node) -> Option<Placed> {
    let field = |name: &str| {
        let mut fields = object.fields().iter();
        let found = fields.find(|(key, _)| key.text.eq_ignore_ascii_case(name));
        found.and_then(|(_, value)| value.text())
    };
    let (name, path) = FIELDS
        .iter()
        .find_map(|name| Some((*name, field(name).filter(|path| !path.is_empty())?)))?;
    let called = field("objectName").or_else(|| field("resourceName"));
    Some(Placed {
        name: called.unwrap_or(path).to_owned(),
        field: name,
        path: path.to_owned(),
    })
}

/// Returns what is wrong with the path of an object's file, which the driver refuses, and what to do.
pub(super) fn why_no_path(path: &str, provider: &str) -> Option<String> {
    // A placeholder is not known here.
    if path.contains(['$', '{']) {
        return None;
    }
    let path = match provider {
        // It writes its own sign for a slash.
        "aws" => path.replace('/', "_"),
        _ => path.to_owned(),
    };
    let refused = FilePath::try_from(path).err()?;
    let field = match provider {
        "azure" | "aws" => "objectAlias",
        "gcp" => "path",
        _ => "objectName",
    };
    Some(format!(
        "the driver does not mount an object with this path: {refused}; write a path below the volume as {field}, such as db/password"
    ))
}

/// Returns whether two files cannot both be there: they have one path, or one would have to be a directory.
pub(crate) fn clash(a: &str, b: &str) -> bool {
    let is_below = |path: &str, other: &str| {
        let rest = path.strip_prefix(other);
        rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    };
    is_below(a, b) || is_below(b, a)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn objects_have_the_path_of_their_first_field() {
        for (text, expected) in [
            (
                "- objectName: a\n- objectName: b/c",
                &["objectName a a", "objectName b/c b/c"][..],
            ),
            (
                "array:\n  - |\n    objectName: a\n    objectAlias: b\n",
                &["objectAlias a b"],
            ),
            ("array:\n  - {objectName: a, path: b/c}", &["path a b/c"]),
            (
                "- resourceName: projects/p\n  path: x",
                &["path projects/p x"],
            ),
            ("- OBJECTNAME: a\n- other: b", &["objectName a a"]),
            ("a: [", &[]),
            ("", &[]),
        ] {
            let found = placed(text);
            let found = found
                .iter()
                .map(|o| format!("{} {} {}", o.field, o.name, o.path));
            assert_eq!(found.collect::<Vec<_>>(), expected, "{text}");
        }
    }

    #[test]
    fn a_file_cannot_be_a_directory() {
        for (a, b, expected) in [
            ("db", "db", true),
            ("db", "db/password", true),
            ("db/a/b", "db/a", true),
            ("db", "db-2", false),
            ("db/a", "db/b", false),
        ] {
            assert_eq!(clash(a, b), expected, "{a} {b}");
        }
    }
}
