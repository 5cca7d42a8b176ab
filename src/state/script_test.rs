//! Runs the scripts in `testscripts`: what a person types at a state, and what it answers.
//!
//! A script is stanzas, separated by blank lines: comments, commands, `---`, and what the commands
//! printed. `UPDATE_GOLDENFILES=1 cargo test --lib state` writes the last part anew, and the
//! difference is for a person to read. Times count from the epoch of cluster time; sessions are
//! called by names of up to 16 characters, which stand for their digests.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;
use std::time::Duration;

use super::script_lock_test::{change_text, outcome_text, record_text};
use super::*;

#[test]
fn scripts() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/state/testscripts");
    let update = std::env::var_os("UPDATE_GOLDENFILES").is_some();
    let mut failed = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|extension| extension != "txt") {
            continue;
        }
        let script = std::fs::read_to_string(&path).unwrap();
        let found = run(&script);
        if found != script && update {
            std::fs::write(&path, found).unwrap();
        } else if found != script {
            let lines = found.lines().zip(script.lines());
            let (number, (found, expected)) =
                lines.enumerate().find(|(_, (a, b))| a != b).unwrap_or((0, ("end", "end")));
            let name = path.file_name().unwrap().display().to_string();
            failed.push(format!("{name}:{}\n  wants {expected}\n  finds {found}", number + 1));
        }
    }
    assert!(failed.is_empty(), "UPDATE_GOLDENFILES=1 rewrites scripts\n{}", failed.join("\n"));
}

fn run(script: &str) -> String {
    let mut session = Script::default();
    let mut out = String::new();
    for stanza in script.split("\n\n").map(str::trim).filter(|stanza| !stanza.is_empty()) {
        let input = stanza.split("\n---").next().unwrap();
        out += if out.is_empty() { "" } else { "\n" };
        let mut printed = String::new();
        for line in input.lines().filter(|line| !line.starts_with('#')) {
            session.execute(line, &mut printed);
        }
        out += input;
        out += if printed.is_empty() { "\n" } else { "\n---\n" };
        out += &printed;
    }
    out
}

#[derive(Default)]
pub(super) struct Script {
    pub(super) state: State,
    /// Ids of requests that say none.
    requests: u64,
    /// The last token of each lease on each lock.
    pub(super) tokens: BTreeMap<(LockKey, LeaseId), Revision>,
}

/// A command's arguments: words such as `name=value`, `-name` and `word`.
pub(super) struct Words<'a>(pub(super) Vec<&'a str>);

impl<'a> Words<'a> {
    /// Takes out the value of `name=value`.
    pub(super) fn take(&mut self, name: &str) -> Option<&'a str> {
        let value = |word: &&'a str| word.strip_prefix(name)?.strip_prefix('=');
        let index = self.0.iter().position(|word| value(word).is_some())?;
        let word = self.0.remove(index);
        value(&word)
    }

    pub(super) fn take_word(&mut self, word: &str) -> bool {
        let before = self.0.len();
        self.0.retain(|other| *other != word);
        self.0.len() < before
    }

    /// Takes out `-name`s and `name=value`s; `name=*1000` is a value of a thousand bytes.
    fn take_attributes(&mut self) -> (Vec<Attribute>, Vec<String>) {
        let (mut set, mut remove) = (Vec::new(), Vec::new());
        for word in self.0.drain(..) {
            if let Some(name) = word.strip_prefix('-') {
                remove.push(name.to_string());
                continue;
            }
            let (name, value) = word.split_once('=').expect("name=value");
            let value = match value.strip_prefix('*') {
                Some(length) => vec![b'x'; length.parse().unwrap()],
                None => value.as_bytes().to_vec(),
            };
            set.push(Attribute { name: name.to_string(), value: value.into() });
        }
        (set, remove)
    }
}

