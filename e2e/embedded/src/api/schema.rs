//! Structural schemas of custom kinds: pruning of unknown fields, defaults, and validation with the
//! texts of a real API server.
//!
//! CEL rules (`x-kubernetes-validations`), `format` and `allOf`/`anyOf`/`oneOf`/`not` are ignored.
//! A schema with `pattern` is refused when the definition is applied, because accepting it without
//! checking would make tests pass that fail in a real cluster.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::field_error::FieldError;

/// A node of a structural schema.
#[derive(Debug, Clone, Default)]
pub(super) struct Schema {
    kind: Option<Kind>,
    int_or_string: bool,
    nullable: bool,
    preserve_unknown: bool,
    embedded_resource: bool,
    default: Option<Value>,
    properties: BTreeMap<String, Schema>,
    additional: Option<Box<Schema>>,
    items: Option<Box<Schema>>,
    required: Vec<String>,
    allowed: Vec<Value>,
    min_length: Option<u64>,
    max_length: Option<u64>,
    min_items: Option<u64>,
    max_items: Option<u64>,
    max_properties: Option<u64>,
    minimum: Option<f64>,
    maximum: Option<f64>,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Kind {
    Object,
    Array,
    String,
    Integer,
    Number,
    Boolean,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Kind::Object => "object",
            Kind::Array => "array",
            Kind::String => "string",
            Kind::Integer => "integer",
            Kind::Number => "number",
            Kind::Boolean => "boolean",
        }
    }

    fn fits(self, value: &Value) -> bool {
        match self {
            Kind::Object => value.is_object(),
            Kind::Array => value.is_array(),
            Kind::String => value.is_string(),
            Kind::Integer => value.is_i64() || value.is_u64(),
            Kind::Number => value.is_number(),
            Kind::Boolean => value.is_boolean(),
        }
    }
}

/// Returns the name of a value's type in messages.
fn type_name(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(number) if number.is_f64() => "number",
        Value::Number(_) => "integer",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    }
}

impl Schema {
    /// Reads `openAPIV3Schema`; `field` is its place in the definition, for messages.
    ///
    /// # Errors
    /// Returns the field with a type that does not exist, or with a keyword that must not be ignored.
    pub(super) fn parse(source: &Value, field: &str) -> Result<Schema, FieldError> {
        let kind = match source["type"].as_str() {
            None => None,
            Some("object") => Some(Kind::Object),
            Some("array") => Some(Kind::Array),
            Some("string") => Some(Kind::String),
            Some("integer") => Some(Kind::Integer),
            Some("number") => Some(Kind::Number),
            Some("boolean") => Some(Kind::Boolean),
            Some(_) => {
                let known: Vec<Value> =
                    ["array", "boolean", "integer", "number", "object", "string"]
                        .map(Value::from)
                        .to_vec();
                return Err(FieldError::unsupported(
                    &format!("{field}.type"),
                    &source["type"],
                    &known,
                ));
            }
        };
        if !source["pattern"].is_null() {
            let why = "the embedded API server does not evaluate patterns";
            return Err(FieldError::forbidden(&format!("{field}.pattern"), why));
        }

        let flag = |name: &str| source[name] == true;
        let mut properties = BTreeMap::new();
        for (name, property) in source["properties"].as_object().into_iter().flatten() {
            let field = format!("{field}.properties[{name}]");
            properties.insert(name.clone(), Schema::parse(property, &field)?);
        }
        let nested = |name: &str| match &source[name] {
            nested @ Value::Object(_) => Schema::parse(nested, &format!("{field}.{name}"))
                .map(|schema| Some(Box::new(schema))),
            _ => Ok(None),
        };
        Ok(Schema {
            kind,
            int_or_string: flag("x-kubernetes-int-or-string"),
            nullable: flag("nullable"),
            preserve_unknown: flag("x-kubernetes-preserve-unknown-fields")
                || flag("additionalProperties"),
            embedded_resource: flag("x-kubernetes-embedded-resource"),
            default: source.get("default").cloned(),
            properties,
            additional: nested("additionalProperties")?,
            items: nested("items")?,
            required: source["required"]
                .as_array()
                .into_iter()
                .flatten()
                .filter_map(|name| name.as_str().map(str::to_owned))
                .collect(),
            allowed: source["enum"].as_array().cloned().unwrap_or_default(),
            min_length: source["minLength"].as_u64(),
            max_length: source["maxLength"].as_u64(),
            min_items: source["minItems"].as_u64(),
            max_items: source["maxItems"].as_u64(),
            max_properties: source["maxProperties"].as_u64(),
            minimum: source["minimum"].as_f64(),
            maximum: source["maximum"].as_f64(),
        })
    }

