//! `agent_path_template`: the part of Go's template language that agent paths need.
//!
//! Text and `{{ .Field.Field }}` are understood. Functions and pipelines are refused when the
//! configuration is read, with a sentence, rather than when the first node comes.

use crate::id::{IdError, SpiffeId, TrustDomain};

/// Why a template cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TemplateError {
    /// `{{` without `}}`.
    #[error("agent path template has \"{{{{\" without \"}}}}\"")]
    Unclosed,
    /// Something else than `.Field` between the braces.
    #[error("agent path template only understands {{{{ .Field }}}}, not functions or pipelines")]
    Unsupported,
    /// A field that the attestor does not have.
    #[error("agent path template names an unknown field")]
    UnknownField {
        /// The name, without the dot.
        name: String,
    },
    /// The path would not begin with a slash.
    #[error("agent path template does not begin with a slash")]
    NoSlash,
    /// A field that this node has no value for.
    #[error("node has no value for a field of the agent path template")]
    MissingValue,
    /// The filled-in path is not part of a SPIFFE ID.
    #[error("agent path is not a legal SPIFFE ID path")]
    Path(#[source] IdError),
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Piece {
    Text(String),
    Field(Vec<String>),
}

/// A parsed template.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PathTemplate(Vec<Piece>);

impl PathTemplate {
    /// Parses `template`; `fields` are the first names that may follow the dot.
    pub fn parse(template: &str, fields: &[&str]) -> Result<Self, TemplateError> {
        if !template.starts_with('/') {
            return Err(TemplateError::NoSlash);
        }
        let mut pieces = Vec::new();
        let mut rest = template;
        while let Some((text, action)) = rest.split_once("{{") {
            let (action, after) = action.split_once("}}").ok_or(TemplateError::Unclosed)?;
            pieces.push(Piece::Text(text.to_owned()));
            pieces.push(Piece::Field(field(action, fields)?));
            rest = after;
        }
        pieces.push(Piece::Text(rest.to_owned()));
        Ok(Self(pieces))
    }

    /// The agent id `spiffe://td/spire/agent<path>`; `value` gives the value of a field.
    pub fn agent_id(
        &self,
        trust_domain: &TrustDomain,
        value: impl Fn(&[String]) -> Option<String>,
    ) -> Result<SpiffeId, TemplateError> {
        let mut path = String::from("/spire/agent");
        for piece in &self.0 {
            match piece {
                Piece::Text(text) => path.push_str(text),
                Piece::Field(names) => path.push_str(&value(names).ok_or(TemplateError::MissingValue)?),
            }
        }
        SpiffeId::from_path(trust_domain, &path).map_err(TemplateError::Path)
    }
}

fn field(action: &str, fields: &[&str]) -> Result<Vec<String>, TemplateError> {
    let path = action.trim().strip_prefix('.').ok_or(TemplateError::Unsupported)?;
    let legal = |name: &str| !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
    let names: Vec<String> = path.split('.').map(str::to_owned).collect();
    if !names.iter().all(|name| legal(name)) {
        return Err(TemplateError::Unsupported);
    }
    match names.first() {
        Some(first) if fields.contains(&first.as_str()) => Ok(names),
        _ => Err(TemplateError::UnknownField { name: path.to_owned() }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FIELDS: &[&str] = &["PluginName", "Subject"];

    fn id_of(template: &str) -> Result<String, TemplateError> {
        let trust_domain = TrustDomain::parse("example.org").unwrap();
        PathTemplate::parse(template, FIELDS)?
            .agent_id(&trust_domain, |names| match names {
                [only] if only == "PluginName" => Some("x509pop".to_owned()),
                [first, second] if first == "Subject" && second == "CommonName" => Some("node 1".replace(' ', "-")),
                _ => None,
            })
            .map(|id| id.to_string())
    }

    #[test]
    fn fields_are_filled_in() {
        assert_eq!(
            id_of("/{{ .PluginName }}/{{.Subject.CommonName}}/x").unwrap(),
            "spiffe://example.org/spire/agent/x509pop/node-1/x"
        );
    }

    #[test]
    fn mistakes_are_found_when_parsing() {
        assert_eq!(id_of("{{ .PluginName }}"), Err(TemplateError::NoSlash));
        assert_eq!(id_of("/{{ .PluginName"), Err(TemplateError::Unclosed));
        assert_eq!(id_of("/{{ .PluginName | lower }}"), Err(TemplateError::Unsupported));
        assert_eq!(id_of("/{{ lower .PluginName }}"), Err(TemplateError::Unsupported));
        assert_eq!(id_of("/{{ .Nope }}"), Err(TemplateError::UnknownField { name: "Nope".to_owned() }));
    }

    #[test]
    fn mistakes_of_a_node_are_found_when_filling_in() {
        assert_eq!(id_of("/{{ .Subject.Nope }}"), Err(TemplateError::MissingValue));
        assert_eq!(id_of("/{{ .PluginName }}/"), Err(TemplateError::Path(IdError::TrailingSlash)));
    }
}
