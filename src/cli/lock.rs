//! `quorate lock`: every call on locks, from the shell; `lock exec` has a file of its own.

use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Subcommand};
use serde_json::{Value, json};

use super::Common;
use super::argument;
use super::exec::{self, ExecArguments};
use super::failure::Failure;
use super::output::{
    self, Format, Output, Table, age, length_json, length_or_dash, printable, printable_or_dash,
    time_json,
};
use crate::client::{Acquire, LeaseId, LockHolder, LockMode, LockRecord, LockWaiter, Locks};
use crate::limits::PAGE_SIZE_MAX;

/// The calls.
#[derive(Debug, Subcommand)]
pub(crate) enum LockCommand {
    /// Run a command while holding a lock
    #[command(after_help = "Example:\n  \
        quorate lock exec nightly --wait 10m -- pg_dump shop\n\n\
        The command finds the fencing token in QUORATE_FENCING_TOKEN and the lock's name in \
        QUORATE_LOCK. When the lock is lost it gets SIGTERM and soon SIGKILL; what it has started \
        itself does not. Exit code: the command's own (128 and the signal's number if one ended \
        it), 75 if the lock was not obtained in time, 4 if it was lost while a command ran that \
        then ended with 0, 126 or 127 if the command could not be run.")]
    Exec(ExecArguments),
    /// Take a lock for a lease and print the fencing token
    #[command(after_help = "Example:\n  \
        token=$(quorate lock acquire nightly --lease \"$lease\" --wait 10s)\n  \
        quorate session set \"$id\" --fence \"nightly:$token\" done=yes\n\n\
        The lock is held for as long as the lease lives, unless it is released.")]
    Acquire(AcquireArguments),
    /// Give a lock back
    Release(ReleaseArguments),
    /// Print a lock, who holds it and who waits for it
    Show(ShowArguments),
    /// List the locks of the namespace that somebody holds or waits for
    List(ListArguments),
    /// Take a lock away from its holder, who is not asked and finds out late
    Break(BreakArguments),
}

/// How a lock is to be held.
#[derive(Args, Clone, Debug)]
pub(crate) struct ModeArguments {
    /// Beside others that share it
    #[arg(long, conflicts_with = "permits")]
    shared: bool,
    /// As one of at most so many holders; all who use the lock must say the same number
    #[arg(long, value_name = "NUMBER")]
    permits: Option<u32>,
    /// How many of the permits to take
    #[arg(long, value_name = "NUMBER", requires = "permits", default_value_t = 1)]
    take: u32,
    /// How long to wait in line, at most 10m [default: not at all]
    #[arg(long, value_name = "TIME", value_parser = argument::duration)]
    wait: Option<Duration>,
    /// For how long nobody else gets the lock if this holder is lost rather than done
    #[arg(long, value_name = "TIME", value_parser = argument::duration)]
    lock_delay: Option<Duration>,
}

impl ModeArguments {
    /// The request for the lock of this name.
    pub(crate) fn request(&self, locks: &Locks, name: &str) -> Acquire {
        let mode = match (self.shared, self.permits) {
            (true, _) => LockMode::Shared,
            (false, Some(of)) => LockMode::Permits { of, take: self.take },
            (false, None) => LockMode::Exclusive,
        };
        locks
            .lock(name)
            .mode(mode)
            .wait(self.wait.unwrap_or_default())
            .lock_delay(self.lock_delay.unwrap_or_default())
    }
}

/// `quorate lock acquire`.
#[derive(Args, Debug)]
pub(crate) struct AcquireArguments {
    /// The lock's name
    name: String,
    /// The lease that it is to hang from
    #[arg(long, value_name = "ID", value_parser = argument::lease_id)]
    lease: LeaseId,
    #[command(flatten)]
    mode: ModeArguments,
}

/// `quorate lock release`.
#[derive(Args, Debug)]
pub(crate) struct ReleaseArguments {
    /// The lock's name
    name: String,
    /// The fencing token of the grant that is given back
    #[arg(long)]
    token: u64,
    /// The lease that holds it, which makes a retry safe
    #[arg(long, value_name = "ID", value_parser = argument::lease_id)]
    lease: Option<LeaseId>,
}

