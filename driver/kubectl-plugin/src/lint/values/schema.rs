//! The chart's schema of values, and what it says to a value. Of JSON Schema, it interprets the keywords that
//! the chart's schema has; a test finds a new one.

use std::{collections::BTreeMap, sync::LazyLock};

use serde::{Deserialize, de::IgnoredAny};
use serde_json::Value as Json;

use super::pattern;
use crate::lint::{
    names::meant,
    yaml::{Node, Value},
};

const SCHEMA: &str = include_str!("../../../../../deploy/chart/values.schema.json");

/// The longest text of a value that a message shows.
const SHOWN: usize = 60;

/// Takes what is wrong, with its line.
pub(super) type Add<'a> = &'a mut dyn FnMut(usize, String);

/// A schema, or a part of one.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct Schema {
    #[serde(rename = "$schema")]
    _dialect: Option<IgnoredAny>,
    #[serde(rename = "title")]
    _title: Option<IgnoredAny>,
    #[serde(rename = "description")]
    _description: Option<IgnoredAny>,
    #[serde(rename = "type", default)]
    types: Types,
    #[serde(default)]
    pub(super) properties: BTreeMap<String, Self>,
    #[serde(rename = "enum")]
    one_of: Option<Vec<Json>>,
    items: Option<Box<Self>>,
    minimum: Option<f64>,
    maximum: Option<f64>,
    pattern: Option<String>,
    additional_properties: Option<Additional>,
    #[serde(default)]
    required: Vec<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(untagged)]
enum Types {
    #[default]
    Any,
    One(String),
    Some(Vec<String>),
}

/// What a map may have besides its properties.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Additional {
    /// Whether it may have anything.
    Anything(bool),
    Like(Box<Schema>),
}

/// Returns the schema of the chart's values.
///
/// # Errors
/// Says what the schema has that is not known here.
pub(super) fn of_chart() -> Result<&'static Schema, &'static str> {
    static READ: LazyLock<Result<Schema, String>> =
        LazyLock::new(|| serde_json::from_str(SCHEMA).map_err(|error| error.to_string()));
    READ.as_ref().map_err(String::as_str)
}

impl Schema {
    /// Returns whether a map has the properties alone; what the chart says to others is not the schema's to say.
    pub(super) fn is_closed(&self) -> bool {
        !self.properties.is_empty()
    }

    /// Returns what is wrong with a value itself.
    fn refusal(&self, path: &str, value: &Node) -> Option<String> {
        if self.takes(&value.value) {
            return None;
        }
        let hint = match &value.value {
            Value::Other(text) if self.is_text() && self.fits(text) => "; put it in quotes",
            _ => "",
        };
        Some(format!(
            "{path} is {}; it must be {}{hint}",
            shown(&value.value),
            self.allowed()
        ))
    }

    /// Checks a value and what is below it, and calls a function with lines and messages. The line is that of the
    /// value's key. Of keys that are not known, it leaves those to the caller that the schema allows.
    pub(super) fn check(&self, path: &str, line: usize, value: &Node, add: Add<'_>) {
        if let Some(why) = self.refusal(path, value) {
            add(line, why);
            return;
        }
        for (n, item) in value.items().iter().enumerate() {
            if let Some(schema) = &self.items {
                schema.check(&format!("{path}[{n}]"), item.line, item, add);
            }
        }
        let is_object = self.required.is_empty();
        for (key, inside) in value.fields() {
            let here = below(path, &key.text);
            let property = self.properties.get(&key.text);
            match (property, &self.additional_properties) {
                // Helm takes the chart's default away, and the schema does not see this null.
                (Some(_), _) if is_object && matches!(inside.value, Value::Null) => {}
                (Some(schema), _) => schema.check(&here, key.line, inside, add),
                (None, Some(Additional::Like(schema))) => {
                    schema.check(&here, key.line, inside, add);
                }
                (None, Some(Additional::Anything(false))) => {
                    let known: Vec<_> = self.properties.keys().map(String::as_str).collect();
                    let instead = match meant(&key.text, &known) {
                        Some(name) => format!("write {name}"),
                        None => format!("it has {}", known.join(", ")),
                    };
                    add(key.line, format!("{path} has no {}; {instead}", key.text));
                }
                (None, _) => {}
            }
        }
        for name in self.required.iter().filter(|_| value.is_map()) {
            let mut fields = value.fields().iter();
            // A misspelt one has been named.
            let is_it = |key: &str| key == name || meant(key, &[name]).is_some();
            if !fields.any(|(key, _)| is_it(&key.text)) {
                add(line, format!("{path} has no {name}, which it needs"));
            }
        }
    }

    fn takes(&self, value: &Value) -> bool {
        let types = self.types();
        let has_type = |name: &&str| match *name {
            "null" => matches!(value, Value::Null),
            "object" => matches!(value, Value::Map(_)),
            "array" => matches!(value, Value::List(_)),
            "string" => matches!(value, Value::Text(_)),
            "boolean" => is_boolean(value),
            // JSON Schema has no other numbers: 2.0 is an integer.
            "integer" => number(value).is_some_and(|number| number.fract() == 0.0),
            _ => true,
        };
        if !types.is_empty() && !types.iter().any(has_type) {
            return false;
        }
        let one_of = self.one_of.as_ref();
        if one_of.is_some_and(|all| !all.iter().any(|one| is_same(one, value))) {
            return false;
        }
        if let Some(number) = number(value) {
            let is_in = self.minimum.is_none_or(|least| number >= least);
            return is_in && self.maximum.is_none_or(|most| number <= most);
        }
        !matches!(value, Value::Text(text) if !self.fits(text))
    }

