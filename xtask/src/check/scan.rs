//! The files that the rules apply to.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// One file of the tree.
pub struct File {
    /// Below the root, with forward slashes.
    pub path: PathBuf,
    /// Its content.
    pub text: String,
}

/// All text files of the project: code, manifests, protocol files, documents, scripts.
///
/// # Errors
/// If a folder or file cannot be read.
pub fn files(root: &Path) -> Result<Vec<File>> {
    let mut found = Vec::new();
    walk(root, root, &mut found)?;
    Ok(found)
}

fn walk(root: &Path, folder: &Path, found: &mut Vec<File>) -> Result<()> {
    for entry in fs::read_dir(folder).with_context(|| folder.display().to_string())? {
        let entry = entry?;
        let path = entry.path();
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if entry.file_type()?.is_dir() {
            // Built things, and the repository's own bookkeeping.
            if !["target", ".git", "corpus", "artifacts"].contains(&name.as_ref()) {
                walk(root, &path, found)?;
            }
        } else if is_text(&name) {
            let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
            found.push(File { path: path.strip_prefix(root).unwrap_or(&path).into(), text });
        }
    }
    Ok(())
}

fn is_text(name: &str) -> bool {
    let ending = name.rsplit_once('.').map_or(name, |(_, ending)| ending);
    ["rs", "toml", "proto", "md", "py", "go", "java", "xml", "conf", "hcl", "json", "sh", "run"].contains(&ending)
}
