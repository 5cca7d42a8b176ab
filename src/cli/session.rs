//! `quorate session`: every call on sessions, from the shell.

use std::time::Duration;

use clap::{Args, Subcommand};
use serde_json::{Map, Value, json};

use super::Common;
use super::argument::{self, Stdin};
use super::failure::Failure;
use super::output::{
    self, Now, Output, Table, length_json, printable, time_json, timeout_text, value_json,
    value_text,
};
use crate::client::{
    Client, Created, DeleteOptions, ListOptions, NewSession, ReadOptions, Selector, Session,
    Timeout, Update,
};
use crate::limits::PAGE_SIZE_MAX;

/// The calls.
#[derive(Debug, Subcommand)]
pub(crate) enum SessionCommand {
    /// Create a session and print its id
    #[command(after_help = "Example:\n  \
        quorate session create --principal alice --idle-timeout 30m theme=dark photo=@me.png\n  \
        quorate session create --literal \"handle=$handle\"    # whatever it begins with")]
    Create(CreateArguments),
    /// Print a session
    #[command(after_help = "Example:\n  quorate session get \"$id\" --output json")]
    Get(GetArguments),
    /// Set and remove attributes of a session
    #[command(after_help = "Example:\n  \
        quorate session set \"$id\" --expect-version 7 --remove cart theme=light")]
    Set(SetArguments),
    /// Count an access: the idle timeout starts again
    Touch(SelectArguments),
    /// End a session for good
    Delete(DeleteArguments),
    /// List the sessions of the namespace, by their handles
    List(ListArguments),
}

/// `quorate session create`.
#[derive(Args, Debug)]
pub(crate) struct CreateArguments {
    /// Use this id, or - to read it from standard input, instead of a fresh secret
    #[arg(long, allow_hyphen_values = true)]
    id: Option<String>,
    /// The user it belongs to
    #[arg(long, value_name = "USER")]
    principal: Option<String>,
    /// End it when it has not been used for so long: 30m, or never [default: the namespace's]
    #[arg(long, value_name = "TIME", value_parser = argument::timeout)]
    idle_timeout: Option<Timeout>,
    /// End it at this age: 12h, or never [default: the namespace's]
    #[arg(long, value_name = "TIME", value_parser = argument::timeout)]
    absolute_timeout: Option<Timeout>,
    /// Take every value as it stands: no files, no standard input
    #[arg(long)]
    literal: bool,
    /// Attributes; NAME=@FILE takes a file, NAME=@@TEXT the text @TEXT, NAME=- standard input
    #[arg(value_name = "NAME=VALUE")]
    attributes: Vec<String>,
}

/// Which session.
#[derive(Args, Debug)]
pub(crate) struct SelectArguments {
    /// The session's id, or - to read it from standard input
    #[arg(value_name = "ID")]
    positional: Option<String>,
    /// The same
    #[arg(long, allow_hyphen_values = true, conflicts_with = "positional")]
    id: Option<String>,
    /// The session's handle, in place of its id
    #[arg(long, conflicts_with_all = ["positional", "id"])]
    handle: Option<String>,
}

impl SelectArguments {
    fn selector(&self) -> Result<Selector, Failure> {
        let id = self.positional.as_deref().or(self.id.as_deref());
        argument::selector(id, self.handle.as_deref(), &mut Stdin::default())
    }
}

/// `quorate session get`.
#[derive(Args, Debug)]
pub(crate) struct GetArguments {
    #[command(flatten)]
    select: SelectArguments,
    /// Answer from what the asked node has, though it may be stale
    #[arg(long)]
    local: bool,
    /// With --local, only if what it has is no older than this
    #[arg(long, value_name = "TIME", requires = "local")]
    #[arg(value_parser = argument::positive_duration)]
    max_staleness: Option<Duration>,
}

/// `quorate session set`.
#[derive(Args, Debug)]
#[command(override_usage = "quorate session set [OPTIONS] <ID|--id <ID>|--handle <HANDLE>> \
                            [NAME=VALUE]...")]
