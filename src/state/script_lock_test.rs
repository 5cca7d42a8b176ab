//! What scripts say about leases, locks and rings. Leases are called by names of up to 16
//! characters, which stand for their ids; locks by their names. `token=a` is the last token of
//! lease a on that lock, `token=17` is 17.

use std::fmt::Write as _;
use std::time::Duration;

use super::script_test::{Script, Words, duration, remembered, split_name, time_text};
use super::*;

impl Script {
    /// Executes a command about leases and locks.
    pub(super) fn execute_coordination(
        &mut self,
        command: &str,
        mut words: Words<'_>,
        out: &mut String,
    ) {
        match command {
            "lease" => {
                let key = lease_key(words.0[0]);
                let text = match self.state.lease(&key) {
                    Some(view) if view.members > 0 => {
                        let (claims, members) = (view.claims, view.members);
                        format!("{}, claims {claims}, members {members}", lease_text(&view.lease))
                    }
                    Some(view) => format!("{}, claims {}", lease_text(&view.lease), view.claims),
                    None => "not found".into(),
                };
                writeln!(out, "{}: {text}", words.0[0]).unwrap();
                for (key, claim) in self.state.lease_claims(&key, 4) {
                    writeln!(out, "  {}#{}: {}", key.lock, key.order, state_text(&claim)).unwrap();
                }
            }
            "leases" => {
                let after = words.take("after").map(|name| lease_key(name).id);
                let limit = words.take("limit").map_or(100, |limit| limit.parse().unwrap());
                let namespace = Namespace(words.0.first().copied().unwrap_or("web").into());
                let page = self.state.list_leases(&namespace, after, limit);
                let name = |view: &LeaseView| format!("{}({})", id_text(view.id), view.claims);
                let names: Vec<_> = page.items.iter().map(name).collect();
                let more = if page.next.is_some() { ", more" } else { "" };
                writeln!(out, "[{}]{more}", names.join(" ")).unwrap();
            }
            "lock" => {
                let limit = words.take("limit").map_or(4, |limit| limit.parse().unwrap());
                let key = lock_key(words.0[0]);
                match self.state.lock(&key, limit) {
                    Some(view) => view_text(&view, out),
                    None => writeln!(out, "{}: not found", key.name).unwrap(),
                }
            }
            "locks" => {
                let after = words.take("after");
                let limit = words.take("limit").map_or(100, |limit| limit.parse().unwrap());
                let namespace = Namespace(words.0.first().copied().unwrap_or("web").into());
                let page = self.state.list_locks(&namespace, after, limit);
                let name = |view: &LockView| {
                    format!("{}({}+{})", view.name, view.holders_count, view.waiters_count)
                };
                let names: Vec<_> = page.items.iter().map(name).collect();
                let more = if page.next.is_some() { ", more" } else { "" };
                writeln!(out, "[{}]{more}", names.join(" ")).unwrap();
            }
            "crowd" => self.crowd(words, out),
            "ring" => match self.state.ring(&ring_key(words.0[0])) {
                Some(view) => ring_text(words.0[0], &view, out),
                None => writeln!(out, "{}: empty", words.0[0]).unwrap(),
            },
            "throng" => self.throng(words, out),
            _ => {
                let resend = words.take_word("resend");
                let command = self.coordination_command(command, &mut words);
                assert!(words.0.is_empty(), "what is {:?}?", words.0);
                self.apply(&command, resend, out);
            }
        }
    }

