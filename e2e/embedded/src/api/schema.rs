//! Structural schemas of custom kinds: pruning of unknown fields, defaults, and validation with the
//! texts of a real API server.
//!
//! CEL rules (`x-kubernetes-validations`), `format` and `allOf`/`anyOf`/`oneOf`/`not` are ignored.
//! A schema with `pattern` is refused when the definition is applied, because accepting it without
//! checking would make tests pass that fail in a real cluster.

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::{
    JSON, JSONSchemaProps, JSONSchemaPropsOrArray, JSONSchemaPropsOrBool,
};
use serde_json::{Value, json};

use super::field_error::FieldError;

const TYPES: [&str; 6] = ["array", "boolean", "integer", "number", "object", "string"];

/// The structural schema of a custom kind.
#[derive(Debug, Clone)]
pub(super) struct Schema(JSONSchemaProps);

impl Schema {
    /// Accepts an `openAPIV3Schema`; `field` is its place in the definition, for messages.
    ///
    /// # Errors
    /// Returns the field with a type that does not exist, or with a keyword that must not be ignored.
    pub(super) fn new(source: JSONSchemaProps, field: &str) -> Result<Schema, FieldError> {
        check_source(&source, field)?;
        Ok(Schema(source))
    }

    /// Drops the fields of a whole object that the schema does not contain, except `apiVersion`,
    /// `kind` and `metadata`.
    pub(super) fn prune(&self, object: &mut Value) {
        prune(&self.0, object, true);
    }

    /// Fills in the schema's defaults.
    pub(super) fn fill_defaults(&self, object: &mut Value) {
        fill_defaults(&self.0, object);
    }

    /// Returns every error of a whole object.
    pub(super) fn validate(&self, object: &Value) -> Vec<FieldError> {
        let mut errors = Vec::new();
        check_bounds(&self.0, object, "", &mut errors);
        check_children(&self.0, object, "", &mut errors);
        errors
    }
}

/// Returns the schema of the fields that have none of their own.
fn additional(schema: &JSONSchemaProps) -> Option<&JSONSchemaProps> {
    match &schema.additional_properties {
        Some(JSONSchemaPropsOrBool::Schema(schema)) => Some(schema),
        _ => None,
    }
}

/// Returns the schema of a field.
fn property<'a>(schema: &'a JSONSchemaProps, name: &str) -> Option<&'a JSONSchemaProps> {
    let own = schema.properties.as_ref().and_then(|all| all.get(name));
    own.or_else(|| additional(schema))
}

/// Returns the schema of a list's items.
fn items(schema: &JSONSchemaProps) -> Option<&JSONSchemaProps> {
    match &schema.items {
        Some(JSONSchemaPropsOrArray::Schema(schema)) => Some(schema),
        _ => None,
    }
}

fn below(path: &str, name: &str) -> String {
    match path {
        "" => name.to_owned(),
        path => format!("{path}.{name}"),
    }
}

fn check_source(schema: &JSONSchemaProps, field: &str) -> Result<(), FieldError> {
    if let Some(kind) = &schema.type_
        && !TYPES.contains(&kind.as_str())
    {
        let known = TYPES.map(Value::from);
        return Err(FieldError::unsupported(
            &format!("{field}.type"),
            &json!(kind),
            &known,
        ));
    }
    if schema.pattern.is_some() {
        let why = "the embedded API server does not evaluate patterns";
        return Err(FieldError::forbidden(&format!("{field}.pattern"), why));
    }
    for (name, property) in schema.properties.iter().flatten() {
        check_source(property, &format!("{field}.properties[{name}]"))?;
    }
    if let Some(additional) = additional(schema) {
        check_source(additional, &format!("{field}.additionalProperties"))?;
    }
    match items(schema) {
        Some(items) => check_source(items, &format!("{field}.items")),
        None => Ok(()),
    }
}

fn prune(schema: &JSONSchemaProps, value: &mut Value, is_resource: bool) {
    let keeps_unknown = schema.x_kubernetes_preserve_unknown_fields == Some(true)
        || schema.additional_properties == Some(JSONSchemaPropsOrBool::Bool(true));
    let prune_child = |schema: &JSONSchemaProps, child: &mut Value| {
        prune(
            schema,
            child,
            schema.x_kubernetes_embedded_resource == Some(true),
        );
    };
    match value {
        Value::Object(fields) => fields.retain(|name, field| {
            if is_resource && matches!(name.as_str(), "apiVersion" | "kind" | "metadata") {
                return true;
            }
            let Some(schema) = property(schema, name) else {
                return keeps_unknown;
            };
            prune_child(schema, field);
            true
        }),
        Value::Array(values) => {
            if let Some(schema) = items(schema) {
                values.iter_mut().for_each(|item| prune_child(schema, item));
            }
        }
        _ => {}
    }
}

