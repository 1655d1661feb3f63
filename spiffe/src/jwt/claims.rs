//! The payload of a JWT-SVID.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::{Map, Value};

use super::JwtError;
use crate::id::SpiffeId;
use crate::json;

/// The last second of the year 9999: later dates are refused, since they cannot be told in other
/// formats and invite overflows.
const LAST_DATE: f64 = 253_402_300_799.0;

/// What the payload says, with the claims that JWT-SVID and RFC 7519 define read out.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Claims {
    /// `sub`.
    pub sub: SpiffeId,
    /// `aud`, always as a list.
    pub aud: Vec<String>,
    /// `exp`.
    pub exp: SystemTime,
    /// `nbf`.
    pub nbf: Option<SystemTime>,
    /// `iat`.
    pub iat: Option<SystemTime>,
    /// Every member of the payload, also those above.
    pub all: Map<String, Value>,
}

impl Claims {
    pub(super) fn read(all: Map<String, Value>) -> Result<Self, JwtError> {
        let sub = all.get("sub").and_then(Value::as_str).ok_or(JwtError::Subject)?;
        let sub = SpiffeId::parse(sub).map_err(JwtError::Id)?;
        if sub.path().is_empty() {
            return Err(JwtError::NoPath);
        }
        let aud = match all.get("aud") {
            Some(Value::String(one)) => vec![one.clone()],
            Some(Value::Array(many)) if !many.is_empty() => many
                .iter()
                .map(|value| value.as_str().map(str::to_owned).ok_or(JwtError::Audience))
                .collect::<Result<_, _>>()?,
            _ => return Err(JwtError::Audience),
        };
        let exp = all.get("exp").and_then(date).ok_or(JwtError::Expiry)?;
        let optional = |name: &str| all.get(name).map(|value| date(value).ok_or(JwtError::Date)).transpose();
        Ok(Self { sub, aud, exp, nbf: optional("nbf")?, iat: optional("iat")?, all })
    }
}

/// A NumericDate (RFC 7519, section 2): seconds, fractions allowed.
fn date(value: &Value) -> Option<SystemTime> {
    let seconds = value.as_f64().filter(|seconds| seconds.abs() <= LAST_DATE)?;
    let distance = Duration::try_from_secs_f64(seconds.abs()).ok()?;
    if seconds >= 0.0 { UNIX_EPOCH.checked_add(distance) } else { UNIX_EPOCH.checked_sub(distance) }
}

/// Turns integers that a double would round into texts.
pub(crate) fn exact(value: Value) -> Value {
    match value {
        Value::Number(number) => {
            let large = number.as_u64().is_some_and(|n| n > json::EXACT)
                || number.as_i64().is_some_and(|n| n.unsigned_abs() > json::EXACT);
            if large { Value::String(number.to_string()) } else { Value::Number(number) }
        }
        Value::Array(values) => Value::Array(values.into_iter().map(exact).collect()),
        Value::Object(members) => {
            Value::Object(members.into_iter().map(|(name, value)| (name, exact(value))).collect())
        }
        other => other,
    }
}