    fn coordination_command(&mut self, command: &str, words: &mut Words<'_>) -> Command {
        if command == "renew" {
            let time = |text| Timestamp(millis(duration(text)));
            let expires = words.take("expires").map(time);
            let keys: Vec<_> = words.0.drain(..).map(lease_key).collect();
            let namespace = keys[0].namespace.clone();
            return Command::RenewLeases {
                namespace,
                ids: keys.into_iter().map(|key| key.id).collect(),
                expires,
            };
        }
        let request = self.request(words);
        let name = words.0.remove(0);
        let length = |text: Option<&str>| text.map_or(Duration::ZERO, duration);
        let token = words.take("token").map(|text| self.token(&lock_key(name), text));
        match command {
            "grant" => Command::GrantLease {
                request,
                key: lease_key(name),
                owner: words.take("owner").unwrap_or_default().into(),
                ttl: words.take("ttl").map_or(Duration::from_secs(10), duration),
            },
            "revoke" => Command::RevokeLease { request, key: lease_key(name) },
            "acquire" => Command::AcquireLock {
                request,
                lock: lock_key(name),
                lease: lease_key(words.0.remove(0)).id,
                wait: length(words.take("wait")),
                lock_delay: length(words.take("delay")),
                mode: mode(words),
            },
            "release" => Command::ReleaseLock {
                request,
                lock: lock_key(name),
                lease: words.take("lease").map(|name| lease_key(name).id),
                token: token.unwrap(),
            },
            "cancel" => Command::CancelAcquire {
                request,
                lock: lock_key(name),
                lease: lease_key(words.0.remove(0)).id,
                acquire: words.take("acquire").unwrap().parse().unwrap(),
            },
            "break" => Command::BreakLock {
                request,
                lock: lock_key(name),
                token: token.unwrap(),
                delay: words.take_word("delay"),
            },
            "join" => Command::JoinRing {
                request,
                member: member_key(name),
                lease: lease_key(words.0.remove(0)).id,
                data: MemberData {
                    address: text(words.take("address").unwrap_or_default()),
                    weight: words.take("weight").map_or(1, |weight| weight.parse().unwrap()),
                    tags: tags(words),
                },
            },
            "leave" => Command::LeaveRing {
                request,
                member: member_key(name),
                lease: words.take("lease").map(|name| lease_key(name).id),
            },
            _ => panic!("unknown command {command}"),
        }
    }

    pub(super) fn follow_tokens(&mut self, changes: &[Change]) {
        for change in changes {
            if let (RecordKey::Claim(key), Some(Record::Claim(claim))) =
                (&change.key, &change.after)
                && let Some(token) = claim.token()
            {
                self.tokens.insert((key.lock.clone(), claim.lease), token);
            }
        }
    }

    fn token(&self, lock: &LockKey, text: &str) -> Revision {
        match text.parse() {
            Ok(number) => Revision(number),
            Err(_) => self.tokens[&(lock.clone(), lease_key(text).id)],
        }
    }

    pub(super) fn fence(&self, namespace: &Namespace, text: &str) -> Fence {
        let (lock, token) = text.split_once(':').expect("fence=lock:token");
        let key = LockKey { namespace: namespace.clone(), name: lock.into() };
        Fence { lock: key.name.clone(), token: self.token(&key, token) }
    }

    /// Has many leases, called l0000, l0001, ..., or one, wait for a lock.
    fn crowd(&mut self, mut words: Words<'_>, out: &mut String) {
        let count: usize = words.0.remove(0).parse().unwrap();
        let shared = words.take("lease");
        let lock = words.0.remove(0);
        for number in 0..count {
            let name = format!("l{number:04}");
            let lease = shared.unwrap_or(&name);
            if shared.is_none() {
                let grant = self.coordination_command("grant", &mut Words(vec![lease]));
                self.state.apply(&grant, false, &mut Vec::new());
            }
            let mut words = Words([&[lock, lease], &words.0[..]].concat());
            let acquire = self.coordination_command("acquire", &mut words);
            self.state.apply(&acquire, false, &mut Vec::new());
        }
        writeln!(out, "{} leases, {} claims", self.state.leases(), self.state.claims()).unwrap();
    }
}

impl Script {
    /// Has many members, called m0000, m0001, ..., join a ring on one lease.
    fn throng(&mut self, mut words: Words<'_>, out: &mut String) {
        let count: usize = words.0.remove(0).parse().unwrap();
        let ring = words.0.remove(0);
        for number in 0..count {
            let member = format!("{ring}#m{number:04}");
            let mut words = Words([&[member.as_str()], &words.0[..]].concat());
            let join = self.coordination_command("join", &mut words);
            self.state.apply(&join, false, &mut Vec::new());
        }
        writeln!(out, "{} leases, {} members", self.state.leases(), self.state.members()).unwrap();
    }
}

/// `*257` is a text of that length.
fn text(text: &str) -> Arc<str> {
    match text.strip_prefix('*') {
        Some(length) => "x".repeat(length.parse().unwrap()).into(),
        None => text.into(),
    }
}

