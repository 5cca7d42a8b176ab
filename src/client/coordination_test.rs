//! Leases and locks of the client against a server that does as its script says, on a clock that is
//! set by hand.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tonic::Code;

use super::tests::{Action, Mock, builder, within_ten_seconds};
use super::*;
use crate::proto::v1;
use crate::proto::v1::lease_renewal::Outcome;
use crate::proto::v1::pipeline_request::Request;
use crate::proto::v1::pipeline_response::Response;

/// Time to live of the leases of these tests.
const TTL: Duration = Duration::from_secs(10);

struct Manual(Mutex<Duration>);

impl Manual {
    fn new() -> Arc<Self> {
        Arc::new(Self(Mutex::new(Duration::from_secs(1_000))))
    }

    fn advance(&self, length: Duration) {
        *self.0.lock().unwrap() += length;
    }
}

impl Clock for Manual {
    fn monotonic(&self) -> Duration {
        *self.0.lock().unwrap()
    }

    fn wall(&self) -> u64 {
        0
    }
}

fn seconds(seconds: i64) -> Option<prost_types::Duration> {
    Some(prost_types::Duration { seconds, nanos: 0 })
}

fn timing() -> Option<v1::LeaseTiming> {
    Some(v1::LeaseTiming { remaining: seconds(10), renew_after: seconds(3) })
}

/// What a server in good health does; tokens count up from 101.
fn serve(count: usize, request: &Request) -> Action {
    Action::Answer(match request {
        Request::GrantLease(_) => {
            Response::GrantLease(v1::GrantLeaseResponse { revision: 1, timing: timing() })
        }
        Request::KeepAliveLeases(request) => renewals(request, |_| true),
        Request::RevokeLease(_) => Response::RevokeLease(v1::RevokeLeaseResponse { revision: 2 }),
        Request::AcquireLock(_) => Response::AcquireLock(v1::AcquireLockResponse {
            revision: 3,
            token: 100 + count as u64,
            grant_time: None,
            timing: timing(),
        }),
        Request::CancelAcquire(_) => {
            Response::CancelAcquire(v1::CancelAcquireResponse { revision: 4 })
        }
        Request::ReleaseLock(_) => Response::ReleaseLock(v1::ReleaseLockResponse { revision: 5 }),
        other => panic!("not of these tests: {other:?}"),
    })
}

fn renewals(request: &v1::KeepAliveLeasesRequest, lives: impl Fn(&str) -> bool) -> Response {
    let renewal = |id: &String| v1::LeaseRenewal {
        lease_id: id.clone(),
        outcome: Some(match timing() {
            Some(timing) if lives(id) => Outcome::Renewed(timing),
            _ => Outcome::Lost(v1::LeaseLost {}),
        }),
    };
    Response::KeepAliveLeases(v1::KeepAliveLeasesResponse {
        request_id: request.context.as_ref().map_or(0, |context| context.request_id),
        revision: 6,
        renewals: request.lease_ids.iter().map(renewal).collect(),
    })
}

async fn connect(mock: &Mock, clock: &Arc<Manual>) -> Client {
    builder(&[mock]).clock(clock.clone()).connect().await.unwrap()
}

async fn grant(client: &Client) -> Lease {
    client.leases().grant(LeaseOptions::new().ttl(TTL).owner("tester")).await.unwrap()
}

/// The requests of one kind that the mock has seen.
fn seen<T>(mock: &Mock, pick: impl Fn(Request) -> Option<T>) -> Vec<T> {
    mock.seen().into_iter().filter_map(|message| pick(message.request?)).collect()
}

fn acquires(mock: &Mock) -> Vec<v1::AcquireLockRequest> {
    seen(mock, |request| match request {
        Request::AcquireLock(request) => Some(request),
        _ => None,
    })
}

fn cancels(mock: &Mock) -> Vec<v1::CancelAcquireRequest> {
    seen(mock, |request| match request {
        Request::CancelAcquire(request) => Some(request),
        _ => None,
    })
}

fn keep_alives(mock: &Mock) -> Vec<v1::KeepAliveLeasesRequest> {
    seen(mock, |request| match request {
        Request::KeepAliveLeases(request) => Some(request),
        _ => None,
    })
}

