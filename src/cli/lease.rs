//! `quorate lease`: every call on leases, from the shell.

use std::time::Duration;

use clap::{Args, Subcommand};
use serde_json::{Value, json};
use tokio::time::Instant;

use super::Common;
use super::argument;
use super::failure::Failure;
use super::output::{
    self, Format, Now, Output, Table, length_json, length_or_dash, printable_or_dash, time_json,
};
use super::signals::Signals;
use crate::client::{Client, Error, LeaseId, LeaseOptions, LeaseRecord, Leases, Renewal};
use crate::limits::PAGE_SIZE_MAX;

/// Pause before a renewal that failed is tried again.
const RETRY_PAUSE: Duration = Duration::from_millis(500);

/// The calls.
#[derive(Debug, Subcommand)]
pub(crate) enum LeaseCommand {
    /// Grant a lease and print its id
    #[command(after_help = "Example:\n  \
        lease=$(quorate lease grant --ttl 60s --owner \"$HOSTNAME\")\n\n\
        It ends when its time to live has passed, unless `quorate lease keep-alive` renews it.")]
    Grant(GrantArguments),
    /// Renew leases, again and again until interrupted
    #[command(after_help = "It ends with 0 when it is interrupted, and with 3 when none of the \
        leases is left. With --once it ends with 3 when any of them is lost.")]
    KeepAlive(KeepAliveArguments),
    /// End a lease, and with it all that hangs from it
    Revoke(IdArgument),
    /// Print a lease
    Show(IdArgument),
    /// List the leases of the namespace
    List(ListArguments),
}

/// `quorate lease grant`.
#[derive(Args, Debug)]
pub(crate) struct GrantArguments {
    /// How long it lives without being renewed: 1s to 24h; below 3s an election of the cluster can
    /// cost it
    #[arg(long, value_name = "TIME", default_value = "15s", value_parser = argument::ttl)]
    ttl: Duration,
    /// A label for people: who it belongs to
    #[arg(long, value_name = "LABEL", default_value = "", hide_default_value = true)]
    owner: String,
}

/// `quorate lease keep-alive`.
#[derive(Args, Debug)]
pub(crate) struct KeepAliveArguments {
    /// The leases' ids
    #[arg(value_name = "ID", required = true, value_parser = argument::lease_id)]
    ids: Vec<LeaseId>,
    /// Renew them once
    #[arg(long)]
    once: bool,
}

/// A lease that is named by its id.
#[derive(Args, Debug)]
pub(crate) struct IdArgument {
    /// The lease's id
    #[arg(value_name = "ID", value_parser = argument::lease_id)]
    id: LeaseId,
}

/// `quorate lease list`.
#[derive(Args, Debug)]
pub(crate) struct ListArguments {
    /// At most so many
    #[arg(long, value_name = "NUMBER", default_value_t = 100, allow_negative_numbers = true)]
    #[arg(value_parser = argument::list_limit)]
    limit: usize,
}

/// Does what the command says.
pub(crate) async fn run(command: LeaseCommand, common: &Common) -> Result<(), Failure> {
    let output = common.output();
    let client = common.client().build()?;
    let leases = client.leases();
    match command {
        LeaseCommand::Grant(arguments) => {
            let options = LeaseOptions::new().ttl(arguments.ttl).owner(arguments.owner);
            let (id, timing) = leases.grant_only(options).await?;
            let json = json!({
                "lease_id": id.to_string(),
                "remaining": length_json(Some(timing.remaining)),
                "renew_after": length_json(Some(timing.renew_after)),
            });
            output.result(&id.to_string(), &json)
        }
        LeaseCommand::KeepAlive(arguments) => {
            let mut signals = Signals::new()?;
            tokio::select! {
                ended = keep_alive(&leases, arguments, output) => ended,
                _ = signals.next() => Ok(()),
            }
        }
        LeaseCommand::Revoke(IdArgument { id }) => {
            let revision = leases.revoke(id).await.map_err(|error| about(error, id))?;
            output
                .result(&format!("revoked at revision {revision}"), &json!({"revision": revision}))
        }
        LeaseCommand::Show(IdArgument { id }) => {
            let found = leases.get(id).await.map_err(|error| about(error, id))?;
            show(output, &found.value, found.revision, Now(client.cluster_time()))
        }
        LeaseCommand::List(arguments) => list(&client, arguments, output).await,
    }
}

fn about(error: Error, id: LeaseId) -> Failure {
    Failure::naming(error, &format!("lease {id}"))
}