/// All words that are left, which are `name=value`; `many=65` stands for so many tags.
fn tags(words: &mut Words<'_>) -> std::collections::BTreeMap<String, String> {
    let many: usize = words.take("many").map_or(0, |count| count.parse().unwrap());
    let numbered = (0..many).map(|number| (format!("{number:04}"), String::new()));
    let tag = |word: &str| {
        let (name, value) = word.split_once('=').expect("name=value");
        (name.to_string(), text(value).to_string())
    };
    let tags: Vec<_> = words.0.drain(..).map(tag).collect();
    tags.into_iter().chain(numbered).collect()
}

/// The longest names as scripts write them.
fn short(text: &str) -> String {
    text.replace(&"x".repeat(256), "*256")
}

fn ring_key(name: &str) -> RingKey {
    let (namespace, name) = split_name(name);
    RingKey { namespace, name: text(name) }
}

/// `ring#member`.
fn member_key(name: &str) -> MemberKey {
    let (ring, name) = name.split_once('#').expect("ring#member");
    MemberKey { ring: ring_key(ring), name: text(name) }
}

fn member_text(member: &Member) -> String {
    let MemberData { address, weight, tags } = member.data();
    let mut text = format!("weight {weight}, lease {}", id_text(member.lease()));
    if !address.is_empty() {
        text += &format!(", at {address}");
    }
    for (name, value) in tags {
        text += &format!(", {name}={value}");
    }
    text + &format!(", since {}, @{}", time_text(member.join_time()), member.revision())
}

fn ring_text(name: &str, view: &RingView, out: &mut String) {
    let unswept = if view.is_settled { "" } else { ", others not swept yet" };
    let count = view.members.len();
    writeln!(out, "{name}: @{}, {count} members{unswept}", view.revision).unwrap();
    for MemberView { name, member } in view.members.iter().take(4) {
        writeln!(out, "  {name}: {}", member_text(member)).unwrap();
    }
}

fn mode(words: &mut Words<'_>) -> LockMode {
    if let Some(permits) = words.take("permits") {
        let (take, of) = permits.split_once('/').expect("permits=2/5");
        return LockMode::Permits { of: of.parse().unwrap(), take: take.parse().unwrap() };
    }
    if words.take_word("shared") { LockMode::Shared } else { LockMode::Exclusive }
}

fn lease_key(text: &str) -> LeaseKey {
    let (namespace, name) = split_name(text);
    let mut id = LeaseId([0; 16]);
    id.0[..name.len()].copy_from_slice(name.as_bytes());
    LeaseKey { namespace, id }
}

fn lock_key(text: &str) -> LockKey {
    let (namespace, name) = split_name(text);
    // A name that is nothing but `*257` is that long.
    let name = match name.strip_prefix('*') {
        Some(length) => "x".repeat(length.parse().unwrap()).into(),
        None => name.into(),
    };
    LockKey { namespace, name }
}

fn id_text(id: LeaseId) -> String {
    String::from_utf8_lossy(&id.0).trim_end_matches('\0').to_string()
}

fn mode_text(mode: LockMode) -> String {
    match mode {
        LockMode::Exclusive => "exclusive".into(),
        LockMode::Shared => "shared".into(),
        LockMode::Permits { of, take } => format!("{take} of {of}"),
    }
}

fn state_text(claim: &Claim) -> String {
    match claim.state {
        ClaimState::Waiting { deadline } => format!("waits until {}", time_text(deadline)),
        ClaimState::Held { token, .. } => format!("holds with token {token}"),
        ClaimState::Delayed { until, .. } => format!("lost, kept back until {}", time_text(until)),
    }
}

fn lease_text(lease: &Lease) -> String {
    let owner = if lease.owner().is_empty() { "nobody" } else { lease.owner() };
    let ttl = time_text(Timestamp(millis(lease.ttl())));
    let granted = format!("{}@{}", time_text(lease.granted_time()), lease.granted_revision());
    let ends = time_text(lease.deadline());
    format!(
        "of {owner}, granted {granted}, ttl {ttl}, ends {ends}{}",
        remembered(&lease.requests())
    )
}

