//! A model of the state, for tests: plain maps and scans, as simple as can be.

use std::collections::BTreeMap;

use super::*;

pub(super) const MINUTE: u64 = 60_000;

/// An empty state at the level of this build.
pub(super) fn raised() -> State {
    State { feature_level: FEATURE_LEVEL, ..State::new() }
}

/// What the state should be.
#[derive(Default)]
pub(super) struct Model {
    pub(super) clock: u64,
    pub(super) revision: u64,
    pub(super) sessions: BTreeMap<SessionKey, ModelSession>,
    tombstones: BTreeMap<SessionKey, (u64, Memory)>,
}

#[derive(Clone)]
pub(super) struct ModelSession {
    attributes: BTreeMap<String, Bytes>,
    pub(super) principal: Option<Arc<str>>,
    pub(super) version: u64,
    created: u64,
    accessed: u64,
    /// The access from which the deadline counts.
    renewed: u64,
    idle: Option<u64>,
    absolute: Option<u64>,
    memory: Memory,
}

/// Requests that were applied: with their revisions, and whether they were resends.
#[derive(Clone, Default)]
pub(super) struct Memory {
    recent: Vec<(Request, u64, bool)>,
    forgotten: Option<u64>,
    forgotten_resend: Option<u64>,
}

impl ModelSession {
    fn granularity(&self) -> u64 {
        self.idle.map_or(MINUTE, |idle| (idle / 8).min(MINUTE))
    }

    pub(super) fn deadline(&self) -> Option<u64> {
        let idle = self.idle.map(|idle| self.renewed + idle + 2 * self.granularity());
        let absolute = self.absolute.map(|absolute| self.created + absolute);
        idle.into_iter().chain(absolute).min()
    }

    fn slide(&mut self, clock: u64) {
        if self.renewed + self.granularity() < clock {
            self.renewed = clock;
        }
    }

    pub(super) fn compare(&self, session: &Session) {
        let attributes: BTreeMap<_, _> = session
            .attributes()
            .map(|(name, value)| (name.to_string(), Bytes::copy_from_slice(value)))
            .collect();
        assert_eq!(attributes, self.attributes);
        assert_eq!(session.principal(), self.principal.as_deref());
        assert_eq!(session.version().0, self.version);
        assert_eq!(session.create_time().0, self.created);
        assert_eq!(session.last_access_time().0, self.accessed);
        assert_eq!(session.deadline().map(|deadline| deadline.0), self.deadline());
        assert_eq!(length(session.idle_timeout()), self.idle);
        assert_eq!(length(session.absolute_timeout()), self.absolute);
        let size: usize = attributes.iter().map(|(name, value)| name.len() + value.len()).sum();
        assert_eq!(session.size_bytes(), size as u64);
    }
}

impl Memory {
    /// The revision of a request that was applied.
    fn find(&self, request: &Request, resend: bool) -> Result<Option<u64>, Rejection> {
        if let Some((_, revision, _)) = self.recent.iter().find(|(it, ..)| it.id == request.id) {
            return Ok(Some(*revision));
        }
        let mark = if resend { self.forgotten } else { self.forgotten_resend };
        match mark.is_some_and(|mark| request.first_sent.0 <= mark) {
            true => Err(Rejection::OutcomeUnknown),
            false => Ok(None),
        }
    }

    fn add(&mut self, request: &Request, resend: bool, revision: u64, clock: u64) {
        self.recent.retain(|(request, ..)| request.expires.0 >= clock);
        if self.recent.len() == 8 {
            let (request, _, resend) = self.recent.remove(0);
            self.forgotten = self.forgotten.max(Some(request.first_sent.0));
            if resend {
                self.forgotten_resend = self.forgotten_resend.max(Some(request.first_sent.0));
            }
        }
        self.recent.push((*request, revision, resend));
    }
}

fn length(timeout: Timeout) -> Option<u64> {
    match timeout {
        Timeout::Never => None,
        Timeout::After(length) => Some(millis(length)),
    }
}

impl Model {
    pub(super) fn live(&self) -> impl Iterator<Item = (&SessionKey, &ModelSession)> {
        self.sessions.iter().filter(|(_, it)| it.deadline().is_none_or(|it| it > self.clock))
    }

    pub(super) fn session(&self, key: &SessionKey) -> Option<&ModelSession> {
        self.live().find(|(other, _)| *other == key).map(|(_, session)| session)
    }

    fn expire(&mut self, key: &SessionKey) -> bool {
        let is_due = self.sessions.contains_key(key) && self.session(key).is_none();
        if is_due && let Some(session) = self.sessions.remove(key) {
            self.tombstones.insert(key.clone(), (self.clock, session.memory));
            return true;
        }
        let is_over = |(removed, _): &(u64, _)| removed + MINUTE < self.clock;
        if self.tombstones.get(key).is_some_and(is_over) {
            self.tombstones.remove(key);
            return true;
        }
        false
    }

    pub(super) fn tick(&mut self) -> Reply {
        let keys: Vec<_> = self.sessions.keys().chain(self.tombstones.keys()).cloned().collect();
        let removed = keys.into_iter().filter(|key| self.expire(key)).count();
        self.revision += u64::from(removed > 0);
        self.written(self.revision, None)
    }

