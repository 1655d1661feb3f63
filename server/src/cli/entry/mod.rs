//! `entry create`, `update`, `delete`, `show`, `count`.

mod advice;
mod data;
mod show;

use runtime::console::{Output, Screen, go_time};
use runtime::flags::boolean;
use spiffe_proto::entry::entry_client::EntryClient;
use spiffe_proto::entry::{
    BatchCreateEntryRequest, BatchDeleteEntryRequest, BatchDeleteEntryResponse, BatchUpdateEntryRequest,
    GetEntryRequest,
};
use spiffe_proto::types::entry::AdditionalAttributes;
use spiffe_proto::types::{Entry, Spiffeid, Status};
use tonic::transport::Channel;

use super::client::{Common, Connection, MAX_ANSWER, SocketFlags, id, id_text, json, selectors};
use super::error::{CliError, code_name, step};

/// Register workloads and nodes.
#[derive(Debug, clap::Subcommand)]
pub(super) enum EntryCommand {
    /// Create an entry, or those of a file.
    #[command(after_help = "\
Examples:
  A workload that runs as Unix user 1000 on the nodes of an alias:
    signet-server entry create -parentID spiffe://example.org/nodes \\
        -spiffeID spiffe://example.org/web -selector unix:uid:1000 -dns web.example.org

  An alias for all nodes of one kind:
    signet-server entry create -node -spiffeID spiffe://example.org/nodes -selector x509pop:subject:cn:web

  Many at once:
    signet-server entry create -data entries.json")]
    Create(Create),
    /// Replace an entry, or those of a file: what is not given is not kept.
    Update(Update),
    /// Delete an entry, or those of a file.
    Delete(Delete),
    /// Show entries.
    Show(show::Show),
    /// Count entries.
    Count(show::Count),
}

/// What an entry says.
#[derive(Debug, clap::Args)]
struct Fields {
    /// SPIFFE ID of the parent: an agent, or an alias of agents.
    #[arg(long = "parentID", value_name = "ID", default_value = "", hide_default_value = true)]
    parent_id: String,
    /// SPIFFE ID that the workload gets.
    #[arg(long = "spiffeID", value_name = "ID", default_value = "", hide_default_value = true)]
    spiffe_id: String,
    /// What the workload has to be, type:value; can be given more than once, and all have to hold.
    #[arg(long = "selector", value_name = "TYPE:VALUE")]
    selectors: Vec<String>,
    /// Lifetime of its X.509-SVIDs in seconds; 0 is the server's default.
    #[arg(long = "x509SVIDTTL", value_name = "SECONDS", default_value_t = 0, allow_negative_numbers = true)]
    x509_svid_ttl: i64,
    /// Lifetime of its JWT-SVIDs in seconds; 0 is the server's default.
    #[arg(long = "jwtSVIDTTL", value_name = "SECONDS", default_value_t = 0, allow_negative_numbers = true)]
    jwt_svid_ttl: i64,
    /// Trust domain whose bundle it gets too; can be given more than once.
    #[arg(long = "federatesWith", value_name = "TRUST_DOMAIN")]
    federates_with: Vec<String>,
    /// Let it use the server's management APIs.
    #[arg(long = "admin", value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value = "false", value_parser = boolean, hide_default_value = true)]
    admin: bool,
    /// It is a downstream server.
    #[arg(long = "downstream", value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value = "false", value_parser = boolean, hide_default_value = true)]
    downstream: bool,
    /// Its SVID is stored by a plugin instead of fetched.
    #[arg(long = "storeSVID", value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value = "false", value_parser = boolean, hide_default_value = true)]
    store_svid: bool,
    /// When the entry ends, in seconds since 1970; 0 is never.
    #[arg(long = "entryExpiry", value_name = "SECONDS", default_value_t = 0, allow_negative_numbers = true)]
    entry_expiry: i64,
    /// DNS name of its X.509-SVIDs; can be given more than once.
    #[arg(long = "dns", value_name = "NAME")]
    dns_names: Vec<String>,
    /// Tells the workload which SVID is for what, if it gets several.
    #[arg(long = "hint", value_name = "TEXT", default_value = "", hide_default_value = true)]
    hint: String,
    /// Sign its X.509-SVID only when it is asked for.
    #[arg(long = "disableX509SVIDPrefetch", value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true", value_parser = boolean)]
    disable_x509_svid_prefetch: Option<bool>,
    /// Give each of its JWT-SVIDs an id of its own; none is then cached.
    #[arg(long = "jwtSVIDIncludeJTI", value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true", value_parser = boolean)]
    jwt_svid_include_jti: Option<bool>,
    /// File of entries as JSON, or - for standard input; other flags are then ignored.
    #[arg(long = "data", value_name = "PATH", default_value = "", hide_default_value = true)]
    data: String,
}

