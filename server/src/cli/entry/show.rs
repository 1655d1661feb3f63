//! `entry show` and `entry count`.

use runtime::console::{Output, Screen, plural};
use runtime::flags::boolean;
use spiffe_proto::entry::{
    CountEntriesRequest, GetEntryRequest, ListEntriesRequest, ListEntriesResponse, count_entries_request,
    list_entries_request,
};
use spiffe_proto::types::federates_with_match::MatchBehavior;
use spiffe_proto::types::{Entry, FederatesWithMatch};

use super::super::client::{Common, Connection, MatchOn, id, json};
use super::super::error::{CliError, step};
use super::{block, client};

/// A page of entries stays well below what a message may hold.
const PAGE: i32 = 500;

/// Filters; an entry has to pass all that are given.
#[derive(Debug, clap::Args)]
pub(super) struct Filters {
    /// Entries with this parent.
    #[arg(long = "parentID", value_name = "ID", default_value = "", hide_default_value = true)]
    parent_id: String,
    /// Entries for this SPIFFE ID.
    #[arg(long = "spiffeID", value_name = "ID", default_value = "", hide_default_value = true)]
    spiffe_id: String,
    /// Entries of downstream servers.
    #[arg(long = "downstream", value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value = "false", value_parser = boolean, hide_default_value = true)]
    downstream: bool,
    /// Entries with this selector, type:value; can be given more than once.
    #[arg(long = "selector", value_name = "TYPE:VALUE")]
    selectors: Vec<String>,
    /// How the selectors have to match.
    #[arg(long = "matchSelectorsOn", value_enum, value_name = "MATCH", default_value_t = MatchOn::Superset)]
    match_selectors_on: MatchOn,
    /// Entries that federate with this trust domain; can be given more than once.
    #[arg(long = "federatesWith", value_name = "TRUST_DOMAIN")]
    federates_with: Vec<String>,
    /// How the trust domains have to match.
    #[arg(long = "matchFederatesWithOn", value_enum, value_name = "MATCH", default_value_t = MatchOn::Superset)]
    match_federates_with_on: MatchOn,
    /// Entries with this hint.
    #[arg(long = "hint", value_name = "TEXT", default_value = "", hide_default_value = true)]
    hint: String,
}

#[derive(Debug, clap::Args)]
pub(in super::super) struct Show {
    #[command(flatten)]
    pub(super) common: Common,
    /// Only the entry with this id.
    #[arg(long = "entryID", value_name = "ID", default_value = "", hide_default_value = true)]
    entry_id: String,
    #[command(flatten)]
    filters: Filters,
}

#[derive(Debug, clap::Args)]
pub(in super::super) struct Count {
    #[command(flatten)]
    pub(super) common: Common,
    #[command(flatten)]
    filters: Filters,
}