    fn fits(&self, text: &str) -> bool {
        let pattern = self.pattern.as_deref();
        // A pattern that is not known here fails a test.
        let fits = pattern.and_then(|pattern| pattern::fits(pattern, text));
        fits.unwrap_or(true)
    }

    fn types(&self) -> Vec<&str> {
        match &self.types {
            Types::Any => Vec::new(),
            Types::One(one) => vec![one],
            Types::Some(all) => all.iter().map(String::as_str).collect(),
        }
    }

    /// Returns whether a value can be a text of any kind, and no number.
    fn is_text(&self) -> bool {
        let types = self.types();
        types.contains(&"string") && !types.contains(&"integer") && self.one_of.is_none()
    }

    /// Returns what is allowed, in words.
    fn allowed(&self) -> String {
        if let Some(all) = &self.one_of {
            let mut names = Vec::new();
            for one in all {
                let name = one.as_str().map_or_else(|| one.to_string(), str::to_owned);
                if !one.is_null() && !names.contains(&name) {
                    names.push(name);
                }
            }
            return listed(&names);
        }
        if let Some(words) = self.pattern.as_deref().and_then(pattern::words) {
            return words.to_owned();
        }
        let types = self.types();
        let words = types.iter().filter_map(|name| match *name {
            "integer" => Some(self.integer()),
            "object" => Some(self.map()),
            "array" => Some(self.list()),
            "string" if types.contains(&"integer") => None,
            "string" => Some("a text".to_owned()),
            "boolean" => Some("true or false".to_owned()),
            _ => None,
        });
        let words: Vec<_> = words.collect();
        match words.is_empty() {
            true => "null".to_owned(),
            false => words.join(" or "),
        }
    }

    fn integer(&self) -> String {
        let range = match (self.minimum, self.maximum) {
            (Some(least), Some(most)) => format!(" from {least} to {most}"),
            (Some(least), None) => format!(" from {least} on"),
            (None, Some(most)) => format!(" up to {most}"),
            (None, None) => String::new(),
        };
        format!("a whole number{range}")
    }

    fn map(&self) -> String {
        let keys: Vec<_> = self.properties.keys().map(String::as_str).collect();
        match keys.is_empty() {
            true => "a map".to_owned(),
            false => format!("a map, with values below it: {}", keys.join(", ")),
        }
    }

    fn list(&self) -> String {
        let items = self.items.as_ref().map(|items| items.types());
        match items.as_deref() {
            Some(["string"]) => "a list of texts".to_owned(),
            Some(["object"]) => "a list of maps".to_owned(),
            _ => "a list".to_owned(),
        }
    }
}

/// Returns the full name of a key.
pub(super) fn below(path: &str, key: &str) -> String {
    match path.is_empty() {
        true => key.to_owned(),
        false => format!("{path}.{key}"),
    }
}

/// Joins names: `a, b or c`.
pub(super) fn listed(names: &[String]) -> String {
    match names.split_last() {
        Some((last, others)) if !others.is_empty() => format!("{} or {last}", others.join(", ")),
        Some((last, _)) => last.clone(),
        None => String::new(),
    }
}

fn shown(value: &Value) -> String {
    match value {
        Value::Null => "null".to_owned(),
        Value::Text(text) if text.chars().count() > SHOWN => "a longer text".to_owned(),
        Value::Text(text) => format!("{text:?}"),
        Value::Other(text) => text.clone(),
        Value::List(_) => "a list".to_owned(),
        Value::Map(_) => "a map".to_owned(),
    }
}

fn is_boolean(value: &Value) -> bool {
    matches!(value, Value::Other(text) if text == "true" || text == "false")
}

fn number(value: &Value) -> Option<f64> {
    match value {
        Value::Other(text) => text.parse().ok(),
        _ => None,
    }
}

fn is_same(one: &Json, value: &Value) -> bool {
    match (one, value) {
        (Json::Null, Value::Null) => true,
        (Json::Bool(one), Value::Other(text)) => one.to_string() == *text,
        (Json::String(one), Value::Text(text)) => one == text,
        (Json::Number(one), Value::Other(_)) => one.as_f64() == number(value),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Calls a function with each part of the schema.
    fn each(schema: &Schema, visit: &mut dyn FnMut(&Schema)) {
        visit(schema);
        schema.properties.values().for_each(|s| each(s, visit));
        schema.items.iter().for_each(|s| each(s, visit));
        if let Some(Additional::Like(inside)) = &schema.additional_properties {
            each(inside, visit);
        }
    }

    #[test]
    fn the_schema_has_nothing_that_is_not_interpreted() {
        let types = ["array", "boolean", "integer", "null", "object", "string"];
        let (mut parts, mut patterns) = (0, 0);
        each(of_chart().unwrap(), &mut |schema| {
            parts += 1;
            assert!(schema.types().iter().all(|name| types.contains(name)));
            if let Some(pattern) = &schema.pattern {
                patterns += 1;
                assert!(pattern::fits(pattern, "").is_some(), "{pattern}");
            }
        });
        assert!(parts > 100 && patterns > 10, "{parts}, {patterns}");
    }

    #[test]
    fn an_unknown_keyword_is_an_error() {
        let read = serde_json::from_str::<Schema>(r#"{"type": "string", "maxLength": 3}"#);
        assert!(read.unwrap_err().to_string().contains("maxLength"));
    }
}
