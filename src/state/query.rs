//! Reads. What is due is not there, whether it was swept or not.

use std::sync::Arc;

use super::State;
use super::command::{Digest, Namespace, Query, QueryReply, SessionKey};
use super::session::Session;
use crate::limits::PAGE_LOOKS_MAX;

impl State {
    /// Answers a read, as of the state's revision and clock.
    pub fn query(&self, query: &Query) -> QueryReply {
        match query {
            Query::GetSession(key) => {
                let session = self.live_session(key).cloned();
                let sessions = session.into_iter().map(|session| (key.digest, session)).collect();
                QueryReply { revision: self.revision, sessions, next: None }
            }
            Query::ListSessions { namespace, principal, after, limit } => {
                self.list_sessions(namespace, principal.as_ref(), *after, *limit)
            }
        }
    }

    /// The session of `key`, unless it is due.
    pub(super) fn live_session(&self, key: &SessionKey) -> Option<&Arc<Session>> {
        self.records.session(key).filter(|session| !session.is_due(self.clock.time))
    }

    fn list_sessions(
        &self,
        namespace: &Namespace,
        principal: Option<&Arc<str>>,
        after: Option<Digest>,
        limit: usize,
    ) -> QueryReply {
        let Some(records) = self.records.namespace(namespace) else {
            return QueryReply { revision: self.revision, sessions: Vec::new(), next: None };
        };
        let look = |digest: &Digest, session: &Arc<Session>| {
            (!session.is_due(self.clock.time)).then(|| (*digest, session.clone()))
        };
        let Page { items: sessions, next } = match principal {
            None => {
                let sessions = records.sessions.range(after);
                page(sessions.map(|(digest, session)| (*digest, session)), limit, look)
            }
            Some(principal) => {
                let digests = records.of_principal(principal, after);
                let sessions = digests.map(|digest| {
                    let session = records.sessions.get(&digest);
                    (digest, session.expect("the index holds only what is there"))
                });
                page(sessions, limit, look)
            }
        };
        QueryReply { revision: self.revision, sessions, next }
    }
}

/// Part of a list.
#[derive(Clone, Debug)]
pub struct Page<K, T> {
    /// Those on it, in their order. They may be fewer than were asked for.
    pub items: Vec<T>,
    /// Behind which the next page begins, if there is one.
    pub next: Option<K>,
}

/// The first `limit` of those in which `look` sees something. What is over and has not been swept
/// yet is looked at as well, so a page has a limit of these, too.
pub(super) fn page<K: Clone, V, T>(
    entries: impl Iterator<Item = (K, V)>,
    limit: usize,
    mut look: impl FnMut(&K, V) -> Option<T>,
) -> Page<K, T> {
    let mut page = Page { items: Vec::new(), next: None };
    let mut last = None;
    for (looked_at, (key, value)) in entries.enumerate() {
        if looked_at == PAGE_LOOKS_MAX {
            page.next = last;
            break;
        }
        if let Some(item) = look(&key, value) {
            if page.items.len() == limit {
                page.next = last;
                break;
            }
            page.items.push(item);
        }
        last = Some(key);
    }
    page
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_ends_at_its_limit_or_at_that_of_looks() {
        let is_even = |_: &usize, number: usize| number.is_multiple_of(2).then_some(number);
        let of = |range: std::ops::Range<usize>| page(range.map(|it| (it, it)), 2, is_even);
        assert_eq!((of(0..3).items, of(0..3).next), (vec![0, 2], None));
        assert_eq!((of(0..9).items, of(0..9).next), (vec![0, 2], Some(3)));
        // All but the last are over.
        let looks = std::cell::Cell::new(0);
        let page = page((0..1_000_000).map(|it| (it, it)), 2, |_, it: usize| {
            looks.set(looks.get() + 1);
            (it == 999_999).then_some(it)
        });
        assert_eq!((page.items, page.next), (vec![], Some(PAGE_LOOKS_MAX - 1)));
        assert_eq!(looks.get(), PAGE_LOOKS_MAX);
    }
}