fn fill_defaults(schema: &JSONSchemaProps, value: &mut Value) {
    match value {
        Value::Object(fields) => {
            for (name, schema) in schema.properties.iter().flatten() {
                let lacks = match fields.get(name) {
                    None => true,
                    Some(field) => field.is_null() && schema.nullable != Some(true),
                };
                if let Some(JSON(default)) = &schema.default
                    && lacks
                {
                    fields.insert(name.clone(), default.clone());
                }
            }
            for (name, field) in fields {
                if let Some(schema) = property(schema, name) {
                    fill_defaults(schema, field);
                }
            }
        }
        Value::Array(values) => {
            if let Some(schema) = items(schema) {
                values
                    .iter_mut()
                    .for_each(|item| fill_defaults(schema, item));
            }
        }
        _ => {}
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

fn check(schema: &JSONSchemaProps, value: &Value, path: &str, errors: &mut Vec<FieldError>) {
    if value.is_null() && schema.nullable == Some(true) {
        return;
    }
    let found = type_name(value);
    if schema.x_kubernetes_int_or_string == Some(true) {
        if !matches!(found, "integer" | "string") {
            errors.push(FieldError::wrong_type(path, found, "integer,string"));
        }
        return;
    }
    if let Some(kind) = &schema.type_
        && kind != found
        && (kind != "number" || found != "integer")
    {
        errors.push(FieldError::wrong_type(path, found, kind));
        return;
    }
    let allowed: Vec<_> = schema
        .enum_
        .iter()
        .flatten()
        .map(|JSON(value)| value.clone())
        .collect();
    if !allowed.is_empty() && !allowed.contains(value) {
        errors.push(FieldError::unsupported(path, value, &allowed));
    }
    check_bounds(schema, value, path, errors);
    check_children(schema, value, path, errors);
}

/// Checks the bounds of lengths and numbers.
fn check_bounds(schema: &JSONSchemaProps, value: &Value, path: &str, errors: &mut Vec<FieldError>) {
    let too_many = |found: i64, max: i64| FieldError {
        field: path.to_owned(),
        reason: "FieldValueTooMany",
        message: format!("Too many: {found}: must have at most {max} items"),
    };
    let mut invalid = |value: &Value, why: String| {
        errors.push(FieldError::invalid(
            path,
            value,
            &format!("{path} in body should {why}"),
        ));
    };
    let count = |number: usize| i64::try_from(number).unwrap_or(i64::MAX);
    match value {
        Value::String(text) => {
            let length = count(text.chars().count());
            if let Some(min) = schema.min_length.filter(|&min| length < min) {
                invalid(value, format!("be at least {min} chars long"));
            }
            if let Some(max) = schema.max_length.filter(|&max| length > max) {
                errors.push(FieldError::too_long(path, max));
            }
        }
        Value::Number(number) => {
            let number = number.as_f64().unwrap_or_default();
            if let Some(min) = schema.minimum.filter(|&min| number < min) {
                invalid(value, format!("be greater than or equal to {min}"));
            }
            if let Some(max) = schema.maximum.filter(|&max| number > max) {
                invalid(value, format!("be less than or equal to {max}"));
            }
        }
        Value::Object(fields) => {
            let found = count(fields.len());
            if let Some(max) = schema.max_properties.filter(|&max| found > max) {
                errors.push(too_many(found, max));
            }
        }
        Value::Array(values) => {
            let found = count(values.len());
            if let Some(min) = schema.min_items.filter(|&min| found < min) {
                invalid(&json!(found), format!("have at least {min} items"));
            }
            if let Some(max) = schema.max_items.filter(|&max| found > max) {
                errors.push(too_many(found, max));
            }
        }
        Value::Null | Value::Bool(_) => {}
    }
}

fn check_children(
    schema: &JSONSchemaProps,
    value: &Value,
    path: &str,
    errors: &mut Vec<FieldError>,
) {
    match value {
        Value::Object(fields) => {
            for name in schema.required.iter().flatten() {
                if !fields.contains_key(name) {
                    errors.push(FieldError::required(below(path, name), ""));
                }
            }
            for (name, field) in fields {
                if let Some(schema) = property(schema, name) {
                    check(schema, field, &below(path, name), errors);
                }
            }
        }
        Value::Array(values) => {
            if let Some(schema) = items(schema) {
                for (index, item) in values.iter().enumerate() {
                    check(schema, item, &format!("{path}[{index}]"), errors);
                }
            }
        }
        _ => {}
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
        Schema::new(serde_json::from_value(source).unwrap(), "schema").unwrap()
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
        schema().prune(&mut object);
        schema().fill_defaults(&mut object);
        assert_eq!(object["status"], Value::Null);
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
        let error = Schema::new(serde_json::from_value(source).unwrap(), "schema").unwrap_err();
        assert_eq!(error.field, "schema.properties[a].pattern");
    }
}
