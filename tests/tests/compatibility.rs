//! The page of what works is what the programs say. `BLESS=1` writes it anew.

use anyhow::Result;
use e2e::compatibility;
use e2e::testkit::Binaries;

#[tokio::test(flavor = "multi_thread")]
async fn the_page_is_what_the_programs_say() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let page = compatibility::page(&Binaries::signet()?, folder.path()).await?;
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/spire-compatibility.md");
    if std::env::var_os("BLESS").is_some() {
        std::fs::write(path, &page)?;
    }
    let written = std::fs::read_to_string(path)?;
    assert_eq!(written, page, "docs/spire-compatibility.md is out of date; write it anew with BLESS=1");
    Ok(())
}