impl Filters {
    fn filter(&self) -> Result<list_entries_request::Filter, CliError> {
        let parsed = |what: &str, text: &str| match text {
            "" => Ok(None),
            text => match id(text) {
                Ok(id) => Ok(Some(id)),
                Err(CliError::Id { source, .. }) => {
                    Err(CliError::Id { what: format!("error parsing {what} {text:?}"), source })
                }
                Err(other) => Err(other),
            },
        };
        let behavior = match self.match_federates_with_on {
            MatchOn::Exact => MatchBehavior::MatchExact,
            MatchOn::Any => MatchBehavior::MatchAny,
            MatchOn::Superset => MatchBehavior::MatchSuperset,
            MatchOn::Subset => MatchBehavior::MatchSubset,
        };
        let by_federates_with = (!self.federates_with.is_empty())
            .then(|| FederatesWithMatch { trust_domains: self.federates_with.clone(), r#match: behavior.into() });
        Ok(list_entries_request::Filter {
            by_spiffe_id: parsed("SPIFFE ID", &self.spiffe_id)?,
            by_parent_id: parsed("parent ID", &self.parent_id)?,
            by_selectors: self.match_selectors_on.selectors(&self.selectors)?,
            by_federates_with,
            by_hint: (!self.hint.is_empty()).then(|| self.hint.clone()),
            by_downstream: Some(self.downstream),
        })
    }
}

pub(super) async fn show(flags: &Show, connection: Connection, screen: &mut Screen) -> Result<(), CliError> {
    let filters = &flags.filters;
    let entry_id = &flags.entry_id;
    let filtered = !filters.parent_id.is_empty() || !filters.spiffe_id.is_empty() || !filters.selectors.is_empty();
    if !entry_id.is_empty() && filtered {
        return Err(CliError::Flags("the -entryID flag can't be combined with others"));
    }
    let filter = filters.filter()?;
    let mut client = client(connection).await?;
    let mut all = ListEntriesResponse::default();
    if entry_id.is_empty() {
        let mut page_token = String::new();
        loop {
            let request =
                ListEntriesRequest { filter: Some(filter.clone()), output_mask: None, page_size: PAGE, page_token };
            let page = client.list_entries(request).await.map_err(step("error fetching entries"))?.into_inner();
            all.entries.extend(page.entries);
            if page.next_page_token.is_empty() {
                break;
            }
            page_token = page.next_page_token;
        }
    } else {
        let request = GetEntryRequest { id: entry_id.clone(), output_mask: None };
        let doing = format!("error fetching entry ID {entry_id}");
        all.entries.push(client.get_entry(request).await.map_err(step(doing))?.into_inner());
    }
    sort(&mut all.entries);
    match flags.common.output {
        Output::Json => json(screen, "spire.api.server.entry.v1.ListEntriesResponse", &all),
        Output::Pretty => {
            pretty(&all.entries, screen);
            Ok(())
        }
    }
}

pub(super) async fn count(flags: &Count, connection: Connection, screen: &mut Screen) -> Result<(), CliError> {
    let filter = flags.filters.filter()?;
    let filter = count_entries_request::Filter {
        by_spiffe_id: filter.by_spiffe_id,
        by_parent_id: filter.by_parent_id,
        by_selectors: filter.by_selectors,
        by_federates_with: filter.by_federates_with,
        by_hint: filter.by_hint,
        by_downstream: filter.by_downstream,
    };
    let mut client = client(connection).await?;
    let answer = client.count_entries(CountEntriesRequest { filter: Some(filter) }).await?.into_inner();
    match flags.common.output {
        Output::Json => json(screen, "spire.api.server.entry.v1.CountEntriesResponse", &answer),
        Output::Pretty => {
            let count = usize::try_from(answer.count).unwrap_or(0);
            screen.line(format!("{count} registration {}", plural(count, "entry", "entries")));
            Ok(())
        }
    }
}

/// By SPIFFE ID, parent, lifetimes and selectors, the selectors of each entry sorted too.
pub(super) fn sort(entries: &mut [Entry]) {
    for entry in entries.iter_mut() {
        entry.selectors.sort_by(|a, b| (&a.r#type, &a.value).cmp(&(&b.r#type, &b.value)));
    }
    entries.sort_by(|a, b| {
        let ids = |entry: &Entry| {
            let parts = |id: &Option<spiffe_proto::types::Spiffeid>| {
                id.as_ref().map(|id| (id.trust_domain.clone(), id.path.clone()))
            };
            (parts(&entry.spiffe_id), parts(&entry.parent_id), entry.x509_svid_ttl, entry.jwt_svid_ttl)
        };
        let selectors = |entry: &Entry| {
            let pairs: Vec<_> = entry.selectors.iter().map(|s| (s.r#type.clone(), s.value.clone())).collect();
            (pairs.len(), pairs)
        };
        ids(a).cmp(&ids(b)).then_with(|| selectors(a).cmp(&selectors(b)))
    });
}

pub(super) fn pretty(entries: &[Entry], screen: &mut Screen) {
    screen.line(format!("Found {} {}", entries.len(), plural(entries.len(), "entry", "entries")));
    for entry in entries {
        screen.out.push_str(&block(entry));
    }
}
