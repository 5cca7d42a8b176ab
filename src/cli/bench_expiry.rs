//! `quorate bench --work expire`: what writers notice when many leases end at the same time.
//!
//! Callers update sessions all the time. Their latencies are taken three times: while nothing else
//! goes on, while the leases are granted and live, and from the deadline of the first until a
//! second after that of the last one, which is when a cluster that keeps up has removed them all.
//! Caveat: the leases' tombstones end a minute later, in the same bounded steps, and are not waited
//! for.

use std::time::Duration;

use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use serde_json::{Value, json};
use tokio::time::Instant;

use super::Common;
use super::bench::{Quantiles, micros_text};
use super::failure::Failure;
use super::ledger::Tally;
use super::load::Load;
use super::output::{self, Table, count, length};
use crate::client::{Client, Error, LeaseId, LeaseOptions};
use crate::limits::LEASE_RENEWALS_MAX;

/// Leases that are granted at once.
const GRANTS_MAX: usize = 256;
/// Messages that renew leases, at once.
const MESSAGES_MAX: usize = 8;
/// What belongs to the last expiry still.
const AFTERMATH: Duration = Duration::from_secs(1);

/// Measures `load` for `quiet` without, and then with, so many leases that end.
pub(crate) async fn run(
    client: &Client,
    load: Load,
    leases: usize,
    ttl: Duration,
    quiet: Duration,
    common: &Common,
) -> Result<(), Failure> {
    load.measure();
    tokio::time::sleep(quiet).await;
    let quiet = load.take();
    let ids = grant(client, leases, ttl).await?;
    let (first, last) = renew(client, &ids).await?;
    tokio::time::sleep_until(first + ttl).await;
    let granting = load.take();
    tokio::time::sleep_until(last + ttl + AFTERMATH).await;
    let expiring = load.finish().await;
    report(ids.len(), last - first, &[quiet, granting, expiring], common)
}

async fn grant(client: &Client, number: usize, ttl: Duration) -> Result<Vec<LeaseId>, Failure> {
    let leases = client.leases();
    let options = || LeaseOptions::new().owner("quorate-bench").ttl(ttl);
    let granting = stream::iter(0..number)
        .map(|_| leases.grant_only(options()))
        .buffer_unordered(GRANTS_MAX)
        .map_ok(|(id, _)| id);
    Ok(granting.try_collect().await?)
}

/// Renews all, for the last time: when that began and when it was done.
async fn renew(client: &Client, ids: &[LeaseId]) -> Result<(Instant, Instant), Failure> {
    let leases = client.leases();
    let first = Instant::now();
    let renewals: Vec<_> = stream::iter(ids.chunks(LEASE_RENEWALS_MAX))
        .map(|chunk| leases.keep_alive(chunk))
        .buffer_unordered(MESSAGES_MAX)
        .try_collect()
        .await
        .map_err(|error: Error| Failure::from(error))?;
    let lost = renewals.iter().flatten().filter(|renewal| renewal.timing.is_none()).count();
    if lost > 0 {
        let message = format!("{lost} leases ended before all were granted; give a longer --ttl");
        return Err(Failure::Failed(message));
    }
    Ok((first, Instant::now()))
}

fn report(
    leases: usize,
    spread: Duration,
    stretches: &[Tally; 3],
    common: &Common,
) -> Result<(), Failure> {
    let headings =
        ["", "FOR", "RATE", "P50", "P99", "MAX", "LONGEST STALL", "ERRORS", "UNFINISHED"];
    let mut table = Table::new(&headings, &[2, 3, 4, 5, 6, 7]);
    let mut json = json!({
        "work": "expire",
        "leases": leases,
        "spread": output::length_json(Some(spread)),
    });
    for (name, tally) in ["quiet", "granting", "expiring"].into_iter().zip(stretches) {
        let quantiles = Quantiles::of(&tally.latencies);
        let micros = |micros: u64| format!("{} µs", count(micros));
        table.row([
            name.to_owned(),
            length(tally.length),
            format!("{}/s", count(tally.rate() as u64)),
            micros(quantiles.p50),
            micros(quantiles.p99),
            micros(quantiles.max),
            micros_text(tally.stall),
            count(tally.failed()),
            tally.unfinished_text(),
        ]);
        json[name] = json!({
            "duration": output::length_json(Some(tally.length)),
            "operations": tally.operations,
            "operations_per_second": (tally.rate() * 10.0).round() / 10.0,
            "latency_us": quantiles.json(),
            "longest_stall": output::length_json(Some(tally.stall)),
            "errors": tally.failed(),
            "unfinished": tally.unfinished,
            "oldest_unfinished": output::length_json(Some(tally.oldest)),
        });
    }
    let [quiet, _, expiring] = stretches;
    let p99 = |tally: &Tally| Quantiles::of(&tally.latencies).p99.max(1) as f64;
    let ratio = p99(expiring) / p99(quiet);
    json["p99_ratio"] = Value::from((ratio * 100.0).round() / 100.0);
    let text = format!(
        "{} leases, last renewed within {}\n{}\n\
         p99 while they expire is {ratio:.2} times the quiet one",
        count(leases as u64),
        length(spread),
        table.render().trim_end(),
    );
    common.output().result(&text, &json)?;
    stretches.iter().try_for_each(Tally::verdict)
}