#[derive(Debug, clap::Args)]
pub(super) struct Create {
    #[command(flatten)]
    common: Common,
    /// Id of the entry; the server makes one without it.
    #[arg(long = "entryID", value_name = "ID", default_value = "", hide_default_value = true)]
    entry_id: String,
    /// The entry stands for nodes: its selectors are those of agents, its parent is the server.
    #[arg(long = "node", value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value = "false", value_parser = boolean, hide_default_value = true)]
    node: bool,
    #[command(flatten)]
    fields: Fields,
}

#[derive(Debug, clap::Args)]
pub(super) struct Update {
    #[command(flatten)]
    common: Common,
    /// Id of the entry.
    #[arg(long = "entryID", value_name = "ID", default_value = "", hide_default_value = true)]
    entry_id: String,
    #[command(flatten)]
    fields: Fields,
}

#[derive(Debug, clap::Args)]
pub(super) struct Delete {
    #[command(flatten)]
    common: Common,
    /// Id of the entry.
    #[arg(long = "entryID", value_name = "ID", default_value = "", hide_default_value = true)]
    entry_id: String,
    /// File of ids, {"ids": […]}, or - for standard input.
    #[arg(long = "file", value_name = "PATH", default_value = "", hide_default_value = true)]
    file: String,
}

impl EntryCommand {
    pub(super) fn socket(&self) -> &SocketFlags {
        match self {
            Self::Create(flags) => &flags.common.socket,
            Self::Update(flags) => &flags.common.socket,
            Self::Delete(flags) => &flags.common.socket,
            Self::Show(flags) => &flags.common.socket,
            Self::Count(flags) => &flags.common.socket,
        }
    }
}

async fn client(connection: Connection) -> Result<EntryClient<Channel>, CliError> {
    Ok(EntryClient::new(connection.open().await?).max_decoding_message_size(MAX_ANSWER))
}

pub(super) async fn run(command: &EntryCommand, connection: Connection, screen: &mut Screen) -> Result<(), CliError> {
    match command {
        EntryCommand::Create(flags) => create(flags, connection, screen).await,
        EntryCommand::Update(flags) => update(flags, connection, screen).await,
        EntryCommand::Delete(flags) => delete(flags, connection, screen).await,
        EntryCommand::Show(flags) => show::show(flags, connection, screen).await,
        EntryCommand::Count(flags) => show::count(flags, connection, screen).await,
    }
}

impl Fields {
    /// The entry, once flags that belong together were checked.
    fn entry(&self, entry_id: &str, parent_id: Spiffeid) -> Result<Entry, CliError> {
        let ttl = |seconds: i64, out_of_range: &'static str| {
            i32::try_from(seconds).map_err(|_| CliError::Flags(out_of_range))
        };
        let attributes = (self.disable_x509_svid_prefetch, self.jwt_svid_include_jti);
        Ok(Entry {
            id: entry_id.to_owned(),
            spiffe_id: Some(id(&self.spiffe_id)?),
            parent_id: Some(parent_id),
            selectors: selectors(&self.selectors)?,
            x509_svid_ttl: ttl(self.x509_svid_ttl, "invalid value for X509 SVID TTL: out of range")?,
            federates_with: self.federates_with.clone(),
            admin: self.admin,
            downstream: self.downstream,
            expires_at: self.entry_expiry,
            dns_names: self.dns_names.clone(),
            store_svid: self.store_svid,
            jwt_svid_ttl: ttl(self.jwt_svid_ttl, "invalid value for JWT SVID TTL: out of range")?,
            hint: self.hint.clone(),
            additional_attributes: (attributes != (None, None)).then(|| AdditionalAttributes {
                disable_x509_svid_prefetch: attributes.0.unwrap_or(false),
                jwt_svid_include_jti: attributes.1.unwrap_or(false),
            }),
            ..Entry::default()
        })
    }

    fn check_ttls(&self) -> Result<(), CliError> {
        if self.x509_svid_ttl < 0 {
            return Err(CliError::Flags("a positive x509-SVID TTL is required"));
        }
        if self.jwt_svid_ttl < 0 {
            return Err(CliError::Flags("a positive JWT-SVID TTL is required"));
        }
        Ok(())
    }
}