    fn written(&self, version: u64, deadline: Option<u64>) -> Reply {
        let (version, deadline) = (Revision(version), deadline.map(Timestamp));
        Reply { revision: version, outcome: Outcome::Written { version, deadline } }
    }

    pub(super) fn apply(&mut self, command: &Command, resend: bool) -> Reply {
        self.try_apply(command, resend).unwrap_or_else(|rejection| Reply {
            revision: Revision(self.revision),
            outcome: Outcome::Rejected(rejection),
        })
    }

    fn try_apply(&mut self, command: &Command, resend: bool) -> Result<Reply, Rejection> {
        let (request, key, is_touch) = match command {
            Command::CreateSession { request, key, .. }
            | Command::UpdateSession { request, key, .. }
            | Command::DeleteSession { request, key, .. } => (request, key, false),
            Command::TouchSession { request, key } => (request, key, true),
            _ => unreachable!("has a function of its own"),
        };
        let (sent, expires) = (request.first_sent.0, request.expires.0);
        if self.clock > expires.min(sent + 55_000) {
            return Err(Rejection::RequestExpired);
        }
        if sent > self.clock + 5_000 {
            return Err(Rejection::ClockAhead);
        }
        if request.expires.0 - request.first_sent.0 > MINUTE {
            return Err(Rejection::RequestLifetimeTooLong);
        }
        self.revision += u64::from(self.expire(key));
        let memory = match (self.sessions.get(key), self.tombstones.get(key)) {
            (Some(session), _) => session.memory.clone(),
            (None, Some((_, memory))) => memory.clone(),
            (None, None) => Memory::default(),
        };
        let deadline = self.session(key).and_then(ModelSession::deadline);
        if !is_touch && let Some(revision) = memory.find(request, resend)? {
            return Ok(self.written(revision, deadline));
        }
        self.perform(command, resend, memory)
    }

    fn perform(
        &mut self,
        command: &Command,
        resend: bool,
        mut memory: Memory,
    ) -> Result<Reply, Rejection> {
        let (clock, next) = (self.clock, self.revision + 1);
        let check = |session: &ModelSession, expected: &Option<Revision>| match expected {
            Some(expected) if expected.0 != session.version => {
                Err(Rejection::VersionMismatch(Revision(session.version)))
            }
            _ => Ok(()),
        };
        let named = |list: &[Attribute]| -> BTreeMap<String, Bytes> {
            list.iter().map(|it| (it.name.clone(), it.value.clone())).collect()
        };
        let found =
            |key: &SessionKey| self.sessions.get(key).cloned().ok_or(Rejection::SessionNotFound);
        let (key, session) = match command {
            Command::CreateSession {
                request,
                key,
                principal,
                attributes,
                idle_timeout,
                absolute_timeout,
            } => {
                if self.sessions.contains_key(key) {
                    return Err(Rejection::SessionExists);
                }
                if self.tombstones.contains_key(key) {
                    return Err(Rejection::SessionIdRetired);
                }
                memory.add(request, resend, next, clock);
                let session = ModelSession {
                    attributes: named(attributes),
                    principal: principal.clone(),
                    version: next,
                    created: clock,
                    accessed: clock,
                    renewed: clock,
                    idle: idle_timeout.map_or(Some(30 * MINUTE), length),
                    absolute: absolute_timeout.and_then(length),
                    memory,
                };
                (key, session)
            }
            Command::UpdateSession {
                request,
                key,
                set,
                remove,
                expected_version,
                principal,
                idle_timeout,
                ..
            } => {
                let mut session = found(key)?;
                check(&session, expected_version)?;
                memory.add(request, resend, next, clock);
                session.memory = memory;
                session.attributes.extend(named(set));
                session.attributes.retain(|name, _| !remove.contains(name));
                session.principal = principal.clone().unwrap_or(session.principal);
                session.version = next;
                session.accessed = clock;
                let idle = idle_timeout.map_or(session.idle, length);
                if idle != session.idle {
                    (session.idle, session.renewed) = (idle, clock);
                }
                session.slide(clock);
                (key, session)
            }
            Command::TouchSession { key, .. } => {
                let mut session = found(key)?;
                let (version, before) = (session.version, session.deadline());
                session.slide(clock);
                let is_old = clock - session.accessed > session.granularity();
                let mut reply = self.written(version, session.deadline());
                reply.revision = Revision(self.revision);
                if session.deadline() != before || is_old {
                    session.accessed = clock;
                    self.revision = next;
                    reply.revision = Revision(next);
                }
                self.sessions.insert(key.clone(), session);
                return Ok(reply);
            }
            Command::DeleteSession { request, key, expected_version, .. } => {
                check(&found(key)?, expected_version)?;
                memory.add(request, resend, next, clock);
                self.sessions.remove(key);
                self.tombstones.insert(key.clone(), (clock, memory));
                self.revision = next;
                return Ok(self.written(next, None));
            }
            _ => unreachable!("has a function of its own"),
        };
        self.revision = next;
        let reply = self.written(next, session.deadline());
        self.sessions.insert(key.clone(), session);
        Ok(reply)
    }
}
