//! Which of our packages a package may depend on, and that it takes the lints of the workspace.

use super::Finding;
use super::scan::File;

/// Names that our packages have in manifests.
const OURS: &[&str] = &["spiffe", "spiffe-proto", "runtime", "transport", "signet-server", "signet-agent"];

/// A folder, and what of ours its package may depend on.
const ALLOWED: &[(&str, &[&str])] = &[
    ("spiffe", &[]),
    ("spiffe-proto", &[]),
    ("runtime", &[]),
    ("transport", &["spiffe", "runtime"]),
    ("server", &["spiffe", "spiffe-proto", "runtime", "transport"]),
    ("agent", &["spiffe", "spiffe-proto", "runtime", "transport"]),
];

pub fn findings(file: &File) -> Vec<Finding> {
    let allowed = ALLOWED.iter().find(|(folder, _)| file.path == std::path::Path::new(folder).join("Cargo.toml"));
    let Some((folder, allowed)) = allowed else { return Vec::new() };
    let mut found = Vec::new();
    let mut section = "";
    let mut lints = false;
    for (index, line) in file.text.lines().enumerate() {
        if let Some(name) = line.strip_prefix('[') {
            section = name.trim_end_matches(']');
        } else if section.ends_with("dependencies") {
            let name = line.split(['.', '=', ' ']).next().unwrap_or_default();
            if OURS.contains(&name) && !allowed.contains(&name) {
                found.push(Finding::new(&file.path, index + 1, format!("{folder} may not depend on {name}")));
            }
        } else if section == "lints" && line.starts_with("workspace = true") {
            lints = true;
        }
    }
    if !lints {
        found.push(Finding::new(&file.path, 1, "the lints of the workspace are missing: [lints] workspace = true"));
    }
    found
}
