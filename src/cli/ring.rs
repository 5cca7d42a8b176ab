//! `quorate ring`: every call on rings, from the shell.

use std::time::Duration;

use clap::{Args, Subcommand};
use serde_json::{Map, Value, json};

use super::Common;
use super::argument::{self, Stdin};
use super::exec;
use super::failure::Failure;
use super::output::{
    self, Format, Now, Output, Table, length_json, printable, printable_or_dash, time_json,
};
use super::signals::Signals;
use crate::client::{
    Client, Error, Joined, Lease, LeaseId, LeaseOptions, Located, NewRingMember, RingMember,
    RingReadOptions, RingShares, Rings,
};
use crate::limits::LEASE_TTL_MIN;

/// The calls.
#[derive(Debug, Subcommand)]
pub(crate) enum RingCommand {
    /// Make somebody a member of a ring, or change what the member says of itself
    #[command(after_help = "Examples:\n  \
        quorate ring join billing billing-7 --lease \"$lease\" --address 10.0.0.7:80 --weight 2\n  \
        quorate ring join billing billing-7 --ttl 15s zone=east    # until interrupted\n\n\
        The member is on the ring for as long as its lease lives. With --ttl the lease is this \
        command's own: it keeps it alive, and gives it up when it is interrupted (SIGINT, SIGTERM, \
        SIGHUP or SIGQUIT; it ends with 0 then). It ends with 4 when the lease is lost or somebody \
        has removed the member. Tags take values as attributes of sessions do: NAME=@FILE from a \
        file, NAME=- from standard input, NAME=@@TEXT is the text @TEXT; --literal takes all as \
        they stand.")]
    Join(JoinArguments),
    /// Remove a member from a ring; its lease lives on
    Leave(LeaveArguments),
    /// Print which members serve keys
    #[command(after_help = "Example:\n  quorate ring locate billing alice bob --count 2")]
    Locate(LocateArguments),
    /// Print the members of a ring, each with its share of the keys
    Show(ShowArguments),
}

/// `quorate ring join`.
#[derive(Args, Debug)]
#[command(group = clap::ArgGroup::new("hanging").required(true).args(["lease", "ttl"]))]
pub(crate) struct JoinArguments {
    /// The ring's name
    ring: String,
    /// The member's name; one that stays the same over restarts keeps its keys
    member: String,
    /// The lease that it is to hang from
    #[arg(long, value_name = "ID", value_parser = argument::lease_id)]
    lease: Option<LeaseId>,
    /// Grant a lease of this time to live, 1s to 24h, and keep it alive until interrupted
    #[arg(long, value_name = "TIME", value_parser = argument::ttl)]
    ttl: Option<Duration>,
    /// Where the member is reached
    #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    address: String,
    /// Its share of the keys relative to the other members' weights: 1 to 1000
    #[arg(long, value_name = "NUMBER", default_value_t = 1, allow_negative_numbers = true)]
    #[arg(value_parser = argument::weight)]
    weight: u32,
    /// Take every tag's value as it stands: no files, no standard input
    #[arg(long)]
    literal: bool,
    /// Whatever the ring's users want to know of it
    #[arg(value_name = "NAME=VALUE", value_parser = tag)]
    tags: Vec<String>,
}

/// `quorate ring leave`.
#[derive(Args, Debug)]
pub(crate) struct LeaveArguments {
    /// The ring's name
    ring: String,
    /// The member's name
    member: String,
    /// Only if it hangs from this lease
    #[arg(long, value_name = "ID", value_parser = argument::lease_id)]
    lease: Option<LeaseId>,
}

/// `quorate ring locate`.
#[derive(Args, Debug)]
pub(crate) struct LocateArguments {
    /// The ring's name
    ring: String,
    /// The keys
    #[arg(value_name = "KEY", required = true)]
    keys: Vec<String>,
    /// Print so many members for each: the one that serves it, and who would take over
    #[arg(long, value_name = "NUMBER", default_value_t = 1, allow_negative_numbers = true)]
    #[arg(value_parser = argument::member_count)]
    count: u32,
    /// Answer from what the asked node has, though it may be stale
    #[arg(long)]
    local: bool,
    /// With --local, only if what it has is no older than this
    #[arg(long, value_name = "TIME", requires = "local")]
    #[arg(value_parser = argument::positive_duration)]
    max_staleness: Option<Duration>,
}

