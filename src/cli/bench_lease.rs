//! `quorate bench --work renew`: many leases, kept alive by one client.

use std::time::Duration;

use serde_json::json;
use tokio::time::Instant;

use super::Common;
use super::contender;
use super::failure::Failure;
use super::output::{self, Table, count, length};
use crate::client::{Client, Renewals};

/// How often there is a look at what has happened, and a line of the timeline.
const INTERVAL: Duration = Duration::from_secs(1);

/// Grants `leases`, lets the client keep them alive for `duration`, and says how many renewals that
/// took and how many leases were lost.
pub(crate) async fn run(
    client: &Client,
    leases: usize,
    ttl: Duration,
    duration: Duration,
    timeline: bool,
    common: &Common,
) -> Result<(), Failure> {
    let start = Instant::now();
    let held = contender::grant(client, leases, ttl).await?;
    let granting = start.elapsed();
    let before = client.leases().renewals();
    let start = Instant::now();
    let end = start + duration;
    let mut last = before;
    while Instant::now() < end {
        tokio::time::sleep_until(end.min(Instant::now() + INTERVAL)).await;
        let now = client.leases().renewals();
        if timeline {
            output::message(&format!(
                "{:>6.1} s {:>12} renewed {:>8} lost {:>8} messages failed",
                start.elapsed().as_secs_f64(),
                count(now.renewed - last.renewed),
                count(now.lost - last.lost),
                count(now.failed - last.failed),
            ));
        }
        last = now;
    }
    let elapsed = start.elapsed();
    let lost = held.iter().filter(|lease| lease.is_lost()).count() as u64;
    let done = Renewals {
        leases,
        messages: last.messages - before.messages,
        renewed: last.renewed - before.renewed,
        failed: last.failed - before.failed,
        lost,
    };
    contender::revoke(held).await;
    report(done, ttl, granting, elapsed, common)
}

fn report(
    done: Renewals,
    ttl: Duration,
    granting: Duration,
    elapsed: Duration,
    common: &Common,
) -> Result<(), Failure> {
    let rate = done.renewed as f64 / elapsed.as_secs_f64().max(f64::EPSILON);
    let mut table = Table::plain();
    let leases = count(done.leases as u64);
    table.row(["work".to_owned(), format!("renew {leases} leases with a ttl of {}", length(ttl))]);
    table.row(["granted in".to_owned(), length(granting)]);
    let renewed = count(done.renewed);
    table.row([
        "rate".to_owned(),
        format!("{} renewals/s ({renewed} in {})", count(rate as u64), length(elapsed)),
    ]);
    let failed = count(done.failed);
    table.row([
        "messages".to_owned(),
        format!("{}, of which {failed} failed and were sent again", count(done.messages)),
    ]);
    table.row(["lost".to_owned(), count(done.lost)]);
    let json = json!({
        "work": "renew",
        "leases": done.leases,
        "ttl": output::length_json(Some(ttl)),
        "duration": output::length_json(Some(elapsed)),
        "renewals": done.renewed,
        "renewals_per_second": (rate * 10.0).round() / 10.0,
        "messages": done.messages,
        "messages_failed": done.failed,
        "lost": done.lost,
    });
    common.output().result(table.render().trim_end(), &json)?;
    match done.lost {
        0 => Ok(()),
        lost => Err(Failure::Failed(format!("{} leases were lost", count(lost)))),
    }
}
