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
    self, Format, Now, Output, Table, length, length_json, length_or_dash, printable,
    printable_or_dash, time_json,
};
use super::signals::{Signals, ended_by};
use crate::client::{
    Acquire, Client, Error, LeaseId, LockHolder, LockMode, LockRecord, LockWaiter, Locks,
};
use crate::limits::PAGE_SIZE_MAX;

/// The calls.
#[derive(Debug, Subcommand)]
pub(crate) enum LockCommand {
    /// Run a command while holding a lock
    #[command(after_help = "Example:\n  \
        quorate lock exec nightly --wait 10m -- pg_dump shop\n\n\
        The command finds the fencing token in QUORATE_FENCING_TOKEN and the lock's name in \
        QUORATE_LOCK. When the lock is lost, or an operator breaks it, the command gets SIGTERM \
        and a twentieth of --ttl later (at least 500ms, at most 5s) SIGKILL; others are kept out \
        of the lock for as long, unless --lock-delay says otherwise. SIGINT, SIGTERM, SIGHUP and \
        SIGQUIT are passed on. In the foreground of a terminal only the command itself is \
        signalled; elsewhere (standard input is no terminal, or in the background) the command \
        gets a process group of its own, \
        and what it has started is signalled with it.\n\n\
        Exit code: the command's own (128 and the signal's number if one ended it), 75 if the lock \
        was not obtained in time, 4 if it was lost while a command ran that then ended with 0, 126 \
        or 127 if the command could not be run, 128 and the signal's number if a signal ended \
        the wait for the lock. A second signal at the end does not wait for the lock to be given \
        back.")]
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
    /// As one of at most so many holders, 1 to 1000000; all who use the lock must say the same
    #[arg(long, value_name = "NUMBER", allow_negative_numbers = true)]
    #[arg(value_parser = argument::permits)]
    permits: Option<u32>,
    /// How many of the permits to take
    #[arg(long, value_name = "NUMBER", requires = "permits", default_value_t = 1)]
    #[arg(value_parser = argument::permits, allow_negative_numbers = true)]
    take: u32,
    /// How long to wait in line, at most 10m, on top of --timeout [default: not at all]
    #[arg(long, value_name = "TIME", value_parser = argument::wait)]
    wait: Option<Duration>,
    /// For how long, at most 1m, nobody else gets the lock if this holder is lost rather than done
    /// [default: not at all; of lock exec, the time between SIGTERM and SIGKILL]
    #[arg(long, value_name = "TIME", value_parser = argument::lock_delay)]
    lock_delay: Option<Duration>,
}

impl ModeArguments {
    /// The request for the lock of this name, with this lock-delay unless another was asked for.
    pub(crate) fn request(
        &self,
        locks: &Locks,
        name: &str,
        lock_delay: Duration,
    ) -> Result<Acquire, Failure> {
        if let Some(permits) = self.permits
            && self.take > permits
        {
            let message = format!("--take {} is more than --permits {permits}", self.take);
            return Err(Failure::Usage(message));
        }
        let mode = match (self.shared, self.permits) {
            (true, _) => LockMode::Shared,
            (false, Some(of)) => LockMode::Permits { of, take: self.take },
            (false, None) => LockMode::Exclusive,
        };
        let request = locks.lock(name).mode(mode).wait(self.wait.unwrap_or_default());
        Ok(request.lock_delay(self.lock_delay.unwrap_or(lock_delay)))
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
    #[arg(long, value_parser = argument::token, allow_negative_numbers = true)]
    token: u64,
    /// The lease that holds it: so that this command, when it loses its connection and asks again
    /// by itself, is told that it was done. The same command typed again finds the lock not held
    #[arg(long, value_name = "ID", value_parser = argument::lease_id)]
    lease: Option<LeaseId>,
}

/// `quorate lock show`.
#[derive(Args, Debug)]
pub(crate) struct ShowArguments {
    /// The lock's name
    name: String,
    /// At most so many holders and so many waiters, up to 1000
    #[arg(long, value_name = "NUMBER", default_value_t = 100, allow_negative_numbers = true)]
    #[arg(value_parser = argument::page_limit)]
    limit: u32,
}

/// `quorate lock list`.
#[derive(Args, Debug)]
pub(crate) struct ListArguments {
    /// At most so many
    #[arg(long, value_name = "NUMBER", default_value_t = 100, allow_negative_numbers = true)]
    #[arg(value_parser = argument::list_limit)]
    limit: usize,
}

/// `quorate lock break`.
#[derive(Args, Debug)]
pub(crate) struct BreakArguments {
    /// The lock's name
    name: String,
    /// The fencing token of the holder that is to lose it
    #[arg(long, value_parser = argument::token, allow_negative_numbers = true)]
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
        LockCommand::Exec(arguments) => return exec::run(arguments, &client, common.timeout).await,
        LockCommand::Acquire(arguments) => {
            return acquire(&client, arguments, output, common.timeout).await;
        }
        LockCommand::Release(ReleaseArguments { name, token, lease }) => {
            let released = locks.release(&name, token, lease).await;
            let revision = released.map_err(|error| about(error, &name))?;
            let text = format!("released at revision {revision}");
            output.result(&text, &json!({ "revision": revision }))?;
        }
        LockCommand::Show(ShowArguments { name, limit }) => {
            let found = locks.get(&name, limit).await.map_err(|error| about(error, &name))?;
            show(output, &found.value, found.revision, Now(client.cluster_time()))?;
        }
        LockCommand::List(arguments) => list(&client, arguments, output).await?,
        LockCommand::Break(BreakArguments { name, token, skip_lock_delay }) => {
            let broken = locks.break_lock(&name, token, skip_lock_delay).await;
            let revision = broken.map_err(|error| about(error, &name))?;
            let text = format!("broken at revision {revision}");
            output.result(&text, &json!({ "revision": revision }))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn about(error: Error, name: &str) -> Failure {
    Failure::naming(error, &format!("lock {}", printable(name)))
}

/// Takes a lock; whatever ends that leaves nobody in line.
async fn acquire(
    client: &Client,
    arguments: AcquireArguments,
    output: Output,
    patience: Duration,
) -> Result<ExitCode, Failure> {
    let AcquireArguments { name, lease, mode } = arguments;
    let mut signals = Signals::new()?;
    let request = mode.request(&client.locks(), &name, Duration::ZERO)?;
    let acquired = tokio::select! {
        acquired = request.acquire_for(lease) => Ok(acquired),
        signal = signals.next() => Err(signal),
    };
    if let Ok(Ok(granted)) = acquired {
        let json = json!({ "token": granted.token, "grant_time": time_json(granted.granted) });
        output.result(&granted.token.to_string(), &json)?;
        return Ok(ExitCode::SUCCESS);
    }
    // The request is cancelled where it may have left anything behind.
    if signals.part(patience, client.settled()).await.is_none() {
        output::message(
            "quorate: could not cancel the request in time; its place in line, or the lock, goes \
             with its wait or its lease",
        );
    }
    match acquired {
        Ok(Err(error @ Error::LeaseLost { .. })) => {
            Err(Failure::naming(error, &format!("lease {lease}")))
        }
        Ok(Err(error)) => Err(about(error, &name)),
        Ok(Ok(_)) => Ok(ExitCode::SUCCESS),
        Err(signal) => Ok(ended_by(signal)),
    }
}

async fn list(client: &Client, arguments: ListArguments, output: Output) -> Result<(), Failure> {
    let page_size = u32::try_from(arguments.limit.min(PAGE_SIZE_MAX)).unwrap_or(u32::MAX);
    let mut found = Vec::new();
    let mut next = None;
    let more = loop {
        let page = client.locks().list(page_size, next).await?;
        found.extend(page.locks);
        next = page.next;
        if found.len() >= arguments.limit || next.is_none() {
            break next.is_some() || found.len() > arguments.limit;
        }
    };
    found.truncate(arguments.limit);
    let now = Now(client.cluster_time());
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
            first.map_or_else(|| "-".to_owned(), owner_text),
            now.age(first.and_then(|holder| holder.granted)),
        ]);
    }
    let objects: Vec<Value> = found.iter().map(listed_json).collect();
    output.list(&table, &objects)?;
    if more {
        output::message("quorate: there are more; raise --limit to see them");
    }
    Ok(())
}

fn show(output: Output, lock: &LockRecord, revision: u64, now: Now) -> Result<(), Failure> {
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
        text.push('\n');
        text.push_str(&holders_table(&lock.holders, now).render());
    }
    if !lock.waiters.is_empty() {
        let headings = ["WAITER", "OWNER", "MODE", "WAITED", "GIVES UP IN"];
        let mut waiters = Table::new(&headings, &[]);
        for waiter in &lock.waiters {
            waiters.row([
                waiter.lease.to_string(),
                printable_or_dash(&waiter.owner),
                mode_text(waiter.mode),
                now.age(waiter.since),
                length_or_dash(waiter.remaining),
            ]);
        }
        text.push('\n');
        text.push_str(&waiters.render());
    }
    output.result(text.trim_end(), &Value::Null)
}

