//! `quorate bench --work renew`: many leases, kept alive by one client.

use std::time::Duration;

use serde_json::json;
use tokio::time::Instant;

use super::Common;
use super::bench::micros_text;
use super::contender;
use super::failure::Failure;
use super::output::{self, Table, count, length};
use crate::client::{Client, Renewals};

/// How often there is a look at what has happened, and a line of the timeline.
const INTERVAL: Duration = Duration::from_secs(1);
/// How long messages that are under way at the end are waited for, and how often it is looked.
const DRAIN: Duration = Duration::from_secs(2);
const DRAIN_CHECK: Duration = Duration::from_millis(20);

/// Grants `leases`, lets the client keep them alive for `duration`, and says how many renewals that
/// took, how long the slowest message took, and how many leases were lost.
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
    let renewed = last.renewed - before.renewed;
    let last = drained(client).await;
    let lost = held.iter().filter(|lease| lease.is_lost()).count() as u64;
    let done = Renewals {
        leases,
        messages: last.messages - before.messages,
        renewed,
        failed: last.failed - before.failed,
        lost,
        ..last
    };
    contender::revoke(held).await;
    report(done, ttl, granting, elapsed, common)
}

/// What has come of the renewals once those that are under way now have ended, if they do.
async fn drained(client: &Client) -> Renewals {
    let start = Instant::now();
    loop {
        let now = client.leases().renewals();
        // Those of which the oldest is younger than this wait were sent during it.
        let ended = now.under_way == 0 || now.oldest < start.elapsed();
        if ended || start.elapsed() >= DRAIN {
            return if ended { Renewals { under_way: 0, ..now } } else { now };
        }
        tokio::time::sleep(DRAIN_CHECK).await;
    }
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
    table.row(["slowest message".to_owned(), micros_text(done.slowest)]);
    let unfinished = match done.under_way {
        0 => "none".to_owned(),
        number => format!("{number} messages, the oldest for {}", length(done.oldest)),
    };
    table.row(["unfinished".to_owned(), unfinished.clone()]);
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
        "slowest_message": output::length_json(Some(done.slowest)),
        "unfinished": done.under_way,
        "lost": done.lost,
    });
    common.output().result(table.render().trim_end(), &json)?;
    if done.lost > 0 {
        return Err(Failure::Failed(format!("{} leases were lost", count(done.lost))));
    }
    if done.failed > 0 || done.under_way > 0 {
        return Err(Failure::Unavailable(format!(
            "{} messages that renew leases failed; unfinished: {unfinished}",
            count(done.failed)
        )));
    }
    Ok(())
}