/// `quorate lock show`.
#[derive(Args, Debug)]
pub(crate) struct ShowArguments {
    /// The lock's name
    name: String,
    /// At most so many holders and so many waiters, up to 1000
    #[arg(long, value_name = "NUMBER", default_value_t = 100)]
    #[arg(value_parser = clap::value_parser!(u32).range(1..=1_000))]
    limit: u32,
}

/// `quorate lock list`.
#[derive(Args, Debug)]
pub(crate) struct ListArguments {
    /// At most so many
    #[arg(long, value_name = "NUMBER", default_value_t = 100)]
    limit: usize,
}

/// `quorate lock break`.
#[derive(Args, Debug)]
pub(crate) struct BreakArguments {
    /// The lock's name
    name: String,
    /// The fencing token of the holder that is to lose it
    #[arg(long)]
    token: u64,
    /// Give it to others at once, whatever lock-delay the holder asked for
    #[arg(long)]
    skip_lock_delay: bool,
}

/// Does what the command says.
pub(crate) async fn run(command: LockCommand, common: &Common) -> Result<ExitCode, Failure> {
    let output = common.output();
    let client = common.client().build()?;
    let locks = client.locks();
    match command {
        LockCommand::Exec(arguments) => return exec::run(arguments, &client).await,
        LockCommand::Acquire(arguments) => {
            let request = arguments.mode.request(&locks, &arguments.name);
            let granted = request.acquire_for(arguments.lease).await?;
            let json = json!({ "token": granted.token, "grant_time": time_json(granted.granted) });
            output.result(&granted.token.to_string(), &json)?;
        }
        LockCommand::Release(ReleaseArguments { name, token, lease }) => {
            let revision = locks.release(&name, token, lease).await?;
            let text = format!("released at revision {revision}");
            output.result(&text, &json!({ "revision": revision }))?;
        }
        LockCommand::Show(ShowArguments { name, limit }) => {
            let found = locks.get(&name, limit).await?;
            show(output, &found.value, found.revision)?;
        }
        LockCommand::List(arguments) => list(&locks, arguments, output).await?,
        LockCommand::Break(BreakArguments { name, token, skip_lock_delay }) => {
            let revision = locks.break_lock(&name, token, skip_lock_delay).await?;
            let text = format!("broken at revision {revision}");
            output.result(&text, &json!({ "revision": revision }))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

async fn list(locks: &Locks, arguments: ListArguments, output: Output) -> Result<(), Failure> {
    let page_size = u32::try_from(arguments.limit.clamp(1, PAGE_SIZE_MAX)).unwrap_or(u32::MAX);
    let mut found = Vec::new();
    let mut next = None;
    let more = loop {
        let page = locks.list(page_size, next).await?;
        found.extend(page.locks);
        next = page.next;
        if found.len() >= arguments.limit || next.is_none() {
            break next.is_some() || found.len() > arguments.limit;
        }
    };
    found.truncate(arguments.limit);
    let headings = ["NAME", "KIND", "HOLDERS", "WAITERS", "TOKEN", "OWNER", "HELD FOR"];
    let mut table = Table::new(&headings, &[2, 3, 4]);
    for lock in &found {
        let first = lock.holders.first();
        table.row([
            printable(&lock.name),
            kind_text(lock),
            lock.holder_count.to_string(),
            lock.waiter_count.to_string(),
            first.map_or_else(|| "-".to_owned(), |holder| holder.token.to_string()),
            printable_or_dash(first.map_or("", |holder| &holder.owner)),
            age(first.and_then(|holder| holder.granted)),
        ]);
    }
    let objects: Vec<Value> = found.iter().map(lock_json).collect();
    output.list(&table, &objects)?;
    if more {
        output::message("quorate: there are more; raise --limit to see them");
    }
    Ok(())
}

fn show(output: Output, lock: &LockRecord, revision: u64) -> Result<(), Failure> {
    if output.format == Format::Json {
        return output.result("", &json!({ "revision": revision, "lock": lock_json(lock) }));
    }
    let mut table = Table::plain();
    table.row(["name", &printable(&lock.name)]);
    table.row(["namespace", &printable(&lock.namespace)]);
    table.row(["kind", &kind_text(lock)]);
    if let Some(permits) = lock.permits {
        table.row(["permits taken", &format!("{} of {permits}", lock.permits_taken)]);
    }
    table.row(["holders", &lock.holder_count.to_string()]);
    table.row(["waiters", &lock.waiter_count.to_string()]);
    if lock.lock_delay_remaining.is_some() {
        table.row(["lock-delay", &length_or_dash(lock.lock_delay_remaining)]);
    }
    let mut text = table.render();
    if !lock.holders.is_empty() {
        let headings = ["HOLDER", "OWNER", "MODE", "TOKEN", "HELD FOR", "LEASE ENDS IN"];
        let mut holders = Table::new(&headings, &[3]);
        for holder in &lock.holders {
            let lease = holder.lease.map(|lease| lease.to_string());
            holders.row([
                lease.unwrap_or_else(|| "(lost)".to_owned()),
                printable_or_dash(&holder.owner),
                mode_text(holder.mode),
                holder.token.to_string(),
                age(holder.granted),
                length_or_dash(holder.lease_remaining),
            ]);
        }
        text.push('\n');
        text.push_str(&holders.render());
    }
    if !lock.waiters.is_empty() {
        let headings = ["WAITER", "OWNER", "MODE", "WAITED", "GIVES UP IN"];
        let mut waiters = Table::new(&headings, &[]);
        for waiter in &lock.waiters {
            waiters.row([
                waiter.lease.to_string(),
                printable_or_dash(&waiter.owner),
                mode_text(waiter.mode),
                age(waiter.since),
                length_or_dash(waiter.remaining),
            ]);
        }
        text.push('\n');
        text.push_str(&waiters.render());
    }
    output.result(text.trim_end(), &Value::Null)
}

fn kind_text(lock: &LockRecord) -> String {
    match lock.permits {
        Some(permits) => format!("{permits} permits"),
        None => "exclusive/shared".to_owned(),
    }
}

fn mode_text(mode: LockMode) -> String {
    match mode {
        LockMode::Exclusive => "exclusive".to_owned(),
        LockMode::Shared => "shared".to_owned(),
        LockMode::Permits { of, take } => format!("{take} of {of}"),
    }
}

fn mode_json(mode: LockMode) -> Value {
    match mode {
        LockMode::Exclusive => json!({ "exclusive": true }),
        LockMode::Shared => json!({ "shared": true }),
        LockMode::Permits { of, take } => json!({ "permits": { "of": of, "take": take } }),
    }
}

fn lock_json(lock: &LockRecord) -> Value {
    let kind = match lock.permits {
        Some(_) => "LOCK_KIND_PERMITS",
        None => "LOCK_KIND_EXCLUSIVE_SHARED",
    };
    json!({
        "namespace": lock.namespace,
        "name": lock.name,
        "kind": kind,
        "permits": lock.permits.unwrap_or(0),
        "permits_taken": lock.permits_taken,
        "holder_count": lock.holder_count,
        "holders": lock.holders.iter().map(holder_json).collect::<Vec<_>>(),
        "waiter_count": lock.waiter_count,
        "waiters": lock.waiters.iter().map(waiter_json).collect::<Vec<_>>(),
        "lock_delay_remaining": length_json(lock.lock_delay_remaining),
    })
}

fn holder_json(holder: &LockHolder) -> Value {
    json!({
        "lease_id": holder.lease.map(|lease| lease.to_string()).unwrap_or_default(),
        "request_id": holder.request_id,
        "owner": holder.owner,
        "mode": mode_json(holder.mode),
        "token": holder.token,
        "grant_time": time_json(holder.granted),
        "lease_remaining": length_json(holder.lease_remaining),
        "lock_delay_remaining": length_json(holder.lock_delay_remaining),
    })
}

fn waiter_json(waiter: &LockWaiter) -> Value {
    json!({
        "lease_id": waiter.lease.to_string(),
        "request_id": waiter.request_id,
        "owner": waiter.owner,
        "mode": mode_json(waiter.mode),
        "wait_start_time": time_json(waiter.since),
        "wait_remaining": length_json(waiter.remaining),
    })
}