impl Script {
    fn execute(&mut self, line: &str, out: &mut String) {
        let mut words = Words(line.split_whitespace().collect());
        let command = words.0.remove(0);
        match command {
            "advance" => {
                let by = duration(words.0[0]);
                let Stamp { time, steady } = self.state.clock();
                let stamp = Stamp { time: time.plus(by), steady: steady.plus(by) };
                self.state.advance(stamp);
                self.print_clock(out);
            }
            // Time leaps, as it does after the whole cluster was down; the steady clock does not.
            "jump" => {
                let Stamp { time, steady } = self.state.clock();
                self.state.advance(Stamp { time: time.plus(duration(words.0[0])), steady });
                self.print_clock(out);
            }
            "create" | "update" | "touch" | "delete" | "tick" | "raise" => {
                let resend = words.take_word("resend");
                let command = self.command(command, &mut words);
                self.apply(&command, resend, out);
            }
            "fill" => self.fill(words, out),
            "get" => {
                let key = key(words.0[0]);
                let found = self.state.query(&Query::GetSession(key.clone())).sessions.pop();
                let text = found.map_or("not found".into(), |(_, session)| describe(&session));
                writeln!(out, "{}: {text}", key_text(&key)).unwrap();
            }
            "need" => {
                let key = key(words.0.remove(0));
                let now = words.take("now").map_or(0, |now| millis(duration(now)));
                let need = match self.state.touch_need(&key, Timestamp(now)) {
                    TouchNeed::NotFound => "NotFound",
                    TouchNeed::None { .. } => "None",
                    TouchNeed::Propose { .. } => "Propose",
                    TouchNeed::Wait { .. } => "Wait",
                };
                writeln!(out, "{need}").unwrap();
            }
            "list" => self.list(words, out),
            "due" => {
                let Deadlines { time, steady } = self.state.next_deadlines();
                let next = time.map_or("never".into(), time_text);
                let steady = steady.map(|it| format!(", on the steady clock {}", time_text(it)));
                let steady = steady.unwrap_or_default();
                writeln!(out, "next {next}{steady}, due {}", self.state.has_due()).unwrap();
            }
            "records" => {
                for (key, record) in self.state.records() {
                    let (RecordKey::Session(name) | RecordKey::Tombstone(name)) = &key else {
                        writeln!(out, "{}", record_text(&key, &record)).unwrap();
                        continue;
                    };
                    let text = match record {
                        Record::Session(session) => describe(&session),
                        Record::Tombstone(stone) => format!(
                            "tombstone, removed {}, until {}{}",
                            time_text(stone.removed_time()),
                            time_text(stone.deadline()),
                            remembered(&stone.requests()),
                        ),
                        _ => unreachable!(),
                    };
                    writeln!(out, "{}: {text}", key_text(name)).unwrap();
                }
            }
            "level" => writeln!(out, "level {}", self.state.feature_level()).unwrap(),
            // From here on a copy goes on in the state's place.
            "restore" => {
                let copy = restored(&self.state);
                let same = copy.digest() == self.state.digest();
                self.state = copy;
                writeln!(out, "same digest: {same}").unwrap();
            }
            _ => self.execute_coordination(command, words, out),
        }
    }

    fn print_clock(&self, out: &mut String) {
        let Stamp { time, steady } = self.state.clock();
        let differs =
            if steady == time { "".into() } else { format!(", steady {}", time_text(steady)) };
        writeln!(out, "clock {}{differs}", time_text(time)).unwrap();
    }

