//! The JSON form of protobuf messages as command lines print it.
//!
//! Members have the names of the protocol files and are sorted; fields at their default are shown; 64-bit
//! integers are strings, bytes are base64, enums are names; what would be `null` is left out. Source: the
//! ProtoJSON format of protobuf, and what SPIRE's `-output json` makes of it, down to the escapes, so that
//! scripts which compare text keep working.

use std::sync::LazyLock;

use prost::Message;
use prost_reflect::{DescriptorPool, DynamicMessage, SerializeOptions};
use serde_json::{Map, Number, Value};
use thiserror::Error;

use crate::DESCRIPTORS;

static POOL: LazyLock<Option<DescriptorPool>> = LazyLock::new(|| DescriptorPool::decode(DESCRIPTORS).ok());

/// Why a message could not be written as JSON.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum JsonError {
    /// The embedded descriptors do not decode.
    #[error("the descriptors of the protocol files are damaged")]
    Descriptors,
    /// No message has this full name.
    #[error("no message is called {0:?}")]
    UnknownMessage(Box<str>),
    /// The bytes are not a message of that name.
    #[error("not an encoded message of this type")]
    Decode(#[source] prost::DecodeError),
    /// A value has no JSON form.
    #[error("a value has no JSON form")]
    Encode(#[source] serde_json::Error),
}

/// One line of JSON, without a line feed, for `message`, whose full protobuf name is `name`, such as
/// `spire.api.types.Entry`.
///
/// # Errors
/// [`JsonError::UnknownMessage`] for a name that no protocol file declares, [`JsonError::Decode`] when
/// `message` is of another type.
pub fn to_line(name: &str, message: &impl Message) -> Result<String, JsonError> {
    Ok(line(&to_value(name, message)?))
}

/// `message` as a JSON value in the form this module describes; to be printed by [`line()`].
///
/// # Errors
/// As [`to_line`].
pub fn to_value(name: &str, message: &impl Message) -> Result<Value, JsonError> {
    let pool = POOL.as_ref().ok_or(JsonError::Descriptors)?;
    let descriptor = pool.get_message_by_name(name).ok_or_else(|| JsonError::UnknownMessage(name.into()))?;
    let dynamic = DynamicMessage::decode(descriptor, message.encode_to_vec().as_slice()).map_err(JsonError::Decode)?;
    let options =
        SerializeOptions::new().use_proto_field_name(true).skip_default_fields(false).stringify_64_bit_integers(true);
    let value = dynamic.serialize_with_options(serde_json::value::Serializer, &options).map_err(JsonError::Encode)?;
    Ok(canonical(value))
}

/// One line of JSON, without a line feed, with the escapes that make it safe inside HTML. Several messages
/// are printed as an array of their values.
#[must_use]
pub fn line(value: &Value) -> String {
    let plain = value.to_string();
    let mut escaped = String::with_capacity(plain.len());
    for character in plain.chars() {
        // Outside of strings JSON has none of these characters.
        match character {
            '<' => escaped.push_str("\\u003c"),
            '>' => escaped.push_str("\\u003e"),
            '&' => escaped.push_str("\\u0026"),
            '\u{2028}' => escaped.push_str("\\u2028"),
            '\u{2029}' => escaped.push_str("\\u2029"),
            other => escaped.push(other),
        }
    }
    escaped
}

/// Members sorted, nulls gone, whole numbers without a fraction.
fn canonical(value: Value) -> Value {
    match value {
        Value::Object(members) => {
            let mut kept: Vec<(String, Value)> = members
                .into_iter()
                .filter(|(_, member)| !member.is_null())
                .map(|(name, member)| (name, canonical(member)))
                .collect();
            kept.sort_by(|(left, _), (right, _)| left.cmp(right));
            Value::Object(Map::from_iter(kept))
        }
        Value::Array(elements) => {
            Value::Array(elements.into_iter().filter(|element| !element.is_null()).map(canonical).collect())
        }
        Value::Number(number) => Value::Number(whole(&number).unwrap_or(number)),
        other => other,
    }
}

/// The integer that a floating point number is, within the range where a double is exact.
fn whole(number: &Number) -> Option<Number> {
    const EXACT: f64 = 9_007_199_254_740_992.0;
    let double = number.as_f64().filter(|double| number.is_f64() && double.fract() == 0.0 && double.abs() <= EXACT)?;
    // Within ±2^53 every whole double is an i64.
    #[allow(clippy::cast_possible_truncation)]
    Some(Number::from(double as i64))
}