fn releases(mock: &Mock) -> Vec<v1::ReleaseLockRequest> {
    seen(mock, |request| match request {
        Request::ReleaseLock(request) => Some(request),
        _ => None,
    })
}

fn revokes(mock: &Mock) -> usize {
    seen(mock, |request| matches!(request, Request::RevokeLease(_)).then_some(())).len()
}

async fn until(condition: impl Fn() -> bool) {
    within_ten_seconds(async {
        while !condition() {
            tokio::task::yield_now().await;
        }
    })
    .await;
}

#[tokio::test]
async fn a_message_whose_runtime_is_shut_down_is_under_way_no_more() {
    let mut is_first = true;
    let mock = Mock::start(1, move |count, request| match request {
        Request::KeepAliveLeases(_) if std::mem::take(&mut is_first) => Action::Ignore,
        request => serve(count, request),
    })
    .await;
    let clock = Manual::new();
    let client = connect(&mock, &clock).await;
    let elsewhere = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let granting = client.clone();
    let lease = elsewhere.spawn(async move { grant(&granting).await }).await.unwrap();
    clock.advance(Duration::from_secs(3));
    until(|| keep_alives(&mock).len() == 1).await;
    assert_eq!(client.leases().renewals().under_way, 1);
    elsewhere.shutdown_background();
    until(|| client.leases().renewals().under_way == 0).await;
    // Its lease goes with the next that is kept alive here.
    let _here = grant(&client).await;
    until(|| client.leases().renewals().renewed == 1).await;
    assert_eq!(keep_alives(&mock)[1].lease_ids, [lease.id().to_string()]);
}

#[tokio::test]
async fn leases_that_are_due_together_go_with_one_message() {
    let mock = Mock::start(1, serve).await;
    let clock = Manual::new();
    let client = connect(&mock, &clock).await;
    let mut leases = Vec::new();
    for _ in 0..50 {
        leases.push(grant(&client).await);
    }
    let other = client.with_namespace("other").unwrap();
    let elsewhere = grant(&other).await;
    assert_eq!(keep_alives(&mock).len(), 0);
    clock.advance(Duration::from_secs(3));
    until(|| client.leases().renewals().renewed == 51).await;
    let mut messages = keep_alives(&mock);
    messages.sort_by_key(|message| message.lease_ids.len());
    // One for each namespace.
    assert_eq!(messages.len(), 2);
    assert_eq!(messages[0].namespace, "other");
    assert_eq!(messages[0].lease_ids, [elsewhere.id().to_string()]);
    assert_eq!(messages[1].lease_ids.len(), 50);
    clock.advance(Duration::from_secs(3));
    until(|| client.leases().renewals().renewed == 102).await;
    assert_eq!(client.leases().renewals().leases, 51);
    assert!(leases.iter().all(|lease| !lease.is_lost()));
}

#[tokio::test]
async fn a_guard_is_lost_by_the_clock_alone_before_the_cluster_gives_the_lock_away() {
    let mock = Mock::start(1, |count, request| match request {
        Request::KeepAliveLeases(_) => Action::Ignore,
        request => serve(count, request),
    })
    .await;
    let clock = Manual::new();
    let client = connect(&mock, &clock).await;
    let lease = grant(&client).await;
    let guard = client.locks().lock("door").acquire(&lease).await.unwrap();
    let lost = tokio::spawn(guard.lost());
    // The grant was sent at 0, and nothing was acknowledged since; the machine may have slept.
    clock.advance(Duration::from_millis(9_499));
    assert!(!guard.is_lost() && !lease.is_lost());
    clock.advance(Duration::from_millis(1));
    assert!(guard.is_lost() && lease.is_lost());
    assert_eq!(within_ten_seconds(lost).await.unwrap(), Loss::NotRenewed);
    // No late word brings it back.
    assert_eq!(lease.remaining(), Duration::ZERO);
    until(|| client.leases().renewals().leases == 0).await;
    assert_eq!(client.leases().renewals().lost, 1);
    let error = client.locks().lock("other").acquire(&lease).await.unwrap_err();
    assert!(matches!(error, Error::LeaseLost { .. }), "{error:?}");
}