    fn command(&mut self, command: &str, words: &mut Words<'_>) -> Command {
        if command == "tick" {
            return Command::Tick;
        }
        if command == "raise" {
            return Command::RaiseFeatureLevel { to: words.0.remove(0).parse().unwrap() };
        }
        let key = key(words.0.remove(0));
        let request = self.request(words);
        let fence = words.take("fence").map(|text| self.fence(&key.namespace, text));
        let expected_version =
            words.take("expect").map(|version| Revision(version.parse().unwrap()));
        let idle_timeout = words.take("idle").map(timeout);
        let absolute_timeout = words.take("absolute").map(timeout);
        let principal = words.take("user").map(|name| Some(name).filter(|name| !name.is_empty()));
        let principal = principal.map(|name| name.map(Arc::from));
        let many: usize = words.take("many").map_or(0, |count| count.parse().unwrap());
        let (mut set, remove) = words.take_attributes();
        let empty = |number| Attribute { name: format!("{number:04}"), value: Bytes::new() };
        set.extend((0..many).map(empty));
        match command {
            "create" => Command::CreateSession {
                request,
                key,
                principal: principal.flatten(),
                attributes: set,
                idle_timeout,
                absolute_timeout,
            },
            "update" => Command::UpdateSession {
                request,
                key,
                set,
                remove,
                expected_version,
                principal,
                idle_timeout,
                fence,
            },
            "touch" => Command::TouchSession { request, key },
            "delete" => Command::DeleteSession { request, key, expected_version, fence },
            _ => unreachable!(),
        }
    }

    /// A request, as far as the words say, and otherwise a new one of now.
    pub(super) fn request(&mut self, words: &mut Words<'_>) -> Request {
        self.requests += 1;
        let time = |text: &str| Timestamp(millis(duration(text)));
        let id = words.take("request").map_or(1_000 + self.requests, |id| id.parse().unwrap());
        let first_sent = words.take("sent").map_or(self.state.clock().time, time);
        let latest = first_sent.plus(Duration::from_secs(60));
        let expires = words.take("expires").map_or(latest, time);
        Request { id, first_sent, expires }
    }

    pub(super) fn apply(&mut self, command: &Command, resend: bool, out: &mut String) {
        let mut changes = Vec::new();
        // As a command would come out of the log.
        let level = self.state.feature_level();
        let command = decode_command(encode_command(command, level), level).unwrap();
        let Reply { revision, outcome } = self.state.apply(&command, resend, &mut changes);
        match outcome {
            Outcome::Written { version, deadline } => {
                let deadline = deadline.map_or("never".into(), time_text);
                writeln!(out, "@{revision} written, version {version}, expires {deadline}")
                    .unwrap();
            }
            Outcome::Rejected(rejection) => {
                writeln!(out, "@{revision} refused: {rejection:?}").unwrap();
            }
            other => writeln!(out, "@{revision} {}", outcome_text(&other)).unwrap(),
        }
        self.follow_tokens(&changes);
        for change in changes.iter().take(8) {
            let (revision, cause) = (change.revision, change.cause);
            let (RecordKey::Session(key) | RecordKey::Tombstone(key)) = &change.key else {
                writeln!(out, "  @{revision} {cause}: {}", change_text(change)).unwrap();
                continue;
            };
            let kind = change.key.kind();
            let what = match (&change.before, &change.after) {
                (None, Some(_)) => "put",
                (Some(_), Some(_)) => "changed",
                (Some(_), None) => "removed",
                (None, None) => "nothing",
            };
            writeln!(out, "  @{revision} {cause}: {kind} {} {what}", key_text(key)).unwrap();
        }
        if changes.len() > 8 {
            writeln!(out, "  {} changes in all", changes.len()).unwrap();
        }
    }

    /// Creates sessions called s0000, s0001, ...
    fn fill(&mut self, mut words: Words<'_>, out: &mut String) {
        let count: usize = words.0.remove(0).parse().unwrap();
        for number in 0..count {
            let name = format!("s{number:04}");
            let mut words = Words([&[name.as_str()], &words.0[..]].concat());
            let command = self.command("create", &mut words);
            self.state.apply(&command, false, &mut Vec::new());
        }
        writeln!(out, "{} sessions", self.state.sessions()).unwrap();
    }