fn holders_table(listed: &[LockHolder], now: Now) -> Table {
    let headings = ["HOLDER", "OWNER", "MODE", "TOKEN", "HELD FOR", "LEASE ENDS IN"];
    let mut holders = Table::new(&headings, &[3]);
    for holder in listed {
        let lease = holder.lease.map(|lease| lease.to_string());
        holders.row([
            lease.unwrap_or_else(|| "-".to_owned()),
            owner_text(holder),
            mode_text(holder.mode),
            holder.token.to_string(),
            now.age(holder.granted),
            match holder.lock_delay_remaining {
                Some(remaining) => format!("kept for {}", length(remaining)),
                None => length_or_dash(holder.lease_remaining),
            },
        ]);
    }
    holders
}

/// Whose it is; nobody's, where a holder was lost and its lock-delay is under way.
fn owner_text(holder: &LockHolder) -> String {
    match holder.lock_delay_remaining {
        Some(_) => "(lost)".to_owned(),
        None => printable_or_dash(&holder.owner),
    }
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

/// A lock on a list comes with the first of its holders and waiters only, and says so.
fn listed_json(lock: &LockRecord) -> Value {
    let first_holder = lock.holders.first().map(holder_json);
    let first_waiter = lock.waiters.first().map(waiter_json);
    lock_object(lock, ["first_holder", "first_waiter"], [json!(first_holder), json!(first_waiter)])
}

fn lock_json(lock: &LockRecord) -> Value {
    let holders: Vec<Value> = lock.holders.iter().map(holder_json).collect();
    let waiters: Vec<Value> = lock.waiters.iter().map(waiter_json).collect();
    lock_object(lock, ["holders", "waiters"], [json!(holders), json!(waiters)])
}

fn lock_object(lock: &LockRecord, names: [&str; 2], claims: [Value; 2]) -> Value {
    let ([holders, waiters], [holder_claims, waiter_claims]) = (names, claims);
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
        holders: holder_claims,
        "waiter_count": lock.waiter_count,
        waiters: waiter_claims,
        "lock_delay_remaining": length_json(lock.lock_delay_remaining),
    })
}