#[tokio::test]
async fn a_lease_is_renewed_across_errors() {
    let failures = Mutex::new(0);
    let mock = Mock::start(1, move |count, request| match request {
        Request::KeepAliveLeases(_) => {
            let mut failures = failures.lock().unwrap();
            *failures += 1;
            match *failures {
                1 => Action::Refuse(Code::Unavailable, "NO_LEADER"),
                2 => Action::Hangup,
                3 => Action::Refuse(Code::Internal, "MALFORMED_COMMAND"),
                4 => Action::Refuse(Code::ResourceExhausted, "OVERLOADED"),
                _ => serve(count, request),
            }
        }
        request => serve(count, request),
    })
    .await;
    let clock = Manual::new();
    let client = connect(&mock, &clock).await;
    let lease = grant(&client).await;
    clock.advance(Duration::from_secs(3));
    within_ten_seconds(async {
        while client.leases().renewals().renewed == 0 {
            // For the pauses of the keeper; far less than a lifetime in all.
            clock.advance(Duration::from_micros(10));
            tokio::task::yield_now().await;
            assert!(!lease.is_lost());
        }
    })
    .await;
    assert!(client.leases().renewals().failed >= 2);
    clock.advance(Duration::from_secs(8));
    assert!(!lease.is_lost(), "it was renewed at 3 s");
}

#[tokio::test]
async fn what_the_cluster_has_ended_is_signalled_and_not_revoked() {
    let mock = Mock::start(1, |count, request| match request {
        Request::KeepAliveLeases(request) => Action::Answer(renewals(request, |_| false)),
        request => serve(count, request),
    })
    .await;
    let clock = Manual::new();
    let client = connect(&mock, &clock).await;
    let lease = grant(&client).await;
    let guard = client.locks().lock("door").acquire(&lease).await.unwrap();
    clock.advance(Duration::from_secs(3));
    assert_eq!(within_ten_seconds(guard.lost()).await, Loss::Ended);
    assert!(lease.is_lost() && guard.is_lost());
    drop(guard);
    drop(lease);
    until(|| releases(&mock).len() == 1).await;
    assert_eq!(revokes(&mock), 0);
}

#[tokio::test]
async fn a_waiting_acquire_is_asked_for_again_under_its_name() {
    let mock = Mock::start(1, |count, request| match (count, request) {
        (1, Request::AcquireLock(_)) => Action::Refuse(Code::DeadlineExceeded, "STILL_WAITING"),
        (2, Request::AcquireLock(_)) => Action::Hangup,
        (3, Request::AcquireLock(_)) => Action::Refuse(Code::Unavailable, "NODE_STOPPING"),
        (4, Request::AcquireLock(_)) => Action::Refuse(Code::Unavailable, "NO_LEADER"),
        (count, request) => serve(count, request),
    })
    .await;
    let client = connect(&mock, &Manual::new()).await;
    let lease = grant(&client).await;
    let request = client.locks().lock("door").wait(Duration::from_secs(30)).shared();
    let guard = within_ten_seconds(request.acquire(&lease)).await.unwrap();
    assert_eq!(guard.token(), 105);

    let acquires = acquires(&mock);
    let contexts: Vec<_> = acquires.iter().map(|a| a.context.unwrap()).collect();
    assert_ne!(contexts[0].request_id, 0);
    assert!(contexts.iter().all(|context| context.request_id == contexts[0].request_id));
    let resends: Vec<bool> = contexts.iter().map(|context| context.resend).collect();
    assert_eq!(resends, [false, true, true, true, true]);
    assert!(acquires.iter().all(|acquire| acquire.wait == seconds(30)));
    assert!(cancels(&mock).is_empty());
}

#[tokio::test]
async fn an_acquire_that_expired_before_any_node_took_it_is_made_anew() {
    let mock = Mock::start(1, |count, request| match (count, request) {
        (1, Request::AcquireLock(_)) => Action::Hangup,
        // What a node says of a resend that comes too late, and whose claim is not there.
        (2, Request::AcquireLock(_)) => Action::Refuse(Code::FailedPrecondition, "ACQUIRE_ENDED"),
        (3, Request::AcquireLock(_)) => Action::Refuse(Code::DeadlineExceeded, "REQUEST_EXPIRED"),
        (count, request) => serve(count, request),
    })
    .await;
    let client = connect(&mock, &Manual::new()).await;
    let lease = grant(&client).await;
    let request = client.locks().lock("door").wait(Duration::from_secs(30));
    let _guard = within_ten_seconds(request.acquire(&lease)).await.unwrap();
    let ids: Vec<u64> =
        acquires(&mock).iter().map(|acquire| acquire.context.unwrap().request_id).collect();
    assert_eq!(ids.len(), 4);
    assert_eq!(ids[0], ids[1]);
    assert!(ids[0] != ids[2] && ids[2] != ids[3]);
    // Of the first there is nothing to cancel.
    until(|| cancels(&mock).len() == 1).await;
    assert_eq!(cancels(&mock)[0].acquire_request_id, ids[2]);
}

