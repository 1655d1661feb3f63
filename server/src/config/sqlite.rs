//! Whether a SQLite file holds the tables of a SPIRE server: a small read of the file itself (SQLite file format,
//! sections 1.3, 1.6 and 2.6), without a SQLite library.

use std::fs::File;
use std::io::{ErrorKind, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

/// Tables of which any SPIRE database has both.
const TABLES: [&[u8]; 2] = [b"attested_node_entries", b"registered_entries"];
const MAGIC: &[u8; 16] = b"SQLite format 3\0";
/// A schema has a handful of pages; more than this is no schema of SPIRE's.
const MAX_PAGES: usize = 1_000;
/// How much of a write-ahead log is looked at.
const MAX_LOG_BYTES: u64 = 64 << 20;

/// The file that a connection string of SPIRE names; `None` for a database in memory.
pub(super) fn file_of(connection: &str) -> Option<PathBuf> {
    let (is_uri, rest) = match connection.strip_prefix("file:") {
        Some(rest) => (true, rest),
        None => (false, connection),
    };
    let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
    if path.is_empty() || path == ":memory:" || query.split('&').any(|pair| pair == "mode=memory") {
        return None;
    }
    let path = if is_uri { path.strip_prefix("//localhost").or(path.strip_prefix("//")).unwrap_or(path) } else { path };
    Some(PathBuf::from(path))
}

/// Whether the file at `path` is a SQLite database with SPIRE's tables. A file that is missing, empty or something else
/// holds none.
///
/// # Errors
///
/// What the system says if the file is there but cannot be read.
pub(super) fn holds_entries(path: &Path) -> std::io::Result<bool> {
    let mut file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(error),
    };
    let mut head = Vec::new();
    Read::by_ref(&mut file).take(100).read_to_end(&mut head)?;
    if head.get(..16) != Some(MAGIC.as_slice()) {
        return Ok(false);
    }
    let page_size = match number(&head, 16, 2) {
        Some(1) => 65_536,
        Some(size) if size >= 512 => size,
        _ => return Ok(false),
    };
    if in_schema(&mut file, page_size)? {
        return Ok(true);
    }
    // What a crashed server wrote last may stand in the write-ahead log only.
    let mut log = path.as_os_str().to_owned();
    log.push("-wal");
    match File::open(PathBuf::from(log)) {
        Ok(log) => {
            let mut bytes = Vec::new();
            log.take(MAX_LOG_BYTES).read_to_end(&mut bytes)?;
            Ok(mentions(&bytes))
        }
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// Walks the b-tree of the schema table, whose root is the first page.
fn in_schema(file: &mut File, page_size: u64) -> std::io::Result<bool> {
    let mut waiting = vec![1u64];
    let mut seen = 0;
    while let Some(page) = waiting.pop() {
        seen += 1;
        if seen > MAX_PAGES || page == 0 {
            continue;
        }
        let mut bytes = Vec::new();
        file.seek(SeekFrom::Start((page - 1).saturating_mul(page_size)))?;
        Read::by_ref(file).take(page_size).read_to_end(&mut bytes)?;
        // The first page begins with the header of the file.
        let header = if page == 1 { 100 } else { 0 };
        match bytes.get(header) {
            Some(0x0d) if mentions(&bytes) => return Ok(true),
            Some(0x05) => {
                let cells = number(&bytes, header + 3, 2).unwrap_or(0);
                waiting.extend(number(&bytes, header + 8, 4));
                for cell in 0..usize::try_from(cells).unwrap_or(0) {
                    let at = number(&bytes, header + 12 + cell * 2, 2).and_then(|at| usize::try_from(at).ok());
                    waiting.extend(at.and_then(|at| number(&bytes, at, 4)));
                }
            }
            _ => {}
        }
    }
    Ok(false)
}

fn mentions(bytes: &[u8]) -> bool {
    TABLES.iter().any(|table| bytes.windows(table.len()).any(|window| window == *table))
}

/// A big-endian number of `length` bytes.
fn number(bytes: &[u8], at: usize, length: usize) -> Option<u64> {
    let part = bytes.get(at..at.checked_add(length)?)?;
    Some(part.iter().fold(0, |value, byte| value << 8 | u64::from(*byte)))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A database whose schema table is an interior page 1 over leaf pages, with `text` in the last of them.
    fn database(text: &[u8]) -> Vec<u8> {
        let mut pages = vec![0u8; 512 * 3];
        pages[..16].copy_from_slice(MAGIC);
        pages[16..18].copy_from_slice(&512u16.to_be_bytes());
        pages[100] = 0x05;
        pages[103..105].copy_from_slice(&1u16.to_be_bytes());
        pages[108..112].copy_from_slice(&2u32.to_be_bytes());
        pages[112..114].copy_from_slice(&500u16.to_be_bytes());
        pages[500..504].copy_from_slice(&3u32.to_be_bytes());
        pages[512] = 0x0d;
        pages[1024] = 0x0d;
        pages[1200..1200 + text.len()].copy_from_slice(text);
        pages
    }

    #[test]
    fn finds_tables_in_the_schema_and_in_the_log() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("datastore.sqlite3");
        assert!(!holds_entries(&path).unwrap());
        for (contents, found) in [
            (Vec::new(), false),
            (b"not a database, registered_entries".to_vec(), false),
            (database(b"CREATE TABLE other"), false),
            (database(b"CREATE TABLE registered_entries"), true),
            (database(b"tableattested_node_entries"), true),
        ] {
            std::fs::write(&path, contents).unwrap();
            assert_eq!(holds_entries(&path).unwrap(), found);
        }
        std::fs::write(&path, database(b"")).unwrap();
        std::fs::write(directory.path().join("datastore.sqlite3-wal"), b"..attested_node_entries..").unwrap();
        assert!(holds_entries(&path).unwrap());
        assert_eq!(holds_entries(directory.path()).unwrap_err().kind(), ErrorKind::IsADirectory);
    }

    #[test]
    fn a_loop_of_pages_ends() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("loop");
        let mut pages = database(b"");
        pages[108..112].copy_from_slice(&1u32.to_be_bytes());
        std::fs::write(&path, pages).unwrap();
        assert!(!holds_entries(&path).unwrap());
    }

    #[test]
    fn connection_strings_name_files() {
        for (connection, file) in [
            ("./data/datastore.sqlite3", Some("./data/datastore.sqlite3")),
            ("file:./d.sqlite3?cache=shared&_journal=WAL", Some("./d.sqlite3")),
            ("file:///var/d.sqlite3", Some("/var/d.sqlite3")),
            ("d.db?x=1", Some("d.db")),
            (":memory:", None),
            ("file:memdb?mode=memory&cache=shared", None),
            ("file::memory:", None),
            ("", None),
        ] {
            assert_eq!(file_of(connection), file.map(PathBuf::from), "{connection}");
        }
    }
}
