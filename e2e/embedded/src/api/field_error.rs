//! Errors of single fields, with the texts of a real API server.

use serde_json::Value;

/// The errors of an object.
#[derive(Default)]
pub(super) struct Errors(pub(super) Vec<FieldError>);

impl Errors {
    pub(super) fn push(&mut self, error: FieldError) {
        self.0.push(error);
    }

    /// Adds the error of a value.
    pub(super) fn invalid(&mut self, field: impl Into<String>, value: &Value, why: &str) {
        self.push(FieldError::invalid(field, value, why));
    }
}

/// The error of one field of an invalid object.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct FieldError {
    pub(super) field: String,
    pub(super) reason: &'static str,
    /// The error without the field's name.
    pub(super) message: String,
}

impl FieldError {
    pub(super) fn required(field: impl Into<String>, hint: &str) -> FieldError {
        let message = match hint {
            "" => "Required value".to_owned(),
            hint => format!("Required value: {hint}"),
        };
        FieldError {
            field: field.into(),
            reason: "FieldValueRequired",
            message,
        }
    }

    /// Returns the error of a value, which is shown as JSON.
    pub(super) fn invalid(field: impl Into<String>, value: &Value, why: &str) -> FieldError {
        FieldError {
            field: field.into(),
            reason: "FieldValueInvalid",
            message: format!("Invalid value: {value}: {why}"),
        }
    }

    /// Returns the error of a value whose JSON type is `found`.
    pub(super) fn wrong_type(field: &str, found: &str, expected: &str) -> FieldError {
        FieldError {
            field: field.to_owned(),
            reason: "FieldValueTypeInvalid",
            message: format!(
                "Invalid value: \"{found}\": {field} in body must be of type {expected}: \"{found}\""
            ),
        }
    }

    pub(super) fn unsupported(field: &str, value: &Value, supported: &[Value]) -> FieldError {
        let supported: Vec<String> = supported.iter().map(Value::to_string).collect();
        FieldError {
            field: field.to_owned(),
            reason: "FieldValueNotSupported",
            message: format!(
                "Unsupported value: {value}: supported values: {}",
                supported.join(", ")
            ),
        }
    }

    pub(super) fn forbidden(field: &str, why: &str) -> FieldError {
        FieldError {
            field: field.to_owned(),
            reason: "FieldValueForbidden",
            message: format!("Forbidden: {why}"),
        }
    }

    pub(super) fn duplicate(field: &str, value: &Value) -> FieldError {
        FieldError {
            field: field.to_owned(),
            reason: "FieldValueDuplicate",
            message: format!("Duplicate value: {value}"),
        }
    }

    pub(super) fn too_long(field: &str, bytes: impl std::fmt::Display) -> FieldError {
        FieldError {
            field: field.to_owned(),
            reason: "FieldValueTooLong",
            message: format!("Too long: may not be more than {bytes} bytes"),
        }
    }

    /// Returns the field and its error.
    pub(super) fn sentence(&self) -> String {
        format!("{}: {}", self.field, self.message)
    }
}