#[tokio::test]
async fn a_dropped_acquire_is_cancelled() {
    let mock = Mock::start(1, |count, request| match request {
        Request::AcquireLock(_) => Action::Ignore,
        request => serve(count, request),
    })
    .await;
    let client = connect(&mock, &Manual::new()).await;
    let lease = grant(&client).await;
    let request = client.locks().lock("door").wait(Duration::from_secs(30));
    tokio::select! {
        _ = request.acquire(&lease) => panic!("nobody answers"),
        () = until(|| acquires(&mock).len() == 1) => {}
    }
    until(|| cancels(&mock).len() == 1).await;
    let (acquire, cancel) = (&acquires(&mock)[0], &cancels(&mock)[0]);
    assert_eq!(cancel.acquire_request_id, acquire.context.unwrap().request_id);
    assert_ne!(cancel.context.unwrap().request_id, cancel.acquire_request_id);
    assert_eq!((&*cancel.lock, &*cancel.lease_id), ("door", &*lease.id().to_string()));
}

#[tokio::test]
async fn a_lease_that_is_lost_ends_the_wait() {
    let mock = Mock::start(1, |count, request| match request {
        Request::AcquireLock(_) => Action::Ignore,
        Request::KeepAliveLeases(request) => Action::Answer(renewals(request, |_| false)),
        request => serve(count, request),
    })
    .await;
    let clock = Manual::new();
    let client = connect(&mock, &clock).await;
    let lease = grant(&client).await;
    let request = client.locks().lock("door").wait(Duration::from_secs(30));
    let waiting = request.acquire(&lease);
    clock.advance(Duration::from_secs(3));
    let error = within_ten_seconds(waiting).await.unwrap_err();
    assert!(matches!(error, Error::LeaseLost { .. }), "{error:?}");
}

#[tokio::test]
async fn refusals_have_types_and_leave_nothing_to_cancel() {
    type Expected = fn(&Error) -> bool;
    let cases: [(Code, &str, Expected); 6] = [
        (Code::FailedPrecondition, "LOCK_HELD", |e| matches!(e, Error::LockHeld { .. })),
        (Code::FailedPrecondition, "LOCK_WAIT_EXPIRED", |e| matches!(e, Error::WaitExpired { .. })),
        (Code::FailedPrecondition, "LOCK_MODE_MISMATCH", |e| matches!(e, Error::Refused { .. })),
        (Code::InvalidArgument, "INVALID_WAIT", |e| matches!(e, Error::InvalidArgument { .. })),
        (Code::ResourceExhausted, "LIMIT_EXCEEDED", |e| matches!(e, Error::LimitExceeded { .. })),
        (Code::NotFound, "LEASE_NOT_FOUND", |e| matches!(e, Error::LeaseLost { .. })),
    ];
    for (code, reason, expected) in cases {
        let mock = Mock::start(1, move |count, request| match request {
            Request::AcquireLock(_) => Action::Refuse(code, reason),
            request => serve(count, request),
        })
        .await;
        let client = connect(&mock, &Manual::new()).await;
        let lease = grant(&client).await;
        let error = client.locks().lock("door").acquire(&lease).await.unwrap_err();
        assert!(expected(&error), "{reason}: {error:?}");
        assert_eq!(lease.is_lost(), reason == "LEASE_NOT_FOUND");
        // What was sent before this has arrived before it.
        let _ = client.leases().revoke(lease.id()).await;
        assert!(cancels(&mock).is_empty(), "{reason}");
    }
}

