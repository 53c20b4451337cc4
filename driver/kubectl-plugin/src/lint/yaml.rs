//! Reads YAML and keeps the line of each value.

use std::fmt;

use serde::{
    Deserialize, Deserializer,
    de::{self, MapAccess, SeqAccess, Visitor},
};
use serde_saphyr::Spanned;

/// A value and its line, counted from 1.
#[derive(Debug, Clone)]
pub(super) struct Node {
    pub(super) line: usize,
    pub(super) value: Value,
}

#[derive(Debug, Clone)]
pub(super) enum Value {
    Null,
    Text(String),
    /// A number or a boolean, as text.
    Other(String),
    List(Vec<Node>),
    Map(Vec<(Key, Node)>),
}

#[derive(Debug, Clone)]
pub(super) struct Key {
    pub(super) line: usize,
    pub(super) text: String,
}

impl Node {
    /// Returns the fields of a map; nothing for another value.
    pub(super) fn fields(&self) -> &[(Key, Node)] {
        match &self.value {
            Value::Map(fields) => fields,
            _ => &[],
        }
    }

    /// Returns the items of a list; nothing for another value.
    pub(super) fn items(&self) -> &[Node] {
        match &self.value {
            Value::List(items) => items,
            _ => &[],
        }
    }

    /// Returns a field of a map, unless it is null.
    pub(super) fn get(&self, name: &str) -> Option<&Node> {
        let mut fields = self.fields().iter();
        let (_, value) = fields.find(|(key, _)| key.text == name)?;
        (!matches!(value.value, Value::Null)).then_some(value)
    }

    pub(super) fn text(&self) -> Option<&str> {
        match &self.value {
            Value::Text(text) => Some(text),
            _ => None,
        }
    }

    /// Returns a field that is a text.
    pub(super) fn text_of(&self, name: &str) -> Option<&str> {
        self.get(name)?.text()
    }

    /// Returns the items of a field that is a list.
    pub(super) fn items_of(&self, name: &str) -> &[Node] {
        self.get(name).map_or(&[], Node::items)
    }

    pub(super) fn is_map(&self) -> bool {
        matches!(self.value, Value::Map(_))
    }

    /// Adds to all lines.
    fn shift(&mut self, by: usize) {
        self.line += by;
        match &mut self.value {
            Value::List(items) => items.iter_mut().for_each(|item| item.shift(by)),
            Value::Map(fields) => {
                for (key, value) in fields {
                    key.line += by;
                    value.shift(by);
                }
            }
            Value::Null | Value::Text(_) | Value::Other(_) => {}
        }
    }
}

/// Reads the documents of a text; the items of a List are documents of their own.
///
/// # Errors
/// Returns the line and what is wrong.
pub(super) fn documents(text: &str) -> Result<Vec<Node>, (usize, String)> {
    let mut found = Vec::new();
    let mut part = String::new();
    let mut begin = 0;
    for (number, line) in text.lines().chain(["---"]).enumerate() {
        if line == "---" || line.starts_with("--- ") {
            let read = document(&part).map_err(|(line, why)| (line + begin, why))?;
            if let Some(mut node) = read {
                node.shift(begin);
                let is_list = node.text_of("kind").is_some_and(|kind| kind == "List");
                match is_list {
                    true => found.extend(node.items_of("items").iter().cloned()),
                    false => found.push(node),
                }
            }
            part.clear();
            begin = number + 1;
            continue;
        }
        part.push_str(line);
        part.push('\n');
    }
    Ok(found)
}

/// Reads one document, if the text has one.
pub(super) fn document(text: &str) -> Result<Option<Node>, (usize, String)> {
    let is_blank = |line: &str| line.trim().is_empty() || line.trim_start().starts_with('#');
    if text.lines().all(is_blank) {
        return Ok(None);
    }
    match serde_saphyr::from_str::<Spanned<Tree>>(text) {
        Ok(read) => Ok(Some(Node::from(read)).filter(|node| !matches!(node.value, Value::Null))),
        Err(error) => {
            let line = error.location().map_or(1, |at| at.line());
            let why = error.without_snippet().to_string();
            let why = said(why.lines().next().unwrap_or_default());
            let hint = if text.contains("{{") {
                ". This is a template: lint what helm template prints"
            } else if text.contains("\n\t") {
                ". YAML is indented with spaces, not with tabs"
            } else {
                ""
            };
            let line = usize::try_from(line).unwrap_or(1);
            Err((line, format!("this is not YAML: {why}{hint}")))
        }
    }
}

/// Returns what the parser says without the place, which counts from the beginning of the document and not from that
/// of the file, and without its own options.
fn said(why: &str) -> &str {
    let why = why.rsplit_once(" at line ").map_or(why, |(why, _)| why);
    why.split_once(", set ").map_or(why, |(why, _)| why)
}

impl From<Spanned<Tree>> for Node {
    fn from(read: Spanned<Tree>) -> Self {
        Self {
            line: usize::try_from(read.defined.line()).unwrap_or(0),
            value: read.value.0,
        }
    }
}

struct Tree(Value);

impl<'de> Deserialize<'de> for Tree {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        from.deserialize_any(TreeVisitor).map(Tree)
    }
}

struct TreeVisitor;

impl<'de> Visitor<'de> for TreeVisitor {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any value")
    }

    fn visit_unit<E: de::Error>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_none<E: de::Error>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_some<D: Deserializer<'de>>(self, from: D) -> Result<Value, D::Error> {
        from.deserialize_any(self)
    }

    fn visit_bool<E: de::Error>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Other(value.to_string()))
    }

    fn visit_i64<E: de::Error>(self, value: i64) -> Result<Value, E> {
        Ok(Value::Other(value.to_string()))
    }

    fn visit_u64<E: de::Error>(self, value: u64) -> Result<Value, E> {
        Ok(Value::Other(value.to_string()))
    }

    fn visit_f64<E: de::Error>(self, value: f64) -> Result<Value, E> {
        Ok(Value::Other(value.to_string()))
    }

    fn visit_str<E: de::Error>(self, value: &str) -> Result<Value, E> {
        Ok(Value::Text(value.to_owned()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut from: A) -> Result<Value, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = from.next_element::<Spanned<Tree>>()? {
            items.push(item.into());
        }
        Ok(Value::List(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut from: A) -> Result<Value, A::Error> {
        let mut fields = Vec::new();
        while let Some(key) = from.next_key::<Spanned<Tree>>()? {
            let key = Node::from(key);
            let text = match key.value {
                Value::Text(text) | Value::Other(text) => text,
                Value::Null | Value::List(_) | Value::Map(_) => String::new(),
            };
            let key = Key {
                line: key.line,
                text,
            };
            fields.push((key, from.next_value::<Spanned<Tree>>()?.into()));
        }
        Ok(Value::Map(fields))
    }
}