pub(crate) struct SetArguments {
    /// The session's id, or - to read it from standard input; or the first of the attributes
    #[arg(value_name = "ID")]
    first: Option<String>,
    /// Attributes to set; NAME=@FILE takes a file, NAME=@@TEXT the text @TEXT, NAME=- standard
    /// input
    #[arg(value_name = "NAME=VALUE")]
    attributes: Vec<String>,
    /// The session's id, in place of the first argument
    #[arg(long, allow_hyphen_values = true)]
    id: Option<String>,
    /// The session's handle, in place of its id
    #[arg(long, conflicts_with = "id")]
    handle: Option<String>,
    /// Change it only if it has this version
    #[arg(long, value_name = "VERSION")]
    expect_version: Option<u64>,
    /// Change it only while this fencing token holds the lock
    #[arg(long, value_name = "LOCK:TOKEN", value_parser = argument::fence)]
    fence: Option<(String, u64)>,
    /// Remove this attribute; may be given several times
    #[arg(long, value_name = "NAME")]
    remove: Vec<String>,
    /// Hand it to this user; "" for nobody
    #[arg(long, value_name = "USER")]
    principal: Option<String>,
    /// Its new idle timeout: 30m, or never
    #[arg(long, value_name = "TIME", value_parser = argument::timeout)]
    idle_timeout: Option<Timeout>,
    /// Take every value as it stands: no files, no standard input
    #[arg(long)]
    literal: bool,
}

impl SetArguments {
    /// What to change, and where. The first argument is the id unless an option names the session.
    fn into_update(self) -> Result<(Selector, Update), Failure> {
        let stdin = &mut Stdin::default();
        // An id has no "=", so an attribute as the first word means that the id was left out.
        let is_id = |first: &String| !first.contains('=');
        let is_named = self.id.is_some() || self.handle.is_some();
        let (id, first) = match self.first {
            Some(first) if !is_named && is_id(&first) => (Some(first), None),
            first => (self.id, first),
        };
        let attributes: Vec<String> = first.into_iter().chain(self.attributes).collect();
        let changes = !attributes.is_empty()
            || !self.remove.is_empty()
            || self.principal.is_some()
            || self.idle_timeout.is_some();
        if !changes {
            let message = "nothing to set; `quorate session touch` counts an access";
            return Err(Failure::Usage(message.to_owned()));
        }
        let selector = argument::selector(id.as_deref(), self.handle.as_deref(), stdin)?;
        let mut update = Update::new();
        for (name, value) in argument::attributes(&attributes, self.literal, stdin)? {
            update = update.set(name, value);
        }
        update = self.remove.into_iter().fold(update, Update::remove);
        if let Some(version) = self.expect_version {
            update = update.expect_version(version);
        }
        if let Some((lock, token)) = self.fence {
            update = update.fence(lock, token);
        }
        if let Some(principal) = self.principal {
            update = update.principal(principal);
        }
        if let Some(timeout) = self.idle_timeout {
            update = update.idle_timeout(timeout);
        }
        Ok((selector, update))
    }
}

/// `quorate session delete`.
#[derive(Args, Debug)]
pub(crate) struct DeleteArguments {
    #[command(flatten)]
    select: SelectArguments,
    /// End it only while this fencing token holds the lock
    #[arg(long, value_name = "LOCK:TOKEN", value_parser = argument::fence)]
    fence: Option<(String, u64)>,
}

/// `quorate session list`.
#[derive(Args, Debug)]
pub(crate) struct ListArguments {
    /// Only those of this user
    #[arg(long, value_name = "USER")]
    principal: Option<String>,
    /// At most so many
    #[arg(long, value_name = "NUMBER", default_value_t = 100, allow_negative_numbers = true)]
    #[arg(value_parser = argument::list_limit)]
    limit: usize,
}

