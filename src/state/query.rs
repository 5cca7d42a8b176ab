//! Reads. What is due is not there, whether it was swept or not.

use std::sync::Arc;

use super::State;
use super::command::{Digest, Namespace, Query, QueryReply, SessionKey};
use super::session::Session;

impl State {
    /// Answers a read, as of the state's revision and clock.
    pub fn query(&self, query: &Query) -> QueryReply {
        match query {
            Query::GetSession(key) => {
                let session = self.live_session(key).cloned();
                let sessions = session.into_iter().map(|session| (key.digest, session)).collect();
                QueryReply { revision: self.revision, sessions, more: false }
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
        let mut reply = QueryReply { revision: self.revision, sessions: Vec::new(), more: false };
        let Some(records) = self.records.namespace(namespace) else {
            return reply;
        };
        match principal {
            None => self.page(records.sessions.range(after), limit, &mut reply),
            Some(principal) => {
                let digests = records.of_principal(principal, after);
                let session = |digest| (digest, records.sessions.get(&digest));
                let sessions = digests.map(session).map(|(digest, session)| {
                    (digest, session.expect("the index holds only what is there"))
                });
                self.page(sessions, limit, &mut reply);
            }
        }
        reply
    }

    /// Takes the first `limit` live sessions, and notes whether there is another.
    fn page<'a, D: std::borrow::Borrow<Digest>>(
        &self,
        sessions: impl Iterator<Item = (D, &'a Arc<Session>)>,
        limit: usize,
        reply: &mut QueryReply,
    ) {
        let mut live = sessions.filter(|(_, session)| !session.is_due(self.clock.time));
        let page = live.by_ref().take(limit);
        reply.sessions =
            page.map(|(digest, session)| (*digest.borrow(), session.clone())).collect();
        reply.more = live.next().is_some();
    }
}
