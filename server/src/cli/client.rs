//! The server's admin socket, seen from a command, and what all commands share.

use std::path::PathBuf;

use prost::Message;
use runtime::console::{Output, Screen};
use runtime::flags::{self, Environment};
use spiffe::id::SpiffeId;
use spiffe_proto::types::selector_match::MatchBehavior;
use spiffe_proto::types::{Selector, SelectorMatch, Spiffeid};
use tonic::transport::Channel;

use super::error::CliError;
use crate::config::DEFAULT_SOCKET_PATH;

/// Answers may be as large as a page of entries; the server bounds them.
pub(super) const MAX_ANSWER: usize = 64 << 20;

/// Where the server is.
#[derive(Clone, Debug, clap::Args)]
pub(super) struct SocketFlags {
    /// Path of the server's admin socket [env: SPIRE_SERVER_PRIVATE_SOCKET].
    #[arg(long = "socketPath", value_name = "PATH", default_value = DEFAULT_SOCKET_PATH)]
    socket_path: String,
    /// Name of the instance, put in place of %i into SPIRE_SERVER_PRIVATE_SOCKET_TEMPLATE.
    #[arg(long = "instance", value_name = "NAME")]
    instance: Option<String>,
}

/// Where the server is, and how the answer is shown.
#[derive(Clone, Debug, clap::Args)]
pub(super) struct Common {
    #[command(flatten)]
    pub(super) socket: SocketFlags,
    /// Form of the output.
    #[arg(long = "output", value_name = "FORM", value_enum, default_value_t = Output::Pretty)]
    pub(super) output: Output,
}

/// A connection that is made when a command is sure that it has something to ask.
#[derive(Debug)]
pub(super) struct Connection {
    path: PathBuf,
}

impl Connection {
    pub(super) fn new(flags: &SocketFlags, environment: &Environment) -> Result<Self, CliError> {
        let instance = flags.instance.as_deref();
        let variable = "SPIRE_SERVER_PRIVATE_SOCKET";
        let path = flags::socket_path(&flags.socket_path, instance, variable, DEFAULT_SOCKET_PATH, environment)?;
        Ok(Self { path })
    }

    pub(super) async fn open(self) -> Result<Channel, CliError> {
        transport::dial::unix(&self.path).await.map_err(|source| CliError::Dial { source })
    }
}

/// One line of JSON for a message whose full protobuf name is `name`.
pub(super) fn json(screen: &mut Screen, name: &str, message: &impl Message) -> Result<(), CliError> {
    let line = spiffe_proto::json::to_line(name, message).map_err(|source| CliError::Show { source })?;
    screen.line(line);
    Ok(())
}

/// A SPIFFE ID given on the command line.
pub(super) fn id(text: &str) -> Result<Spiffeid, CliError> {
    let parsed = SpiffeId::parse(text).map_err(|source| CliError::Id { what: format!("{text:?}"), source })?;
    Ok(Spiffeid { trust_domain: parsed.trust_domain().as_str().to_owned(), path: parsed.path().to_owned() })
}

/// A SPIFFE ID as text; empty if there is none.
pub(super) fn id_text(id: Option<&Spiffeid>) -> String {
    id.map(|id| format!("spiffe://{}{}", id.trust_domain, id.path)).unwrap_or_default()
}

/// Selectors given on the command line; everything after the first colon is the value.
pub(super) fn selectors(texts: &[String]) -> Result<Vec<Selector>, CliError> {
    let parse = |text: &String| match text.split_once(':') {
        Some((kind, value)) => Ok(Selector { r#type: kind.to_owned(), value: value.to_owned() }),
        None => Err(CliError::Selector { value: text.clone() }),
    };
    texts.iter().map(parse).collect()
}

/// Which sets of selectors or trust domains match.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum MatchOn {
    /// Exactly the given ones.
    Exact,
    /// At least one of the given ones.
    Any,
    /// The given ones, and perhaps more.
    Superset,
    /// None but the given ones.
    Subset,
}

impl MatchOn {
    /// The match of selectors; `None` if none are given.
    pub(super) fn selectors(self, texts: &[String]) -> Result<Option<SelectorMatch>, CliError> {
        if texts.is_empty() {
            return Ok(None);
        }
        let behavior = match self {
            Self::Exact => MatchBehavior::MatchExact,
            Self::Any => MatchBehavior::MatchAny,
            Self::Superset => MatchBehavior::MatchSuperset,
            Self::Subset => MatchBehavior::MatchSubset,
        };
        Ok(Some(SelectorMatch { selectors: selectors(texts)?, r#match: behavior.into() }))
    }
}
