//! JSON read without the tolerance that attackers live on.
//!
//! `serde_json` alone keeps the last of two equal members and rounds long numbers; both let two
//! readers see two documents. Here repeated members (escaped or not), numbers that no double can
//! hold, nesting beyond 128 and bytes after the end are errors.

use std::cell::Cell;
use std::fmt;
use std::marker::PhantomData;

use serde::de::value::MapAccessDeserializer;
use serde::de::{Deserialize, DeserializeSeed, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

/// Why bytes are not a JSON document that everybody reads alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum JsonError {
    /// Not JSON, not UTF-8, too deep, or followed by other bytes.
    #[error("not a JSON document (line {line}, column {column})")]
    Syntax {
        /// Line of the first fault, from 1.
        line: usize,
        /// Column of the first fault.
        column: usize,
    },
    /// An object names a member twice.
    #[error("JSON object has the same member twice")]
    DuplicateMember,
    /// A number whose value depends on the reader.
    #[error("JSON number cannot be represented exactly")]
    InexactNumber,
}

/// Integers up to here survive a trip through a double.
pub(crate) const EXACT: u64 = 1 << 53;

/// Reads one document that fills `bytes`.
pub(crate) fn parse(bytes: &[u8]) -> Result<Value, JsonError> {
    let reason = Cell::new(None);
    let mut deserializer = serde_json::Deserializer::from_slice(bytes);
    let parsed =
        Strict { reason: &reason }.deserialize(&mut deserializer).and_then(|value| deserializer.end().map(|()| value));
    parsed.map_err(|error| reason.get().unwrap_or(JsonError::Syntax { line: error.line(), column: error.column() }))
}

#[derive(Clone, Copy)]
struct Strict<'a> {
    reason: &'a Cell<Option<JsonError>>,
}

impl Strict<'_> {
    fn refuse<T, E: serde::de::Error>(self, reason: JsonError) -> Result<T, E> {
        self.reason.set(Some(reason));
        Err(E::custom("refused"))
    }
}

impl<'de> DeserializeSeed<'de> for Strict<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Strict<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(Value::Number(value.into()))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(Value::Number(value.into()))
    }

    fn visit_f64<E: serde::de::Error>(self, value: f64) -> Result<Value, E> {
        // A float this large is either an exponent nobody needs or an integer that did not fit
        // and has already lost digits.
        if value.abs() >= EXACT as f64 {
            return self.refuse(JsonError::InexactNumber);
        }
        match Number::from_f64(value) {
            Some(number) => Ok(Value::Number(number)),
            None => self.refuse(JsonError::InexactNumber),
        }
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(Value::String(value.to_owned()))
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(Value::String(value))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let mut values = Vec::new();
        while let Some(value) = items.next_element_seed(self)? {
            values.push(value);
        }
        Ok(Value::Array(values))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut members: A) -> Result<Value, A::Error> {
        let mut object = Map::new();
        while let Some(name) = members.next_key::<String>()? {
            if object.contains_key(&name) {
                self.reason.set(Some(JsonError::DuplicateMember));
                return Err(A::Error::custom("refused"));
            }
            object.insert(name, members.next_value_seed(self)?);
        }
        Ok(Value::Object(object))
    }
}

/// Reads one document that fills `bytes` and is an object. serde alone would read a list as the members in their order.
/// `form` says what was expected, such as `{"entries": […]}`.
///
/// # Errors
///
/// What is wrong, and where: `invalid type: sequence, expected {"entries": […]} at line 1 column 0`.
pub fn from_object<'de, T: Deserialize<'de>>(bytes: &'de [u8], form: &'static str) -> Result<T, serde_json::Error> {
    let mut deserializer = serde_json::Deserializer::from_slice(bytes);
    let value = ObjectOnly { form, read: PhantomData }.deserialize(&mut deserializer)?;
    deserializer.end().map(|()| value)
}

/// A value inside a document that is read from an object and from nothing else, as by [`from_object`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Object<T>(pub T);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Object<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        ObjectOnly { form: "an object, {\"name\": value, …}", read: PhantomData }.deserialize(deserializer).map(Self)
    }
}

struct ObjectOnly<T> {
    form: &'static str,
    read: PhantomData<T>,
}

impl<'de, T: Deserialize<'de>> DeserializeSeed<'de> for ObjectOnly<T> {
    type Value = T;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<T, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de, T: Deserialize<'de>> Visitor<'de> for ObjectOnly<T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.form)
    }

    fn visit_map<A: MapAccess<'de>>(self, members: A) -> Result<T, A::Error> {
        T::deserialize(MapAccessDeserializer::new(members))
    }
}

/// A number as a whole number, if it is one: `1e3` counts, `1.5` does not.
pub(crate) fn as_unsigned(value: &Value) -> Option<u64> {
    value.as_u64().or_else(|| {
        let float = value.as_f64()?;
        // `parse` let no larger float pass, so the conversion is exact.
        (float >= 0.0 && float.fract() == 0.0 && float < EXACT as f64).then_some(float as u64)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, PartialEq, serde::Deserialize)]
    struct Outer {
        inner: Vec<Object<Inner>>,
    }

    #[derive(Debug, PartialEq, serde::Deserialize)]
    struct Inner {
        name: String,
    }

    #[test]
    fn an_array_where_an_object_belongs_is_refused_by_the_right_form() {
        let read = |text: &str| from_object::<Outer>(text.as_bytes(), "{\"inner\": […]}").map_err(|e| e.to_string());
        let right = Outer { inner: vec![Object(Inner { name: "x".into() })] };
        assert_eq!(read(" {\"inner\": [{\"name\": \"x\"}]}\r\n"), Ok(right));
        let wrong = |text| read(text).unwrap_err();
        assert_eq!(
            wrong("[[{\"name\": \"x\"}]]"),
            "invalid type: sequence, expected {\"inner\": […]} at line 1 column 0"
        );
        assert_eq!(
            wrong("{\"inner\": [[\"x\"]]}"),
            "invalid type: sequence, expected an object, {\"name\": value, …} at line 1 column 11"
        );
        assert_eq!(wrong("{\"inner\": []} x"), "trailing characters at line 1 column 15");
    }
}