/// Does what the command says.
pub(crate) async fn run(command: SessionCommand, common: &Common) -> Result<(), Failure> {
    let output = common.output();
    let client = common.client().build()?;
    let sessions = client.sessions();
    // Once a call has been answered.
    let now = || Now(client.cluster_time());
    match command {
        SessionCommand::Create(arguments) => {
            let created = sessions.create(new_session(arguments)?).await?;
            output.result(created.id.reveal(), &created_json(&created))
        }
        SessionCommand::Get(arguments) => {
            let mut options = ReadOptions::new();
            if arguments.local {
                options = options.local(0);
            }
            if let Some(age) = arguments.max_staleness {
                options = options.max_staleness(age);
            }
            let found = sessions.get_with(arguments.select.selector()?, options).await?;
            show(output, &found.value, found.revision, now())
        }
        SessionCommand::Set(arguments) => {
            let (selector, update) = arguments.into_update()?;
            let updated = sessions.update(selector, update).await?;
            let text =
                format!("version {}, expires {}", updated.version, now().expiry(updated.expires));
            let json =
                json!({ "revision": updated.version, "expire_time": time_json(updated.expires) });
            output.result(&text, &json)
        }
        SessionCommand::Touch(arguments) => {
            let touched = sessions.touch(arguments.selector()?).await?;
            let text =
                format!("version {}, expires {}", touched.version, now().expiry(touched.expires));
            let json = json!({
                "revision": touched.revision,
                "version": touched.version,
                "expire_time": time_json(touched.expires),
            });
            output.result(&text, &json)
        }
        SessionCommand::Delete(arguments) => {
            let mut options = DeleteOptions::new();
            if let Some((lock, token)) = arguments.fence {
                options = options.fence(lock, token);
            }
            let revision = sessions.delete_with(arguments.select.selector()?, options).await?;
            output
                .result(&format!("deleted at revision {revision}"), &json!({"revision": revision}))
        }
        SessionCommand::List(arguments) => list(&client, arguments, output).await,
    }
}

fn new_session(arguments: CreateArguments) -> Result<NewSession, Failure> {
    let stdin = &mut Stdin::default();
    let mut session = NewSession::new();
    if let Some(id) = &arguments.id {
        session = session.id(argument::session_id(id, stdin)?);
    }
    for (name, value) in argument::attributes(&arguments.attributes, arguments.literal, stdin)? {
        session = session.attribute(name, value);
    }
    if let Some(principal) = arguments.principal {
        session = session.principal(principal);
    }
    if let Some(timeout) = arguments.idle_timeout {
        session = session.idle_timeout(timeout);
    }
    if let Some(timeout) = arguments.absolute_timeout {
        session = session.absolute_timeout(timeout);
    }
    Ok(session)
}

async fn list(client: &Client, arguments: ListArguments, output: Output) -> Result<(), Failure> {
    let page_size = arguments.limit.min(PAGE_SIZE_MAX);
    let mut options = ListOptions::new().page_size(u32::try_from(page_size).unwrap_or(u32::MAX));
    if let Some(principal) = arguments.principal {
        options = options.principal(principal);
    }
    let mut found = Vec::new();
    let mut next = None;
    let more = loop {
        let page = client.sessions().list(&options, next).await?;
        found.extend(page.sessions);
        next = page.next;
        if found.len() >= arguments.limit || next.is_none() {
            break next.is_some() || found.len() > arguments.limit;
        }
    };
    found.truncate(arguments.limit);
    let now = Now(client.cluster_time());
    let mut table =
        Table::new(&["HANDLE", "PRINCIPAL", "VERSION", "SIZE", "AGE", "EXPIRES IN"], &[2, 3]);
    for session in &found {
        table.row([
            printable(session.handle.as_str()),
            if session.principal.is_empty() { "-".into() } else { printable(&session.principal) },
            session.version.to_string(),
            output::bytes(session.size_bytes),
            now.age(session.created),
            now.until(session.expires),
        ]);
    }
    let objects: Vec<Value> =
        found.iter().map(|session| Value::Object(session_json(session, false))).collect();
    output.list(&table, &objects)?;
    if more {
        output::message("quorate: there are more; raise --limit to see them");
    }
    Ok(())
}

fn show(output: Output, session: &Session, revision: u64, now: Now) -> Result<(), Failure> {
    let mut table = Table::plain();
    let none = || "-".to_owned();
    let principal =
        if session.principal.is_empty() { none() } else { printable(&session.principal) };
    table.row(["handle", &printable(session.handle.as_str())]);
    table.row(["namespace", &printable(&session.namespace)]);
    table.row(["principal", &principal]);
    table.row(["version", &session.version.to_string()]);
    table.row(["age", &now.age(session.created)]);
    let ago = |time| match now {
        Now(Some(_)) => format!("{} ago", now.age(Some(time))),
        Now(None) => output::time_text(time),
    };
    table.row(["last access", &session.last_access.map_or_else(none, ago)]);
    table.row(["idle timeout", &timeout_text(session.idle_timeout)]);
    table.row(["absolute timeout", &timeout_text(session.absolute_timeout)]);
    table.row(["expires", &now.expiry(session.expires)]);
    table.row(["size", &output::bytes(session.size_bytes)]);
    let mut text = table.render();
    if !session.attributes.is_empty() {
        let mut attributes = Table::new(&["ATTRIBUTE", "VALUE"], &[]);
        for (name, value) in &session.attributes {
            attributes.row([printable(name), value_text(value)]);
        }
        text.push('\n');
        text.push_str(&attributes.render());
    }
    let json = json!({ "revision": revision, "session": session_json(session, true) });
    output.result(text.trim_end(), &json)
}