#[tokio::test]
async fn a_guard_releases_once_and_a_resend_that_finds_it_done_has_done_it() {
    let mock = Mock::start(1, |count, request| match (count, request) {
        (2, Request::ReleaseLock(_)) => Action::Hangup,
        (3, Request::ReleaseLock(_)) => Action::Refuse(Code::FailedPrecondition, "LOCK_NOT_HELD"),
        (count, request) => serve(count, request),
    })
    .await;
    let client = connect(&mock, &Manual::new()).await;
    let lease = grant(&client).await;
    let guard = client.locks().lock("door").acquire(&lease).await.unwrap();
    let token = guard.token();
    within_ten_seconds(guard.release()).await.unwrap();
    let released = releases(&mock);
    assert_eq!(released.len(), 2);
    assert!(released.iter().all(|release| release.token == token));
    assert!(released.iter().all(|release| release.lease_id == lease.id().to_string()));
    drop(client.locks().lock("door").acquire(&lease).await.unwrap());
    until(|| releases(&mock).len() == 3).await;
}

#[tokio::test]
async fn a_lease_is_revoked_with_its_last_owner_unless_it_is_left_to_itself() {
    let mock = Mock::start(1, serve).await;
    let client = connect(&mock, &Manual::new()).await;
    let lease = grant(&client).await;
    let guard = client.locks().lock("door").acquire(&lease).await.unwrap();
    drop(lease);
    assert_eq!(client.leases().renewals().leases, 1, "the guard needs it");
    drop(guard);
    until(|| revokes(&mock) == 1).await;

    let lease = grant(&client).await;
    let other = lease.clone();
    lease.into_id();
    assert!(other.is_lost());
    drop(other);
    let lease = grant(&client).await;
    let guard = client.locks().lock("door").acquire(&lease).await.unwrap();
    lease.revoke().await.unwrap();
    assert!(guard.is_lost());
    assert_eq!(revokes(&mock), 2);
    assert_eq!(client.leases().renewals().leases, 0);
}

/// What a read of the lock says when these tokens hold it, listed as far as a page goes.
fn held_by(lease: &str, tokens: &[u64], count: u32) -> Action {
    let exclusive = v1::LockMode { mode: Some(v1::lock_mode::Mode::Exclusive(true)) };
    let holder = |token: &u64| v1::LockHolder {
        // That of token 7 is lost, and its lock-delay under way.
        lease_id: if *token == 7 { String::new() } else { lease.to_owned() },
        mode: Some(exclusive),
        token: *token,
        ..Default::default()
    };
    let lock = v1::Lock {
        name: "door".to_owned(),
        kind: v1::LockKind::ExclusiveShared.into(),
        holder_count: count,
        holders: tokens.iter().map(holder).collect(),
        ..Default::default()
    };
    Action::Answer(Response::GetLock(v1::GetLockResponse { revision: 9, lock: Some(lock) }))
}

#[tokio::test]
async fn a_guard_finds_out_whether_its_lock_was_broken() {
    type Answer = fn(&str) -> Action;
    // Every grant here is of token 7 or 101; what is read then, and whether that is held.
    let cases: [(u64, Answer, bool); 6] = [
        (101, |lease| held_by(lease, &[5, 101], 2), true),
        (101, |_| held_by("0123456789abcdef0123456789abcdef", &[101], 1), false),
        (101, |lease| held_by(lease, &[5, 102], 200), false),
        (101, |lease| held_by(lease, &[5], 1), false),
        (101, |_| Action::Refuse(Code::NotFound, "LOCK_NOT_FOUND"), false),
        (7, |lease| held_by(lease, &[7], 1), false),
    ];
    for (number, (token, answer, is_held)) in cases.into_iter().enumerate() {
        let lease_id = Arc::new(Mutex::new(String::new()));
        let holder = lease_id.clone();
        let mock = Mock::start(1, move |count, request| match request {
            Request::GetLock(_) => answer(&holder.lock().unwrap()),
            Request::AcquireLock(_) => {
                Action::Answer(Response::AcquireLock(v1::AcquireLockResponse {
                    token,
                    timing: timing(),
                    ..Default::default()
                }))
            }
            request => serve(count, request),
        })
        .await;
        let client = connect(&mock, &Manual::new()).await;
        let lease = grant(&client).await;
        *lease_id.lock().unwrap() = lease.id().to_string();
        let guard = client.locks().lock("door").acquire(&lease).await.unwrap();
        match guard.verify().await {
            Ok(()) => assert!(is_held, "case {number}"),
            Err(Error::LockNotHeld { .. }) => assert!(!is_held, "case {number}"),
            Err(error) => panic!("case {number}: {error:?}"),
        }
    }
}

