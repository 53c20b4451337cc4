//! Names the objects of a class whose files cannot both be in the volume.

use crate::{
    explain::facts::VolumeFacts,
    lint::paths::{self, Placed},
};

/// Pieces of the driver's errors about paths that are taken.
const TAKEN: [&str; 2] = [
    "two files with this path",
    "another file's path needs it to be a directory",
];
/// The parameters with the objects, of all providers.
const PARAMETERS: [&str; 2] = ["objects", "secrets"];

/// Returns whether an error says that two files cannot both be in a volume.
pub(super) fn is_clash(said: &str) -> bool {
    TAKEN.iter().any(|piece| said.contains(piece))
}

/// Returns which objects of the class cannot both be there, and what to change. `said` is the driver's error, which
/// has the path of one of them.
pub(super) fn clash(volume: &VolumeFacts, said: &str) -> Option<String> {
    let path = refused(said).filter(|_| is_clash(said))?;
    let class = &volume.class_name;
    let parameters = volume.class.found().map(|class| &class.spec.parameters);
    let named = parameters.and_then(|all| {
        let mut texts = PARAMETERS
            .iter()
            .filter_map(|name| Some((name, all.get(*name)?)));
        texts.find_map(|(name, text)| Some((name, pair(&paths::placed(text), path)?)))
    });
    Some(match named {
        Some((parameter, (a, b))) => format!(
            "class {class} has object {} with {} {} and object {} with {} {}, of which a volume can have one only; give one of them another {} in spec.parameters.{parameter}",
            a.name,
            a.field,
            a.path,
            b.name,
            b.field,
            b.path,
            to_change(&a, &b)
        ),
        None => format!(
            "two objects of class {class} need the path {path}, as a file and as another file or a directory; give one of them another path in spec.parameters (objectAlias, objectName, path or fileName, as its provider calls it)"
        ),
    })
}

/// Returns the path that the driver refuses.
fn refused(said: &str) -> Option<&str> {
    let (_, rest) = said.split_once("file \"")?;
    Some(rest.split_once("\" is refused")?.0)
}

fn pair(objects: &[Placed], path: &str) -> Option<(Placed, Placed)> {
    let at = objects.iter().position(|object| object.path == path)?;
    let mut others = objects.iter().enumerate();
    let (_, other) =
        others.find(|(index, other)| *index != at && paths::clash(&other.path, path))?;
    Some((objects[at].clone(), other.clone()))
}

/// Returns the field to change. A name in the store stays as it is where there is an alias.
fn to_change(a: &Placed, b: &Placed) -> &'static str {
    let is_alias =
        |object: &&Placed| object.field != "objectName" && object.field != "resourceName";
    [a, b]
        .into_iter()
        .find(is_alias)
        .map_or(a.field, |object| object.field)
}