impl Create {
    fn entries(&self) -> Result<Vec<Entry>, CliError> {
        let fields = &self.fields;
        if !fields.data.is_empty() {
            return data::entries(&fields.data);
        }
        if fields.selectors.is_empty() {
            return Err(CliError::Flags("at least one selector is required"));
        }
        if self.node && !fields.federates_with.is_empty() {
            return Err(CliError::Flags("node entries can not federate"));
        }
        if fields.parent_id.is_empty() && !self.node {
            return Err(CliError::Flags("a parent ID is required if the node flag is not set"));
        }
        if fields.spiffe_id.is_empty() {
            return Err(CliError::Flags("a SPIFFE ID is required"));
        }
        fields.check_ttls()?;
        let parent = if self.node {
            Spiffeid { trust_domain: id(&fields.spiffe_id)?.trust_domain, path: "/spire/server".to_owned() }
        } else {
            id(&fields.parent_id)?
        };
        Ok(vec![fields.entry(&self.entry_id, parent)?])
    }
}

impl Update {
    fn entries(&self) -> Result<Vec<Entry>, CliError> {
        let fields = &self.fields;
        if !fields.data.is_empty() {
            return data::entries(&fields.data);
        }
        if self.entry_id.is_empty() {
            return Err(CliError::Flags("entry ID is required"));
        }
        if fields.selectors.is_empty() {
            return Err(CliError::Flags("at least one selector is required"));
        }
        if fields.parent_id.is_empty() {
            return Err(CliError::Flags("a parent ID is required"));
        }
        if fields.spiffe_id.is_empty() {
            return Err(CliError::Flags("a SPIFFE ID is required"));
        }
        fields.check_ttls()?;
        Ok(vec![fields.entry(&self.entry_id, id(&fields.parent_id)?)?])
    }
}

/// Warns of selectors that look like slips, each once. Standard output stays as scripts expect it.
fn warn(entries: &[Entry], screen: &mut Screen) {
    let advice = entries.iter().flat_map(|entry| &entry.selectors).filter_map(advice::about);
    for text in advice.collect::<std::collections::BTreeSet<_>>() {
        screen.error_line(format!("Warning: {text}"));
    }
}

async fn create(flags: &Create, connection: Connection, screen: &mut Screen) -> Result<(), CliError> {
    let entries = flags.entries()?;
    warn(&entries, screen);
    let mut client = client(connection).await?;
    let request = BatchCreateEntryRequest { entries: entries.clone(), output_mask: None };
    let mut answer = client.batch_create_entry(request).await?.into_inner();
    // A refused entry is not in the answer; it is shown as it was asked for.
    for (result, asked) in answer.results.iter_mut().zip(entries) {
        if code(result.status.as_ref()) != 0 {
            result.entry = Some(asked);
        }
    }
    if flags.common.output == Output::Json {
        return json(screen, "spire.api.server.entry.v1.BatchCreateEntryResponse", &answer);
    }
    let results = answer.results.into_iter().map(|result| (result.status, result.entry));
    pretty_batch("create", results.collect(), screen)
}

async fn update(flags: &Update, connection: Connection, screen: &mut Screen) -> Result<(), CliError> {
    let mut entries = flags.entries()?;
    warn(&entries, screen);
    let mut client = client(connection).await?;
    let asked = (flags.fields.disable_x509_svid_prefetch, flags.fields.jwt_svid_include_jti);
    if flags.fields.data.is_empty() && asked != (None, None) {
        // The attributes are one message: what was not given has to be taken from the entry as it is.
        let request = GetEntryRequest { id: flags.entry_id.clone(), output_mask: None };
        let doing = "failed to fetch existing entry to merge additional attributes";
        let existing = client.get_entry(request).await.map_err(step(doing))?.into_inner();
        let kept = existing.additional_attributes.unwrap_or_default();
        for entry in &mut entries {
            entry.additional_attributes = Some(AdditionalAttributes {
                disable_x509_svid_prefetch: asked.0.unwrap_or(kept.disable_x509_svid_prefetch),
                jwt_svid_include_jti: asked.1.unwrap_or(kept.jwt_svid_include_jti),
            });
        }
    }
    let request = BatchUpdateEntryRequest { entries: entries.clone(), input_mask: None, output_mask: None };
    let mut answer = client.batch_update_entry(request).await?.into_inner();
    for (result, asked) in answer.results.iter_mut().zip(entries) {
        if code(result.status.as_ref()) != 0 {
            result.entry = Some(asked);
        }
    }
    if flags.common.output == Output::Json {
        return json(screen, "spire.api.server.entry.v1.BatchUpdateEntryResponse", &answer);
    }
    let results = answer.results.into_iter().map(|result| (result.status, result.entry));
    pretty_batch("update", results.collect(), screen)
}

