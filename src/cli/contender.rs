//! The callers of `quorate bench` that take locks, and their leases.

use std::time::Duration;

use tokio::task::JoinSet;

use super::bench::Work;
use super::failure::Failure;
use crate::client::{Client, Error, Lease, LeaseOptions, Locks};

/// Leases that are granted or revoked at once.
const CALLS_MAX: usize = 256;
/// How long none of them may be revoked before the others are left to end by themselves: a cluster
/// that does not answer has been found out by then.
const REVOKE_QUIET: Duration = Duration::from_secs(2);
/// Longer than any pause of the cluster that a measurement survives.
const TTL: Duration = Duration::from_secs(60);
/// How long a contended lock is waited for.
const WAIT: Duration = Duration::from_secs(60);

/// Takes a lock and gives it back.
#[derive(Clone)]
pub(crate) struct Contender {
    lease: Lease,
    locks: Locks,
    lock: String,
    wait: Duration,
}

impl Contender {
    /// Once. The release is waited for.
    pub(crate) async fn operate(&self) -> Result<(), Error> {
        let request = self.locks.lock(&*self.lock).wait(self.wait);
        request.acquire(&self.lease).await?.release().await
    }
}

/// As many contenders as callers, each with a lease: for a lock each, or all for one.
pub(crate) async fn prepare(
    client: &Client,
    work: Work,
    number: usize,
) -> Result<Vec<Contender>, Failure> {
    let leases = grant(client, number, TTL).await?;
    // Another run at the same time has other locks.
    let run = format!("quorate-bench-{}", std::process::id());
    let contenders = leases.into_iter().enumerate().map(|(index, lease)| {
        let (lock, wait) = match work {
            Work::Handover => (run.clone(), WAIT),
            _ => (format!("{run}-{index}"), Duration::ZERO),
        };
        Contender { lease, locks: client.locks(), lock, wait }
    });
    Ok(contenders.collect())
}

/// Gives up the contenders' leases; what cannot be revoked ends by itself.
pub(crate) async fn end(contenders: Vec<Contender>) {
    revoke(contenders.into_iter().map(|contender| contender.lease).collect()).await;
}

/// Grants that many leases.
pub(crate) async fn grant(
    client: &Client,
    number: usize,
    ttl: Duration,
) -> Result<Vec<Lease>, Failure> {
    let mut granted = Vec::with_capacity(number);
    let mut calls: JoinSet<Result<Lease, Error>> = JoinSet::new();
    for index in 0..number {
        if calls.len() >= CALLS_MAX {
            granted.extend(next(&mut calls).await.transpose()?);
        }
        let leases = client.leases();
        let options = LeaseOptions::new().owner(format!("quorate-bench-{index}")).ttl(ttl);
        calls.spawn(async move { leases.grant(options).await });
    }
    while let Some(lease) = next(&mut calls).await {
        granted.push(lease?);
    }
    Ok(granted)
}

async fn next(calls: &mut JoinSet<Result<Lease, Error>>) -> Option<Result<Lease, Failure>> {
    let joined = calls.join_next().await?;
    Some(match joined {
        Ok(lease) => lease.map_err(Failure::from),
        Err(error) => Err(Failure::Failed(error.to_string())),
    })
}

/// Revokes all of them, unless the cluster does not answer: then they end by themselves.
pub(crate) async fn revoke(leases: Vec<Lease>) {
    let mut leases = leases.into_iter();
    let mut calls = JoinSet::new();
    loop {
        while calls.len() < CALLS_MAX
            && let Some(lease) = leases.next()
        {
            calls.spawn(lease.revoke());
        }
        match tokio::time::timeout(REVOKE_QUIET, calls.join_next()).await {
            Ok(Some(_)) => {}
            Ok(None) => return,
            Err(_) => {
                tracing::debug!("some leases were not revoked in time; they end by themselves");
                return;
            }
        }
    }
}