fn created_json(created: &Created) -> Value {
    json!({
        "revision": created.version,
        "id": created.id.reveal(),
        "handle": created.handle.as_str(),
        "expire_time": time_json(created.expires),
    })
}

fn session_json(session: &Session, with_attributes: bool) -> Map<String, Value> {
    let mut object = Map::new();
    let mut put = |name: &str, value: Value| object.insert(name.to_owned(), value);
    put("namespace", session.namespace.as_str().into());
    put("handle", session.handle.as_str().into());
    put("principal", session.principal.as_str().into());
    if with_attributes {
        let attributes = session.attributes.iter();
        put(
            "attributes",
            attributes.map(|(name, value)| (name.clone(), value_json(value))).collect(),
        );
    }
    put("version", session.version.into());
    put("create_time", time_json(session.created));
    put("last_access_time", time_json(session.last_access));
    put("idle_timeout", length_json(session.idle_timeout));
    put("absolute_timeout", length_json(session.absolute_timeout));
    put("expire_time", time_json(session.expires));
    put("size_bytes", session.size_bytes.into());
    object
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::client::SessionId;

    #[derive(Debug, Parser)]
    struct Set {
        #[command(flatten)]
        arguments: SetArguments,
    }

    fn set(line: &str) -> Result<(Selector, Update), Failure> {
        let words = std::iter::once("set").chain(line.split_whitespace());
        Set::try_parse_from(words).unwrap().arguments.into_update()
    }

    const ID: &str = "0123456789abcdef";
    const HANDLE: &str = "0123456789abcdef0123456789abcdef";

    #[test]
    fn the_session_to_set_is_named_first_or_by_an_option() {
        let (selector, _) = set(&format!("{ID} a=b")).unwrap();
        assert_eq!(selector, SessionId::new(ID).unwrap().into());
        let (selector, _) = set(&format!("a=b --id {ID}")).unwrap();
        assert_eq!(selector, SessionId::new(ID).unwrap().into());
        let (selector, _) = set(&format!("--id -{ID} a=b")).unwrap();
        assert_eq!(selector, SessionId::new(format!("-{ID}")).unwrap().into());
        let (selector, _) = set(&format!("--handle {HANDLE} a=b")).unwrap();
        assert!(matches!(selector, Selector::Handle(_)));
        assert!(matches!(set("a=b"), Err(Failure::Usage(_))));
        assert!(matches!(set(ID), Err(Failure::Usage(_))));
        assert!(set(&format!("{ID} --remove a")).is_ok());
        assert!(matches!(set(&format!("{ID} {ID}")), Err(Failure::Usage(_))));
        assert!(matches!(set(&format!("--handle {HANDLE} {ID}")), Err(Failure::Usage(_))));
    }

    #[test]
    fn json_has_the_names_of_the_protos() {
        let session = Session::from(crate::proto::v1::Session {
            namespace: "default".into(),
            handle: HANDLE.into(),
            principal: String::new(),
            attributes: [("a".to_owned(), "b".into()), ("c".to_owned(), vec![0xff].into())].into(),
            version: 7,
            idle_timeout: Some(prost_types::Duration { seconds: 1_800, nanos: 0 }),
            size_bytes: 4,
            ..Default::default()
        });
        let expected = json!({
            "namespace": "default",
            "handle": HANDLE,
            "principal": "",
            "attributes": { "a": "b", "c": { "base64": "/w==" } },
            "version": 7,
            "create_time": null,
            "last_access_time": null,
            "idle_timeout": "1800s",
            "absolute_timeout": null,
            "expire_time": null,
            "size_bytes": 4,
        });
        assert_eq!(Value::Object(session_json(&session, true)), expected);
        assert!(!session_json(&session, false).contains_key("attributes"));
    }
}
