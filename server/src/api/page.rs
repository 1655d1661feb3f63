//! Lists cut into pages.
//!
//! A page token is the ordinal of the last row; a page with rows always has one, and who has read everything sees it by an
//! empty page.

/// A page token that is not one of ours.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("could not parse token '{token}'")]
pub struct PageTokenError {
    token: String,
}

/// How a list is to be cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Page {
    /// Most rows of the answer.
    pub size: usize,
    /// The row after which it begins.
    pub after: u64,
}

/// The page that a list request asks for; none if it asks for everything. The token is the ordinal of the last row.
///
/// # Errors
/// If the token is not one of ours.
pub fn page(size: i32, token: &str) -> Result<Option<Page>, PageTokenError> {
    let Some(size) = usize::try_from(size).ok().filter(|size| *size > 0) else { return Ok(None) };
    let after = match token {
        "" => 0,
        token => token.parse().map_err(|_| PageTokenError { token: token.to_owned() })?,
    };
    Ok(Some(Page { size, after }))
}

/// Takes the rows of one page out of all that match, in order, and the token for the next one. A page with rows always
/// has a token; who has read everything sees it by an empty page.
pub fn cut<'a, T>(rows: impl Iterator<Item = (u64, &'a T)>, page: Option<Page>) -> (Vec<&'a T>, String) {
    let Some(page) = page else { return (rows.map(|(_, row)| row).collect(), String::new()) };
    let mut last = None;
    let taken = rows
        .take(page.size)
        .map(|(ordinal, row)| {
            last = Some(ordinal);
            row
        })
        .collect();
    (taken, last.map_or_else(String::new, |ordinal: u64| ordinal.to_string()))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Whatever the size of the pages, a client that follows the tokens sees every row once, in order, and then an
        /// empty page.
        #[test]
        fn pages_cover_a_list_exactly(
            rows in proptest::collection::btree_set(1_u64..500, 0..60),
            size in 1_i32..20,
        ) {
            let rows: Vec<u64> = rows.into_iter().collect();
            let (mut token, mut seen) = (String::new(), Vec::new());
            loop {
                let page = page(size, &token).unwrap().unwrap();
                let after = rows.iter().filter(|row| **row > page.after).map(|row| (*row, row));
                let (taken, next) = cut(after, Some(page));
                prop_assert_eq!(taken.is_empty(), next.is_empty());
                seen.extend(taken.into_iter().copied());
                token = next;
                if token.is_empty() { break; }
            }
            prop_assert_eq!(seen, rows);
        }

        #[test]
        fn page_tokens_are_numbers_or_refused(token in ".{0,12}") {
            let parsed = page(1, &token);
            match token.parse::<u64>() {
                Ok(after) => prop_assert_eq!(parsed.unwrap(), Some(Page { size: 1, after })),
                Err(_) if token.is_empty() => prop_assert_eq!(parsed.unwrap(), Some(Page { size: 1, after: 0 })),
                Err(_) => {
                    let error = parsed.unwrap_err();
                    prop_assert_eq!(error.to_string(), format!("could not parse token '{token}'"));
                    prop_assert_eq!(error, PageTokenError { token: token.clone() });
                }
            }
            prop_assert_eq!(page(0, &token).unwrap(), None);
            prop_assert_eq!(page(-1, &token).unwrap(), None);
        }
    }
}