fn holder_json(holder: &LockHolder) -> Value {
    json!({
        "lease_id": holder.lease.map(|lease| lease.to_string()).unwrap_or_default(),
        // As text: it does not fit the numbers of JSON.
        "request_id": holder.request_id.to_string(),
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
        "request_id": waiter.request_id.to_string(),
        "owner": waiter.owner,
        "mode": mode_json(waiter.mode),
        "wait_start_time": time_json(waiter.since),
        "wait_remaining": length_json(waiter.remaining),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lock() -> LockRecord {
        let holder = LockHolder {
            lease: None,
            request_id: u64::MAX,
            owner: String::new(),
            mode: LockMode::Exclusive,
            token: 17,
            granted: None,
            lease_remaining: None,
            lock_delay_remaining: Some(Duration::from_secs(4)),
        };
        LockRecord {
            namespace: "default".into(),
            name: "job".into(),
            permits: None,
            permits_taken: 0,
            holder_count: 2,
            holders: vec![holder],
            waiter_count: 0,
            waiters: Vec::new(),
            lock_delay_remaining: Some(Duration::from_secs(4)),
        }
    }

    #[test]
    fn what_is_listed_in_part_has_a_name_of_its_own() {
        let (shown, listed) = (lock_json(&lock()), listed_json(&lock()));
        assert_eq!(shown["holders"][0], listed["first_holder"]);
        assert_eq!(shown["waiters"], json!([]));
        assert_eq!(listed["first_waiter"], Value::Null);
        assert!(listed.get("holders").is_none() && listed.get("waiters").is_none());
        assert_eq!(listed["holder_count"], 2);
        assert_eq!(shown["holders"][0]["request_id"], "18446744073709551615");
        assert_eq!(shown["holders"][0]["token"], 17);
    }

    #[test]
    fn a_holder_that_was_lost_is_recognised() {
        let text = holders_table(&lock().holders, Now(None)).render();
        assert!(text.contains("(lost)") && text.contains("kept for 4s"), "{text}");
    }

    #[test]
    fn no_more_permits_are_taken_than_there_are() {
        let locks = Client::builder().build().unwrap().locks();
        let mode = ModeArguments {
            shared: false,
            permits: Some(3),
            take: 4,
            wait: None,
            lock_delay: None,
        };
        let failure = mode.request(&locks, "job", Duration::ZERO).unwrap_err();
        assert_eq!(failure.code(), 2);
        assert!(failure.to_string().contains("--take"), "{failure}");
    }
}