    fn list(&mut self, mut words: Words<'_>, out: &mut String) {
        let reply = self.state.query(&Query::ListSessions {
            principal: words.take("user").map(Arc::from),
            after: words.take("after").map(|name| key(name).digest),
            limit: words.take("limit").map_or(100, |limit| limit.parse().unwrap()),
            namespace: Namespace(words.0.first().copied().unwrap_or("web").into()),
        });
        let name = |(digest, _): &(Digest, _)| digest_text(digest);
        let names: Vec<_> = reply.sessions.iter().map(name).collect();
        let more = if reply.next.is_some() { ", more" } else { "" };
        writeln!(out, "@{}: [{}]{more}", reply.revision, names.join(" ")).unwrap();
    }
}

/// A copy of a state, by way of its stored form.
pub(super) fn restored(state: &State) -> State {
    let mut restore = Restore::new(&state.header()).unwrap();
    for (key, record) in state.records() {
        let mut value = Vec::new();
        encode_record(&record, &mut value);
        restore.insert(&encode_key(&key), &value).unwrap();
    }
    restore.finish().unwrap()
}

/// `name` or `namespace/name`.
fn key(text: &str) -> SessionKey {
    let (namespace, name) = split_name(text);
    let mut digest = Digest([0; 16]);
    digest.0[..name.len()].copy_from_slice(name.as_bytes());
    SessionKey { namespace, digest }
}

pub(super) fn split_name(text: &str) -> (Namespace, &str) {
    let (namespace, name) = text.split_once('/').unwrap_or(("web", text));
    (Namespace(namespace.into()), name)
}

fn key_text(key: &SessionKey) -> String {
    format!("{}/{}", key.namespace, digest_text(&key.digest))
}

fn digest_text(digest: &Digest) -> String {
    String::from_utf8_lossy(&digest.0).trim_end_matches('\0').to_string()
}

fn describe(session: &Session) -> String {
    let mut text = format!("version {}", session.version());
    if let Some(principal) = session.principal() {
        text += &format!(", user {principal}");
    }
    for (name, value) in session.attributes().take(8) {
        match value.len() {
            ..=16 => text += &format!(", {name}={}", String::from_utf8_lossy(value)),
            length => text += &format!(", {name} of {length} bytes"),
        }
    }
    text += &format!(", created {}", time_text(session.create_time()));
    text += &format!(", accessed {}", time_text(session.last_access_time()));
    text += &format!(", idle {}", timeout_text(session.idle_timeout()));
    text += &format!(", absolute {}", timeout_text(session.absolute_timeout()));
    text += &format!(", expires {}", session.deadline().map_or("never".into(), time_text));
    text + &remembered(&session.requests())
}

pub(super) fn remembered(requests: &retry::Requests) -> String {
    let mut text = String::new();
    for (index, request) in requests.recent().iter().enumerate() {
        text += if index == 0 { ", remembers " } else { " " };
        let mark = if request.resend { "*" } else { "" };
        text += &format!("{}{mark}@{}", request.id, request.revision);
    }
    if requests.forgotten() > Timestamp(0) {
        text += &format!(", forgot {}", time_text(requests.forgotten()));
    }
    if requests.forgotten_resend() > Timestamp(0) {
        text += &format!(", forgot resend {}", time_text(requests.forgotten_resend()));
    }
    text
}

pub(super) fn duration(text: &str) -> Duration {
    humantime::parse_duration(text).unwrap()
}

fn timeout(text: &str) -> Timeout {
    if text == "never" { Timeout::Never } else { Timeout::After(duration(text)) }
}

fn timeout_text(timeout: Timeout) -> String {
    match timeout {
        Timeout::Never => "never".into(),
        Timeout::After(length) => time_text(Timestamp(millis(length))),
    }
}

/// `1h2m3s4ms`, as `humantime` has it but without the spaces.
pub(super) fn time_text(time: Timestamp) -> String {
    let text = humantime::format_duration(Duration::from_millis(time.0)).to_string();
    text.replace(' ', "")
}
