use std::collections::BTreeMap;
use std::sync::Mutex;

use spiffe_proto::agent::BanAgentRequest;
use spiffe_proto::entry::{BatchDeleteEntryRequest, CountEntriesRequest, GetAuthorizedEntriesRequest};
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record as SpanRecord};
use tracing::{Event, Metadata, Subscriber};

use super::*;

/// The fields of one audit line.
#[derive(Clone, Debug, Default)]
struct Line(BTreeMap<&'static str, String>);

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        self.0.insert(field.name(), format!("{value:?}"));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.0.insert(field.name(), value.to_owned());
    }
}

/// Keeps the audit lines of this thread.
#[derive(Clone, Default)]
struct Lines(Arc<Mutex<Vec<Line>>>);

impl Lines {
    fn take(&self) -> Vec<Line> {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}

impl Subscriber for Lines {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target() == "audit"
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &SpanRecord<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, event: &Event<'_>) {
        let mut line = Line::default();
        event.record(&mut line);
        self.0.lock().unwrap().push(line);
    }

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

/// The named fields of a line, as far as it has them.
fn told<'a>(line: &'a Line, names: &[&'static str]) -> Vec<Option<&'a str>> {
    names.iter().map(|name| line.0.get(name).map(String::as_str)).collect()
}

#[tokio::test(start_paused = true)]
async fn lines_tell_the_caller_a_local_one_by_its_program() {
    let lines = Lines::default();
    // With only one subscriber in the process, tracing asks that of the thread which first reaches a line, and other
    // tests have none.
    let _other = tracing::Dispatch::new(Lines::default());
    let _guard = tracing::subscriber::set_default(lines.clone());
    let server = Server::start().await;
    let admin = server.with_id("/admin").await;
    lines.take();

    let names = ["type", "status", "caller_uid", "caller_gid", "caller_pid", "caller_path", "caller_addr", "caller_id"];
    EntryClient::new(server.local()).count_entries(CountEntriesRequest::default()).await.unwrap();
    let [line] = lines.take().try_into().unwrap();
    let (uid, gid) = (nix::unistd::geteuid().to_string(), nix::unistd::getegid().to_string());
    let (pid, path) = (std::process::id().to_string(), std::env::current_exe().unwrap());
    let path = path.to_str().unwrap();
    let local = [Some("audit"), Some("success"), Some(&*uid), Some(&*gid), Some(&*pid), Some(path), None, None];
    assert_eq!(told(&line, &names), local);

    let request = BatchDeleteEntryRequest { ids: vec!["none".to_owned()] };
    EntryClient::new(admin).batch_delete_entry(request).await.unwrap();
    let [line] = lines.take().try_into().unwrap();
    let remote = (Some("192.0.2.2"), Some("spiffe://example.org/admin"));
    let expected = [Some("audit"), Some("error"), None, None, None, None, remote.0, remote.1];
    assert_eq!(told(&line, &names), expected);
}

#[tokio::test(start_paused = true)]
async fn refused_calls_tell_who_called_and_why() {
    let lines = Lines::default();
    let _other = tracing::Dispatch::new(Lines::default());
    let _guard = tracing::subscriber::set_default(lines.clone());
    let server = Server::start().await;
    let (caller, id) = server.agent().await;
    let banned =
        BanAgentRequest { id: Some(types::Spiffeid { trust_domain: "example.org".into(), path: id.path().into() }) };
    AgentClient::new(server.local()).ban_agent(banned).await.unwrap();
    lines.take();
    let request = GetAuthorizedEntriesRequest::default();
    let refused = EntryClient::new(caller).get_authorized_entries(request).await.unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied);
    let [line] = lines.take().try_into().unwrap();
    let names = ["status", "status_code", "status_message", "method", "caller_addr", "caller_id"];
    let method = "/spire.api.server.entry.v1.Entry/GetAuthorizedEntries";
    let message = format!("authorization denied for method {method}: agent is banned");
    let expected = ["error", "PermissionDenied", &message, method, "192.0.2.2", id.as_str()];
    assert_eq!(told(&line, &names), expected.map(Some));
}