/// Renews until all leases are lost, which is a failure; once, where that is asked for, and then
/// any that is lost is one.
async fn keep_alive(
    leases: &Leases,
    arguments: KeepAliveArguments,
    output: Output,
) -> Result<(), Failure> {
    let KeepAliveArguments { mut ids, once } = arguments;
    ids.sort_unstable();
    ids.dedup();
    let count = ids.len();
    loop {
        let start = Instant::now();
        let pause = match leases.keep_alive(&ids).await {
            Ok(renewals) => {
                report(&renewals, output)?;
                ids = renewals.iter().filter(|r| r.timing.is_some()).map(|r| r.id).collect();
                let timings = renewals.iter().filter_map(|renewal| renewal.timing);
                timings.map(|timing| timing.renew_after).min()
            }
            // They may have ended before somebody answers; then that is said.
            Err(error) if !once && Failure::from(error.clone()).code() == 75 => {
                output::message(&format!("quorate: {}", Failure::from(error)));
                Some(RETRY_PAUSE)
            }
            Err(error) => return Err(error.into()),
        };
        let Some(pause) = pause else {
            let message = "none of the leases is left; grant a new one".to_owned();
            return Err(Failure::NotFound(message));
        };
        if once && ids.len() < count {
            let message = format!("{} of {count} lost; grant new ones", count - ids.len());
            return Err(Failure::NotFound(message));
        }
        if once {
            return Ok(());
        }
        tokio::time::sleep_until(start + pause).await;
    }
}

fn report(renewals: &[Renewal], output: Output) -> Result<(), Failure> {
    for Renewal { id, timing } in renewals {
        let text = match timing {
            Some(timing) => format!("{id} renewed, ends in {}", output::length(timing.remaining)),
            None => format!("{id} lost"),
        };
        let outcome = match timing {
            Some(timing) => json!({
                "lease_id": id.to_string(),
                "renewed": {
                    "remaining": length_json(Some(timing.remaining)),
                    "renew_after": length_json(Some(timing.renew_after)),
                },
            }),
            None => json!({ "lease_id": id.to_string(), "lost": {} }),
        };
        output.result(&text, &outcome)?;
    }
    Ok(())
}

async fn list(client: &Client, arguments: ListArguments, output: Output) -> Result<(), Failure> {
    let page_size = u32::try_from(arguments.limit.min(PAGE_SIZE_MAX)).unwrap_or(u32::MAX);
    let mut found = Vec::new();
    let mut next = None;
    let more = loop {
        let page = client.leases().list(page_size, next).await?;
        found.extend(page.leases);
        next = page.next;
        if found.len() >= arguments.limit || next.is_none() {
            break next.is_some() || found.len() > arguments.limit;
        }
    };
    found.truncate(arguments.limit);
    let now = Now(client.cluster_time());
    let headings = ["ID", "OWNER", "TTL", "AGE", "ENDS IN", "LOCKS", "WAITS", "MEMBERS"];
    let mut table = Table::new(&headings, &[5, 6, 7]);
    for lease in &found {
        table.row([
            lease.id.to_string(),
            printable_or_dash(&lease.owner),
            length_or_dash(lease.ttl),
            now.age(lease.granted),
            length_or_dash(lease.remaining),
            lease.held_locks.to_string(),
            lease.waits.to_string(),
            lease.ring_members.to_string(),
        ]);
    }
    let objects: Vec<Value> = found.iter().map(lease_json).collect();
    output.list(&table, &objects)?;
    if more {
        output::message("quorate: there are more; raise --limit to see them");
    }
    Ok(())
}

fn show(output: Output, lease: &LeaseRecord, revision: u64, now: Now) -> Result<(), Failure> {
    if output.format == Format::Json {
        let json = json!({ "revision": revision, "lease": lease_json(lease) });
        return output.result("", &json);
    }
    let mut table = Table::plain();
    table.row(["id", &lease.id.to_string()]);
    table.row(["namespace", &output::printable(&lease.namespace)]);
    table.row(["owner", &printable_or_dash(&lease.owner)]);
    table.row(["ttl", &length_or_dash(lease.ttl)]);
    table.row(["age", &now.age(lease.granted)]);
    table.row(["ends in", &length_or_dash(lease.remaining)]);
    table.row(["held locks", &lease.held_locks.to_string()]);
    table.row(["waits", &lease.waits.to_string()]);
    table.row(["ring members", &lease.ring_members.to_string()]);
    output.result(table.render().trim_end(), &Value::Null)
}

fn lease_json(lease: &LeaseRecord) -> Value {
    json!({
        "namespace": lease.namespace,
        "id": lease.id.to_string(),
        "owner": lease.owner,
        "ttl": length_json(lease.ttl),
        "grant_time": time_json(lease.granted),
        "remaining": length_json(lease.remaining),
        "held_locks": lease.held_locks,
        "waits": lease.waits,
        "ring_members": lease.ring_members,
    })
}