    /// Drops the fields of a whole object that the schema does not contain, except `apiVersion`,
    /// `kind` and `metadata`. Returns their paths.
    pub(super) fn prune(&self, object: &mut Value) -> Vec<String> {
        let mut dropped = Vec::new();
        self.prune_below(object, "", true, &mut dropped);
        dropped
    }

    fn prune_below(
        &self,
        value: &mut Value,
        path: &str,
        resource: bool,
        dropped: &mut Vec<String>,
    ) {
        match value {
            Value::Object(fields) => {
                fields.retain(|name, field| {
                    if resource && matches!(name.as_str(), "apiVersion" | "kind" | "metadata") {
                        return true;
                    }
                    let path = match path {
                        "" => name.clone(),
                        path => format!("{path}.{name}"),
                    };
                    if let Some(schema) = self.properties.get(name) {
                        schema.prune_below(field, &path, schema.embedded_resource, dropped);
                        true
                    } else if let Some(schema) = &self.additional {
                        schema.prune_below(field, &path, schema.embedded_resource, dropped);
                        true
                    } else if self.preserve_unknown {
                        true
                    } else {
                        dropped.push(path);
                        false
                    }
                });
            }
            Value::Array(items) => {
                if let Some(schema) = &self.items {
                    for (index, item) in items.iter_mut().enumerate() {
                        schema.prune_below(
                            item,
                            &format!("{path}[{index}]"),
                            schema.embedded_resource,
                            dropped,
                        );
                    }
                }
            }
            _ => {}
        }
    }

    /// Fills in the schema's defaults.
    pub(super) fn fill_defaults(&self, value: &mut Value) {
        match value {
            Value::Object(fields) => {
                for (name, schema) in &self.properties {
                    if let Some(default) = &schema.default {
                        let replaced_null =
                            !schema.nullable && fields.get(name).is_some_and(Value::is_null);
                        if replaced_null || !fields.contains_key(name) {
                            fields.insert(name.clone(), default.clone());
                        }
                    }
                    if let Some(field) = fields.get_mut(name) {
                        schema.fill_defaults(field);
                    }
                }
                if let Some(schema) = &self.additional {
                    for (name, field) in fields.iter_mut() {
                        if !self.properties.contains_key(name) {
                            schema.fill_defaults(field);
                        }
                    }
                }
            }
            Value::Array(items) => {
                if let Some(schema) = &self.items {
                    items.iter_mut().for_each(|item| schema.fill_defaults(item));
                }
            }
            _ => {}
        }
    }

    /// Returns every error of a whole object.
    pub(super) fn validate(&self, object: &Value) -> Vec<FieldError> {
        let mut errors = Vec::new();
        self.check_children(object, "", &mut errors);
        errors
    }

    fn check(&self, value: &Value, path: &str, errors: &mut Vec<FieldError>) {
        if value.is_null() && self.nullable {
            return;
        }
        if self.int_or_string {
            if !Kind::Integer.fits(value) && !Kind::String.fits(value) {
                errors.push(FieldError::wrong_type(
                    path,
                    type_name(value),
                    "integer,string",
                ));
            }
            return;
        }
        if let Some(kind) = self.kind
            && !kind.fits(value)
        {
            errors.push(FieldError::wrong_type(path, type_name(value), kind.name()));
            return;
        }
        if !self.allowed.is_empty() && !self.allowed.contains(value) {
            errors.push(FieldError::unsupported(path, value, &self.allowed));
        }
        match value {
            Value::String(text) => self.check_length(text, path, errors),
            Value::Number(number) => {
                self.check_range(number.as_f64().unwrap_or_default(), value, path, errors)
            }
            _ => {}
        }
        self.check_children(value, path, errors);
    }

    fn check_length(&self, text: &str, path: &str, errors: &mut Vec<FieldError>) {
        let length = text.chars().count() as u64;
        if let Some(min) = self.min_length.filter(|&min| length < min) {
            let why = format!("{path} in body should be at least {min} chars long");
            errors.push(FieldError::invalid(path, &json!(text), &why));
        }
        if let Some(max) = self.max_length.filter(|&max| length > max) {
            errors.push(FieldError::too_long(path, max as usize));
        }
    }

    fn check_range(&self, number: f64, value: &Value, path: &str, errors: &mut Vec<FieldError>) {
        if let Some(min) = self.minimum.filter(|&min| number < min) {
            let why = format!("{path} in body should be greater than or equal to {min}");
            errors.push(FieldError::invalid(path, value, &why));
        }
        if let Some(max) = self.maximum.filter(|&max| number > max) {
            let why = format!("{path} in body should be less than or equal to {max}");
            errors.push(FieldError::invalid(path, value, &why));
        }
    }

