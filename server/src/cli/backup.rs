//! `backup create`, `verify`, `restore`.

use std::fs::OpenOptions;
use std::io::BufReader;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use runtime::clock::Clock;
use runtime::console::Screen;
use runtime::entropy::Entropy;
use runtime::flags::Environment;
use spiffe_proto::backup::CreateRequest;
use spiffe_proto::backup::backup_client::BackupClient;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::client::{Connection, MAX_ANSWER, SocketFlags};
use super::error::CliError;
use super::run::Run;
use crate::backup::file::{self, Contents, Writer};
use crate::backup::restore::{self, Target};
use crate::backup::{BackupError, Counts, Kind};
use crate::state::State;

const CREATE: &str = "\
Examples:
  Without private keys: whoever reads the file can issue nothing.
    signet-server backup create signet.backup

  With the key file that the configuration names; keep the backup as you keep that:
    signet-server backup create -withKeys -config conf/server/server.conf signet.backup";

const RESTORE: &str = "\
The server must be stopped, and its old data store moved away; the backup's state gets a history of its own, and
SECURITY.md says what has to be repeated by hand.

Examples:
    mv data/history data/history.lost
    signet-server backup restore -config conf/server/server.conf signet.backup";

/// Take the state of a running server away, and bring it back.
#[derive(Debug, clap::Subcommand)]
pub(super) enum Backup {
    /// Write the whole state of a running server to a file: entries, agents, bundles, authorities.
    #[command(after_help = CREATE)]
    Create {
        #[command(flatten)]
        socket: SocketFlags,
        /// Put the key file of KeyManager "disk" into the backup; this command must be able to read it.
        #[arg(long = "withKeys")]
        with_keys: bool,
        /// The configuration file that names the key file.
        #[arg(long = "config", value_name = "PATH", default_value = crate::config::DEFAULT_PATH)]
        config: PathBuf,
        /// The file to write; it must not be there.
        #[arg(value_name = "FILE")]
        file: PathBuf,
    },
    /// Read a backup whole and say what it holds.
    Verify {
        /// The backup.
        #[arg(value_name = "FILE")]
        file: PathBuf,
    },
    /// Make a data store of a backup.
    #[command(after_help = RESTORE)]
    Restore {
        #[command(flatten)]
        run: Run,
        /// Leave the keys of the backup where they are.
        #[arg(long = "withoutKeys")]
        without_keys: bool,
        /// The backup.
        #[arg(value_name = "FILE")]
        file: PathBuf,
    },
}

pub(super) async fn run(command: &Backup, environment: &Environment, screen: &mut Screen) -> Result<(), CliError> {
    match command {
        Backup::Create { socket, with_keys, config, file } => {
            let keys = if *with_keys { Some(key_file(config, environment)?) } else { None };
            create(Connection::new(socket, environment)?, keys.as_deref(), file, screen).await
        }
        Backup::Verify { file } => {
            let contents = read(file)?;
            tell(&contents, screen);
            Ok(())
        }
        Backup::Restore { run, without_keys, file } => restore(run, !without_keys, file, environment, screen).await,
    }
}

fn failed(file: &Path) -> impl Fn(BackupError) -> CliError + '_ {
    move |source| CliError::Backup { path: file.to_owned(), source }
}

fn key_file(config: &Path, environment: &Environment) -> Result<PathBuf, CliError> {
    let overrides = crate::config::Overrides { config: Some(config.to_owned()), ..Default::default() };
    let config = crate::config::load(&overrides, environment).map_err(|source| CliError::Config { source })?;
    let target = Target::of(&config).map_err(failed(&config.path))?;
    target.keys.ok_or(CliError::Flags("-withKeys needs KeyManager \"disk\": there is no key file in memory"))
}

/// A file that is made new, readable by its owner only, and gone again unless it is kept: private keys may be in it.
struct Beside(PathBuf);

impl Beside {
    fn make(file: &Path) -> std::io::Result<(Self, std::fs::File)> {
        let mut name = file.as_os_str().to_owned();
        name.push(".part");
        let path = PathBuf::from(name);
        // What an earlier command left, or somebody else has put there, with permissions or a target of their own.
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let opened = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path)?;
        Ok((Self(path), opened))
    }
}

impl Drop for Beside {
    fn drop(&mut self) {
        // Renamed already if all went well.
        let _ = std::fs::remove_file(&self.0);
    }
}