#[tokio::test]
async fn a_holder_behind_the_page_asks_for_its_claim_and_can_make_none() {
    let mock = Mock::start(1, |count, request| match (count, request) {
        (5, Request::AcquireLock(_)) => Action::Refuse(Code::FailedPrecondition, "ACQUIRE_ENDED"),
        (_, Request::AcquireLock(_)) => serve(1, request),
        (_, Request::GetLock(_)) => held_by("0123456789abcdef0123456789abcdef", &[5, 6], 200),
        (count, request) => serve(count, request),
    })
    .await;
    let clock = Manual::new();
    let client = connect(&mock, &clock).await;
    let lease = grant(&client).await;
    let guard = client.locks().lock("door").shared().acquire(&lease).await.unwrap();
    guard.verify().await.unwrap();
    let error = guard.verify().await.unwrap_err();
    assert!(matches!(error, Error::LockNotHeld { .. }), "{error:?}");
    let contexts: Vec<_> = acquires(&mock).iter().map(|acquire| acquire.context.unwrap()).collect();
    assert_eq!(contexts.len(), 3);
    for context in &contexts[1..] {
        assert_eq!(context.request_id, contexts[0].request_id);
        assert!(context.resend);
        assert_eq!(context.expire_time.unwrap().seconds, 0, "it could be applied");
    }
    // What is lost by the clock is not asked for.
    clock.advance(TTL);
    let error = guard.verify().await.unwrap_err();
    assert!(matches!(error, Error::LockNotHeld { .. }), "{error:?}");
}

#[tokio::test]
async fn a_lease_that_was_granted_too_late_is_asked_for_anew() {
    for in_time in [3, usize::MAX] {
        let clock = Manual::new();
        let (late, grants) = (clock.clone(), Mutex::new(0));
        let mock = Mock::start(1, move |count, request| {
            if let Request::GrantLease(_) = request {
                let mut grants = grants.lock().unwrap();
                *grants += 1;
                if *grants < in_time {
                    late.advance(TTL);
                }
            }
            serve(count, request)
        })
        .await;
        let client = connect(&mock, &clock).await.with_timeout(Duration::from_millis(500));
        let granted = client.leases().grant(LeaseOptions::new().ttl(TTL)).await;
        let ids: BTreeSet<String> = seen(&mock, |request| match request {
            Request::GrantLease(request) => Some(request.lease_id),
            _ => None,
        })
        .into_iter()
        .collect();
        match granted {
            Ok(lease) => {
                assert_eq!(ids.len(), in_time, "each is another");
                assert!(!lease.is_lost() && ids.contains(&lease.id().to_string()));
            }
            // The last may have had no time left for its answer.
            Err(Error::DeadlineExceeded { .. } | Error::OutcomeUnknown { .. }) => {
                assert!(in_time == usize::MAX && ids.len() > 1);
            }
            Err(error) => panic!("{error:?}"),
        }
    }
}

#[tokio::test]
async fn a_client_has_settled_once_what_was_dropped_is_undone() {
    let mock = Mock::start(1, |count, request| match request {
        Request::AcquireLock(acquire) if acquire.lock == "never" => Action::Ignore,
        request => serve(count, request),
    })
    .await;
    let client = connect(&mock, &Manual::new()).await;
    within_ten_seconds(client.settled()).await;
    let lease = grant(&client).await;
    let guard = client.locks().lock("door").acquire(&lease).await.unwrap();
    let request = client.locks().lock("never").wait(Duration::from_secs(30));
    tokio::select! {
        _ = request.acquire(&lease) => panic!("nobody answers"),
        () = until(|| acquires(&mock).len() == 2) => {}
    }
    drop(guard);
    drop(lease);
    // A clone knows of it all.
    within_ten_seconds(client.with_timeout(Duration::from_secs(1)).settled()).await;
    assert_eq!((cancels(&mock).len(), releases(&mock).len(), revokes(&mock)), (1, 1, 1));
}