/// `quorate ring show`.
#[derive(Args, Debug)]
pub(crate) struct ShowArguments {
    /// The ring's name
    ring: String,
    /// Answer from what the asked node has, though it may be stale
    #[arg(long)]
    local: bool,
    /// With --local, only if what it has is no older than this
    #[arg(long, value_name = "TIME", requires = "local")]
    #[arg(value_parser = argument::positive_duration)]
    max_staleness: Option<Duration>,
}

fn tag(text: &str) -> Result<String, String> {
    let tag = text.split_once('=').filter(|(name, _)| !name.is_empty());
    tag.map(|_| text.to_owned()).ok_or_else(|| "a tag is written name=value".to_owned())
}

/// Does what the command says.
pub(crate) async fn run(command: RingCommand, common: &Common) -> Result<(), Failure> {
    let output = common.output();
    let client = common.client().build()?;
    let rings = client.rings();
    match command {
        RingCommand::Join(arguments) => join(&client, arguments, output, common.timeout).await,
        RingCommand::Leave(LeaveArguments { ring, member, lease }) => {
            let what = named_member(&member, &ring);
            let left = rings.leave(&ring, &member, lease).await;
            let revision = left.map_err(|error| Failure::naming(error, &what))?;
            output.result(&format!("left at revision {revision}"), &json!({ "revision": revision }))
        }
        RingCommand::Locate(arguments) => locate(&rings, arguments, output).await,
        RingCommand::Show(ShowArguments { ring, local, max_staleness }) => {
            let shares = rings.shares(&ring, read_options(local, max_staleness)).await;
            let shares = shares.map_err(|error| Failure::naming(error, &named_ring(&ring)))?;
            show(output, &shares, Now(client.cluster_time()))
        }
    }
}

fn named_ring(ring: &str) -> String {
    format!("ring {}", printable(ring))
}

fn named_member(member: &str, ring: &str) -> String {
    format!("member {} of ring {}", printable(member), printable(ring))
}

fn read_options(local: bool, max_staleness: Option<Duration>) -> RingReadOptions {
    let options = RingReadOptions::new();
    let options = if local { options.local(0) } else { options };
    match max_staleness {
        Some(age) => options.max_staleness(age),
        None => options,
    }
}

async fn join(
    client: &Client,
    arguments: JoinArguments,
    output: Output,
    patience: Duration,
) -> Result<(), Failure> {
    let JoinArguments { ring, member: name, lease, ttl, address, weight, literal, tags } =
        arguments;
    let what = named_member(&name, &ring);
    let mut member = NewRingMember::new(name).address(address).weight(weight);
    for (name, value) in argument::tags(&tags, literal, &mut Stdin::default())? {
        member = member.tag(name, value);
    }
    let Some(ttl) = ttl else {
        let message = "name a lease with --lease, or a time to live with --ttl".to_owned();
        let lease = lease.ok_or(Failure::Usage(message))?;
        let joined = client.rings().join(&ring, lease, member).await;
        return report(output, lease, &joined.map_err(|error| not_joined(error, lease, &what))?);
    };
    let mut signals = Signals::new()?;
    let options = LeaseOptions::new().ttl(ttl).owner(exec::owner());
    let leases = client.leases();
    let lease = tokio::select! {
        granted = leases.grant(options) => granted?,
        _ = signals.next() => return Ok(()),
    };
    let outcome = tokio::select! {
        outcome = stay(client, &ring, &what, &lease, member, output) => outcome,
        _ = signals.next() => Ok(()),
    };
    // With it the member goes.
    exec::give_up(lease, client, &mut signals, patience).await;
    outcome
}