fn view_text(view: &LockView, out: &mut String) {
    let LockView { name, kind, holders_count, waiters_count, .. } = view;
    writeln!(out, "{name}: {kind}, {holders_count} in it, {waiters_count} wait").unwrap();
    for view in view.holders.iter().chain(&view.waiters) {
        let (mode, state) = (mode_text(view.claim.mode), state_text(&view.claim));
        let lease = match &view.lease {
            Some(lease) if !lease.owner().is_empty() => format!(" ({})", lease.owner()),
            Some(_) | None => String::new(),
        };
        let id = id_text(view.claim.lease);
        writeln!(out, "  #{} {mode}, lease {id}{lease}: {state}", view.order).unwrap();
    }
}

/// A change of a record that is about leases or locks.
pub(super) fn change_text(change: &Change) -> String {
    let what = match (&change.before, &change.after) {
        (None, Some(_)) => "put",
        (Some(_), Some(_)) => "changed",
        (Some(_), None) => "removed",
        (None, None) => "nothing",
    };
    match &change.key {
        RecordKey::Lease(key) => format!("lease {}/{} {what}", key.namespace, id_text(key.id)),
        RecordKey::LeaseTombstone(key) => {
            format!("lease tombstone {}/{} {what}", key.namespace, id_text(key.id))
        }
        RecordKey::Claim(key) => {
            let of = |record: &Option<Record>| match record {
                Some(Record::Claim(claim)) => Some(id_text(claim.lease)),
                _ => None,
            };
            let lease = of(&change.before).or(of(&change.after)).unwrap();
            let state = match &change.after {
                Some(Record::Claim(claim)) => state_text(claim),
                _ => what.into(),
            };
            format!("claim {key} of {lease} {state}")
        }
        RecordKey::Ring(key) => short(&format!("ring {key} {what}")),
        RecordKey::Member(key) => short(&format!("member {key} {what}")),
        RecordKey::Session(_) | RecordKey::Tombstone(_) => unreachable!(),
    }
}

/// A record that is about leases or locks.
pub(super) fn record_text(key: &RecordKey, record: &Record) -> String {
    match (key, record) {
        (RecordKey::Lease(key), Record::Lease(lease)) => {
            format!("{}/{}: lease {}", key.namespace, id_text(key.id), lease_text(lease))
        }
        (RecordKey::LeaseTombstone(key), Record::LeaseTombstone(stone)) => format!(
            "{}/{}: lease tombstone, {:?}, removed {}, until {}{}",
            key.namespace,
            id_text(key.id),
            stone.end(),
            time_text(stone.removed_time()),
            time_text(stone.deadline()),
            remembered(&stone.requests()),
        ),
        (RecordKey::Claim(key), Record::Claim(claim)) => format!(
            "{key}: {} of {}, {}, since {}, made by {}",
            mode_text(claim.mode),
            id_text(claim.lease),
            state_text(claim),
            time_text(claim.enqueued_time),
            claim.request.id,
        ),
        (RecordKey::Ring(key), Record::Ring(ring)) => format!("{key}: ring @{}", ring.revision()),
        (RecordKey::Member(key), Record::Member(member)) => {
            format!("{key}: {}", member_text(member))
        }
        _ => unreachable!(),
    }
}

/// An outcome that is about leases or locks.
pub(super) fn outcome_text(outcome: &Outcome) -> String {
    match outcome {
        Outcome::Done => "done".into(),
        Outcome::LeaseGranted { deadline } => format!("granted, ends {}", time_text(*deadline)),
        Outcome::LeasesRenewed(deadlines) => {
            let text = |deadline: &Option<_>| deadline.map_or("gone".into(), time_text);
            let deadlines: Vec<String> = deadlines.iter().map(text).collect();
            format!("renewed, end {}", deadlines.join(", "))
        }
        Outcome::LockGranted { token, lease_deadline, .. } => {
            format!("held, token {token}, lease ends {}", time_text(*lease_deadline))
        }
        Outcome::LockWaiting { position } => format!("waits, position {position}"),
        Outcome::RingJoined { lease_deadline } => {
            format!("joined, lease ends {}", time_text(*lease_deadline))
        }
        Outcome::Written { .. } | Outcome::Rejected(_) => unreachable!(),
    }
}