    fn check_children(&self, value: &Value, path: &str, errors: &mut Vec<FieldError>) {
        let below = |name: &str| match path {
            "" => name.to_owned(),
            path => format!("{path}.{name}"),
        };
        match value {
            Value::Object(fields) => {
                for name in &self.required {
                    if !fields.contains_key(name) {
                        errors.push(FieldError::required(below(name), ""));
                    }
                }
                if let Some(max) = self.max_properties.filter(|&max| fields.len() as u64 > max) {
                    errors.push(too_many(path, fields.len(), max));
                }
                for (name, field) in fields {
                    if let Some(schema) = self.properties.get(name).or(self.additional.as_deref()) {
                        schema.check(field, &below(name), errors);
                    }
                }
            }
            Value::Array(items) => {
                if let Some(min) = self.min_items.filter(|&min| (items.len() as u64) < min) {
                    let why = format!("{path} in body should have at least {min} items");
                    errors.push(FieldError::invalid(path, &json!(items.len()), &why));
                }
                if let Some(max) = self.max_items.filter(|&max| items.len() as u64 > max) {
                    errors.push(too_many(path, items.len(), max));
                }
                if let Some(schema) = &self.items {
                    for (index, item) in items.iter().enumerate() {
                        schema.check(item, &format!("{path}[{index}]"), errors);
                    }
                }
            }
            _ => {}
        }
    }
}

fn too_many(path: &str, found: usize, max: u64) -> FieldError {
    FieldError {
        field: path.to_owned(),
        reason: "FieldValueTooMany",
        message: format!("Too many: {found}: must have at most {max} items"),
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    fn schema() -> Schema {
        let source = json!({
            "type": "object",
            "properties": {
                "metadata": {"type": "object"},
                "spec": {
                    "type": "object",
                    "required": ["provider"],
                    "properties": {
                        "provider": {"type": "string", "maxLength": 5},
                        "mode": {"type": "string", "enum": ["a", "b"], "default": "a"},
                        "note": {"type": "string", "nullable": true},
                        "parameters": {"type": "object", "additionalProperties": {"type": "string"}},
                        "list": {"type": "array", "maxItems": 1, "items": {
                            "type": "object", "properties": {"id": {"type": "string"}}}},
                    },
                },
            },
        });
        Schema::parse(&source, "schema").unwrap()
    }

    #[rstest]
    #[case(json!({"provider": 7}),
        "spec.provider: Invalid value: \"integer\": spec.provider in body must be of type string: \"integer\"")]
    #[case(json!({}), "spec.provider: Required value")]
    #[case(json!({"provider": "123456"}), "spec.provider: Too long: may not be more than 5 bytes")]
    #[case(json!({"provider": null}),
        "spec.provider: Invalid value: \"null\": spec.provider in body must be of type string: \"null\"")]
    #[case(json!({"provider": "a", "mode": "c"}),
        "spec.mode: Unsupported value: \"c\": supported values: \"a\", \"b\"")]
    #[case(json!({"provider": "a", "parameters": {"x": true}}),
        "spec.parameters.x: Invalid value: \"boolean\": spec.parameters.x in body must be of type string: \"boolean\"")]
    #[case(json!({"provider": "a", "list": [{}, {}]}), "spec.list: Too many: 2: must have at most 1 items")]
    #[case(json!({"provider": "a", "list": [{"id": []}]}),
        "spec.list[0].id: Invalid value: \"array\": spec.list[0].id in body must be of type string: \"array\"")]
    fn says_what_is_wrong(#[case] spec: Value, #[case] expected: &str) {
        let errors = schema().validate(&json!({ "spec": spec }));
        let texts: Vec<_> = errors
            .iter()
            .map(|e| format!("{}: {}", e.field, e.message))
            .collect();
        assert_eq!(texts, [expected]);
    }

    #[test]
    fn prunes_the_unknown_and_fills_in_defaults() {
        let mut object = json!({
            "metadata": {"name": "x"},
            "spec": {"provider": "p", "note": null, "typo": 1, "list": [{"id": "1", "more": 2}],
                     "parameters": {"any": "thing"}},
            "status": {},
        });
        let dropped = schema().prune(&mut object);
        schema().fill_defaults(&mut object);
        assert_eq!(dropped, ["spec.list[0].more", "spec.typo", "status"]);
        assert_eq!(
            object["spec"],
            json!({"provider": "p", "note": null, "mode": "a", "list": [{"id": "1"}], "parameters": {"any": "thing"}})
        );
        assert_eq!(schema().validate(&object), []);
    }

    #[test]
    fn what_cannot_be_checked_is_refused() {
        let source =
            json!({"type": "object", "properties": {"a": {"type": "string", "pattern": "^a$"}}});
        let error = Schema::parse(&source, "schema").unwrap_err();
        assert_eq!(error.field, "schema.properties[a].pattern");
    }
}