async fn create(connection: Connection, keys: Option<&Path>, file: &Path, screen: &mut Screen) -> Result<(), CliError> {
    if file.exists() {
        return Err(CliError::Flags("the file is there already; name another one"));
    }
    let keys = keys.map(|path| {
        let read = runtime::keyfile::read(path).map_err(BackupError::Keys).map_err(failed(path))?;
        read.ok_or(CliError::Flags("there is no key file where the configuration names it"))
    });
    let keys = keys.transpose()?;
    let unwritten = |source| failed(file)(BackupError::File(source));
    let channel = connection.open().await?;
    let (beside, opened) = Beside::make(file).map_err(unwritten)?;
    let mut writer = Writer::new(std::io::BufWriter::new(opened)).map_err(failed(file))?;
    let mut client = BackupClient::new(channel).max_decoding_message_size(MAX_ANSWER);
    let mut frames = client.create(CreateRequest {}).await?.into_inner();
    loop {
        let frame = frames.message().await?.ok_or(CliError::Missing("the end of the backup"))?;
        let kind = u8::try_from(frame.kind).map_err(|_| CliError::Missing("a known kind of frame"))?;
        if kind == Kind::End as u8 {
            break;
        }
        writer.frame(kind, &frame.payload).map_err(failed(file))?;
    }
    if let Some(keys) = keys {
        writer.frame(Kind::Keys as u8, &keys).map_err(failed(file))?;
    }
    let written = writer.finish().map_err(failed(file))?;
    let written = written.into_inner().map_err(|error| unwritten(error.into_error()))?;
    written.sync_all().map_err(unwritten)?;
    std::fs::rename(&beside.0, file).map_err(unwritten)?;
    let contents = read(file)?;
    screen.line(format!("Backup written to {}", file.display()));
    tell(&contents, screen);
    Ok(())
}

fn read(file: &Path) -> Result<Contents, CliError> {
    let opened = std::fs::File::open(file).map_err(BackupError::File).map_err(failed(file))?;
    file::read(BufReader::new(opened)).map_err(failed(file))
}

async fn restore(
    flags: &Run,
    keys: bool,
    file: &Path,
    environment: &Environment,
    screen: &mut Screen,
) -> Result<(), CliError> {
    let config = flags.load(environment).map_err(|source| CliError::Config { source })?;
    let target = Target::of(&config).map_err(failed(file))?;
    let contents = read(file)?;
    if contents.head.trust_domain != config.trust_domain.as_str() {
        let (found, configured) = (contents.head.trust_domain, config.trust_domain.as_str().to_owned());
        return Err(failed(file)(BackupError::OtherTrustDomain { found, configured }));
    }
    let has_keys = contents.keys.is_some();
    let state = restore::restore(contents, &target, keys, &Clock::system(), &Entropy::system()).await;
    let state = state.map_err(failed(file))?;
    screen.line(format!("Restored to {}", target.store.display()));
    count(&state, screen);
    match (&target.keys, has_keys && keys) {
        (Some(path), true) => screen.line(format!("Keys            : restored to {}", path.display())),
        (Some(path), false) if path.exists() => screen.line(format!("Keys            : {} stays", path.display())),
        _ => screen.line("Keys            : none; the server will make new authorities, and publish them first"),
    }
    screen.line("Repeat the bans, evictions, revocations and deletions made since the backup. Join tokens are void.");
    Ok(())
}

fn tell(contents: &Contents, screen: &mut Screen) {
    let head = &contents.head;
    let taken = OffsetDateTime::from_unix_timestamp(head.taken_at).ok();
    let taken = taken.and_then(|at| at.format(&Rfc3339).ok()).unwrap_or_default();
    screen.line(format!("Trust domain    : {}", head.trust_domain));
    screen.line(format!("Taken at        : {taken}"));
    screen.line(format!("Position        : {:?}", contents.state.position()));
    count(&contents.state, screen);
    let keys = if contents.keys.is_some() { "in it: keep the backup as you keep the key file" } else { "not in it" };
    screen.line(format!("Private keys    : {keys}"));
}

fn count(state: &State, screen: &mut Screen) {
    let counts = Counts::of(state);
    let (x509, jwt) = counts.authorities;
    screen.line(format!("Entries         : {}", counts.entries));
    screen.line(format!("Agents          : {}", counts.agents));
    screen.line(format!("Bundles         : {}", counts.bundles));
    screen.line(format!("Authorities     : {x509} X.509, {jwt} JWT"));
}