fn not_joined(error: Error, lease: LeaseId, what: &str) -> Failure {
    match error.reason() {
        "LEASE_NOT_FOUND" => Failure::naming(error, &format!("lease {lease}")),
        _ => Failure::naming(error, what),
    }
}

/// Joins, and waits until the member is off the ring.
async fn stay(
    client: &Client,
    ring: &str,
    what: &str,
    lease: &Lease,
    member: NewRingMember,
    output: Output,
) -> Result<(), Failure> {
    let joined = client.rings().join(ring, lease.id(), member).await;
    let joined = joined.map_err(|error| not_joined(error, lease.id(), what))?;
    report(output, lease.id(), &joined)?;
    let reason = tokio::select! {
        loss = lease.lost() => format!("its lease {}", loss.describe()),
        () = removed(client, lease.id(), joined.timing.renew_after) => {
            "somebody has removed it".to_owned()
        }
    };
    Err(Failure::Lost(format!("{what} is off the ring: {reason}; join again")))
}

/// Returns when nothing hangs from the lease any more; looked at about when it is renewed. All that
/// has ever hung from it is the member.
async fn removed(client: &Client, lease: LeaseId, interval: Duration) {
    loop {
        tokio::time::sleep(interval.max(LEASE_TTL_MIN / 3)).await;
        // Where there is no answer, or no lease, the lease itself says what has become of it.
        if let Ok(found) = client.leases().get(lease).await
            && found.value.ring_members == 0
        {
            return;
        }
    }
}

fn report(output: Output, lease: LeaseId, joined: &Joined) -> Result<(), Failure> {
    let text = format!("joined, ring revision {}, lease {lease}", joined.revision);
    let json = json!({
        "revision": joined.revision,
        "lease_id": lease.to_string(),
        "timing": {
            "remaining": length_json(Some(joined.timing.remaining)),
            "renew_after": length_json(Some(joined.timing.renew_after)),
        },
    });
    output.result(&text, &json)
}

async fn locate(rings: &Rings, arguments: LocateArguments, output: Output) -> Result<(), Failure> {
    let LocateArguments { ring, keys, count, local, max_staleness } = arguments;
    let bytes = keys.iter().map(|key| key.clone().into_bytes());
    let options = read_options(local, max_staleness);
    let located = rings.locate(&ring, bytes, count, options).await;
    let located = located.map_err(|error| Failure::naming(error, &named_ring(&ring)))?;
    if output.format == Format::Json {
        return output.result("", &located_json(&keys, &located));
    }
    output.list(&located_table(&keys, &located), &[])
}

/// A row for each member of each key; the first serves it.
fn located_table(keys: &[String], located: &Located) -> Table {
    let mut table = Table::new(&["KEY", "MEMBER", "ADDRESS"], &[]);
    for (key, members) in keys.iter().zip(&located.placements) {
        for (place, name) in members.iter().enumerate() {
            let key = if place == 0 { printable(key) } else { String::new() };
            let address = located.member(name).map_or("", |member| member.address.as_str());
            table.row([key, printable(name), printable_or_dash(address)]);
        }
    }
    table
}

fn located_json(keys: &[String], located: &Located) -> Value {
    let placement =
        |(key, members): (&String, &Vec<String>)| json!({ "key": key, "members": members });
    json!({
        "revision": located.revision,
        "ring_revision": located.ring_revision,
        "algorithm_version": located.algorithm_version,
        "placements": keys.iter().zip(&located.placements).map(placement).collect::<Vec<_>>(),
        "members": located.members.iter().map(member_json).collect::<Vec<_>>(),
    })
}

fn show(output: Output, ring: &RingShares, now: Now) -> Result<(), Failure> {
    if output.format == Format::Json {
        let shares = ring
            .members
            .iter()
            .map(|(member, fraction)| json!({ "member": member.name, "fraction": fraction }));
        let json = json!({
            "revision": ring.revision,
            "ring_revision": ring.ring_revision,
            "algorithm_version": ring.algorithm_version,
            "members": ring.members.iter().map(|(it, _)| member_json(it)).collect::<Vec<_>>(),
            "shares": shares.collect::<Vec<_>>(),
        });
        return output.result("", &json);
    }
    output.list(&members_table(ring, now), &[])?;
    let count = ring.members.len();
    let members = if count == 1 { "member" } else { "members" };
    output::message(&format!(
        "{count} {members}, ring revision {}, algorithm {}",
        ring.ring_revision, ring.algorithm_version
    ));
    Ok(())
}