async fn delete(flags: &Delete, connection: Connection, screen: &mut Screen) -> Result<(), CliError> {
    let ids = if !flags.file.is_empty() {
        data::ids(&flags.file)?
    } else if flags.entry_id.is_empty() {
        return Err(CliError::Flags("an entry ID is required"));
    } else {
        vec![flags.entry_id.clone()]
    };
    let mut client = client(connection).await?;
    let answer = client.batch_delete_entry(BatchDeleteEntryRequest { ids }).await?.into_inner();
    match flags.common.output {
        Output::Json => json(screen, "spire.api.server.entry.v1.BatchDeleteEntryResponse", &answer),
        Output::Pretty => pretty_delete(&answer, screen),
    }
}

fn code(status: Option<&Status>) -> i32 {
    // A result without verdict is no success.
    status.map_or(2, |status| status.code)
}

fn failed(what: &str, status: Option<&Status>) -> String {
    let message = status.map_or("", |status| &status.message);
    format!("{what} (code: {}, msg: {message:?})", code_name(code(status)))
}

fn pretty_batch(
    verb: &'static str,
    results: Vec<(Option<Status>, Option<Entry>)>,
    screen: &mut Screen,
) -> Result<(), CliError> {
    let (done, left): (Vec<_>, Vec<_>) = results.into_iter().partition(|(status, _)| code(status.as_ref()) == 0);
    for (_, entry) in done {
        screen.out.push_str(&block(&entry.unwrap_or_default()));
    }
    if left.is_empty() {
        return Ok(());
    }
    for (status, entry) in left {
        screen.error_line(format!("{}:", failed(&format!("Failed to {verb} the following entry"), status.as_ref())));
        screen.err.push_str(&block(&entry.unwrap_or_default()));
    }
    Err(CliError::Batch(match verb {
        "create" => "failed to create one or more entries",
        _ => "failed to update one or more entries",
    }))
}

fn pretty_delete(answer: &BatchDeleteEntryResponse, screen: &mut Screen) -> Result<(), CliError> {
    let (done, left): (Vec<_>, Vec<_>) = answer.results.iter().partition(|result| code(result.status.as_ref()) == 0);
    for result in &done {
        screen.line(format!("Deleted entry with ID: {}", result.id));
    }
    if !done.is_empty() {
        screen.out.push_str("\n\n");
    }
    for result in &left {
        let what = format!("Failed to delete entry with ID {}", result.id);
        screen.error_line(failed(&what, result.status.as_ref()));
    }
    // The summary has no line end in SPIRE; here it has one, so that the prompt does not follow it.
    if left.is_empty() {
        screen.line(format!("Deleted {} entries successfully", done.len()));
        return Ok(());
    }
    screen.out.push_str("\n\n");
    screen.line(if done.is_empty() {
        format!("Failed to delete {} entries", left.len())
    } else {
        format!("Deleted {} entries successfully, but failed to delete {} entries", done.len(), left.len())
    });
    Err(CliError::Batch("failed to delete one or more entries"))
}

/// An entry in lines, with an empty one at the end.
fn block(entry: &Entry) -> String {
    let mut lines = Screen::new();
    let ttl = |seconds: i32| if seconds == 0 { "default".to_owned() } else { seconds.to_string() };
    lines.line(format!("Entry ID                : {}", if entry.id.is_empty() { "(none)" } else { &entry.id }));
    lines.line(format!("SPIFFE ID               : {}", id_text(entry.spiffe_id.as_ref())));
    lines.line(format!("Parent ID               : {}", id_text(entry.parent_id.as_ref())));
    lines.line(format!("Revision                : {}", entry.revision_number));
    if entry.downstream {
        lines.line("Downstream              : true");
    }
    lines.line(format!("X509-SVID TTL           : {}", ttl(entry.x509_svid_ttl)));
    lines.line(format!("JWT-SVID TTL            : {}", ttl(entry.jwt_svid_ttl)));
    if entry.expires_at != 0 {
        lines.line(format!("Expiration time         : {}", go_time(entry.expires_at)));
    }
    for selector in &entry.selectors {
        lines.line(format!("Selector                : {}:{}", selector.r#type, selector.value));
    }
    for trust_domain in &entry.federates_with {
        lines.line(format!("FederatesWith           : {trust_domain}"));
    }
    for name in &entry.dns_names {
        lines.line(format!("DNS name                : {name}"));
    }
    if entry.admin {
        lines.line("Admin                   : true");
    }
    if entry.store_svid {
        lines.line("StoreSvid               : true");
    }
    if !entry.hint.is_empty() {
        lines.line(format!("Hint                    : {}", entry.hint));
    }
    if let Some(attributes) = &entry.additional_attributes {
        if attributes.disable_x509_svid_prefetch {
            lines.line("DisableX509SvidPrefetch : true");
        }
        if attributes.jwt_svid_include_jti {
            lines.line("JwtSvidIncludeJti       : true");
        }
    }
    lines.line("");
    lines.out
}

#[cfg(test)]
mod tests;
