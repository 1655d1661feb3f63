//! Selectors: what an attestor says about a node or a process, and how sets of them compare.

use std::fmt;
use std::sync::Arc;

/// Why a text is not a selector.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SelectorError {
    /// No colon between type and value.
    #[error("selector \"type:value\" has no colon")]
    MissingColon,
    /// The type has no bytes.
    #[error("selector type is empty")]
    EmptyType,
    /// The type holds a colon, so that its text form could not be read back.
    #[error("selector type holds a colon")]
    ColonInType,
    /// The value has no bytes.
    #[error("selector value is empty")]
    EmptyValue,
}

/// One selector, written `type:value`, for example `unix:uid:1000` (type `unix`, value `uid:1000`).
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Selector {
    // One text instead of two: servers hold hundreds of thousands of these. The type has no colon, so equal texts are
    // equal selectors.
    text: Arc<str>,
}

impl Selector {
    /// Makes a selector of its two parts.
    pub fn new(kind: &str, value: &str) -> Result<Self, SelectorError> {
        if kind.is_empty() {
            return Err(SelectorError::EmptyType);
        }
        if kind.contains(':') {
            return Err(SelectorError::ColonInType);
        }
        if value.is_empty() {
            return Err(SelectorError::EmptyValue);
        }
        Ok(Self { text: [kind, ":", value].concat().into() })
    }

    /// Parses `type:value`; only the first colon divides.
    pub fn parse(text: &str) -> Result<Self, SelectorError> {
        let (kind, value) = text.split_once(':').ok_or(SelectorError::MissingColon)?;
        if kind.is_empty() {
            return Err(SelectorError::EmptyType);
        }
        if value.is_empty() {
            return Err(SelectorError::EmptyValue);
        }
        Ok(Self { text: text.into() })
    }

    /// The type, which is the name of the attestor.
    pub fn kind(&self) -> &str {
        self.parts().0
    }

    /// The value.
    pub fn value(&self) -> &str {
        self.parts().1
    }

    /// The whole, as it is written.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    fn parts(&self) -> (&str, &str) {
        self.text.split_once(':').unwrap_or((&self.text, ""))
    }
}

impl Ord for Selector {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.parts().cmp(&other.parts())
    }
}

impl PartialOrd for Selector {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl std::str::FromStr for Selector {
    type Err = SelectorError;

    fn from_str(text: &str) -> Result<Self, SelectorError> {
        Self::parse(text)
    }
}

impl fmt::Display for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl fmt::Debug for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Selector({self})")
    }
}

/// How a set is compared with a wanted set in list filters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Match {
    /// Both hold the same selectors.
    Exact,
    /// The set holds something, and nothing but wanted selectors.
    Subset,
    /// The set holds every wanted selector.
    Superset,
    /// The set holds at least one wanted selector.
    Any,
}

/// A sorted set of selectors without repetition; cloning shares it.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SelectorSet(Arc<[Selector]>);

impl SelectorSet {
    /// The set without selectors.
    pub fn empty() -> Self {
        Self(Arc::from([]))
    }

    /// The selectors, sorted by type and value.
    pub fn iter(&self) -> std::slice::Iter<'_, Selector> {
        self.0.iter()
    }

    /// How many selectors there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is no selector.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether `selector` is in the set.
    pub fn contains(&self, selector: &Selector) -> bool {
        self.0.binary_search(selector).is_ok()
    }

    /// Whether each selector of this set is in `other`; the empty set is part of every set.
    pub fn is_subset_of(&self, other: &SelectorSet) -> bool {
        if self.len() > other.len() {
            return false;
        }
        // Both are sorted, so one walk over the larger set decides.
        let mut rest = other.iter();
        self.iter().all(|wanted| rest.by_ref().find(|have| *have >= wanted).is_some_and(|have| have == wanted))
    }

    /// Whether this set stands in the relation `how` to `wanted`.
    pub fn matches(&self, wanted: &SelectorSet, how: Match) -> bool {
        match how {
            Match::Exact => self == wanted,
            Match::Subset => !self.is_empty() && self.is_subset_of(wanted),
            Match::Superset => wanted.is_subset_of(self),
            Match::Any => self.iter().any(|selector| wanted.contains(selector)),
        }
    }

    /// The union of both sets.
    pub fn union(&self, other: &SelectorSet) -> SelectorSet {
        if other.is_empty() {
            return self.clone();
        }
        self.iter().chain(other.iter()).cloned().collect()
    }
}

impl Default for SelectorSet {
    fn default() -> Self {
        Self::empty()
    }
}

impl FromIterator<Selector> for SelectorSet {
    fn from_iter<I: IntoIterator<Item = Selector>>(selectors: I) -> Self {
        let mut selectors: Vec<Selector> = selectors.into_iter().collect();
        selectors.sort_unstable();
        selectors.dedup();
        Self(selectors.into())
    }
}

impl<'a> IntoIterator for &'a SelectorSet {
    type Item = &'a Selector;
    type IntoIter = std::slice::Iter<'a, Selector>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

impl fmt::Debug for SelectorSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.iter().map(ToString::to_string)).finish()
    }
}

#[cfg(test)]
#[path = "selector/tests.rs"]
mod tests;