fn members_table(ring: &RingShares, now: Now) -> Table {
    let headings = ["MEMBER", "WEIGHT", "SHARE", "ADDRESS", "AGE", "LEASE", "TAGS"];
    let mut table = Table::new(&headings, &[1, 2]);
    for (member, fraction) in &ring.members {
        let tags = member.tags.iter().map(|(name, value)| format!("{name}={value}"));
        table.row([
            printable(&member.name),
            member.weight.to_string(),
            format!("{:.2}%", fraction * 100.0),
            printable_or_dash(&member.address),
            now.age(member.joined),
            member.lease.to_string(),
            printable_or_dash(&tags.collect::<Vec<_>>().join(" ")),
        ]);
    }
    table
}

fn member_json(member: &RingMember) -> Value {
    let mut object = Map::new();
    let mut put = |name: &str, value: Value| object.insert(name.to_owned(), value);
    put("name", member.name.as_str().into());
    put("address", member.address.as_str().into());
    put("tags", json!(member.tags));
    put("weight", member.weight.into());
    put("lease_id", member.lease.to_string().into());
    put("join_time", time_json(member.joined));
    Value::Object(object)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEASE: &str = "0123456789abcdef0123456789abcdef";

    fn member(name: &str, address: &str) -> RingMember {
        RingMember {
            name: name.to_owned(),
            address: address.to_owned(),
            weight: 2,
            tags: [("zone".to_owned(), "east".to_owned())].into(),
            lease: LeaseId::new(LEASE).unwrap(),
            joined: None,
        }
    }

    #[test]
    fn tags_have_names() {
        assert_eq!(tag("a=b=c"), Ok("a=b=c".to_owned()));
        assert_eq!(tag("a="), Ok("a=".to_owned()));
        assert!(tag("a").is_err() && tag("=b").is_err());
    }

    #[test]
    fn tables_say_who_serves_and_how_much() {
        let located = Located {
            revision: 9,
            ring_revision: 7,
            algorithm_version: 1,
            placements: vec![vec!["one".into(), "two".into()], vec!["two".into()]],
            members: vec![member("one", "10.0.0.1:80"), member("two", "")],
        };
        let keys = ["alice".to_owned(), "bob\n".to_owned()];
        let lines = [
            "KEY    MEMBER  ADDRESS",
            "alice  one     10.0.0.1:80",
            "       two     -",
            "bob\\n  two     -",
            "",
        ];
        assert_eq!(located_table(&keys, &located).render(), lines.join("\n"));
        let json = located_json(&keys, &located);
        assert_eq!(json["placements"][0], json!({ "key": "alice", "members": ["one", "two"] }));
        let expected = json!({
            "name": "one",
            "address": "10.0.0.1:80",
            "tags": { "zone": "east" },
            "weight": 2,
            "lease_id": LEASE,
            "join_time": null,
        });
        assert_eq!(json["members"][0], expected);

        let members = vec![(member("one", "10.0.0.1:80"), 0.25), (member("two", ""), 0.75)];
        let shares = RingShares { revision: 9, ring_revision: 7, algorithm_version: 1, members };
        let lines = [
            "MEMBER  WEIGHT   SHARE  ADDRESS      AGE  LEASE                             TAGS",
            "one          2  25.00%  10.0.0.1:80  -    0123456789abcdef0123456789abcdef  zone=east",
            "two          2  75.00%  -            -    0123456789abcdef0123456789abcdef  zone=east",
            "",
        ];
        assert_eq!(members_table(&shares, Now(None)).render(), lines.join("\n"));
    }
}
