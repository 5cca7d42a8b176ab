//! `quorate.v1` ⇄ the types of the service layer, by noun; here what they have in common.

mod cluster;
mod lease;
mod lock;
mod ring;
mod session;

use std::time::Duration;

use crate::proto::v1;
use crate::service::{Consistency, Error, RequestContext};
use crate::state::Timestamp;

pub(super) use cluster::*;
pub(super) use lease::*;
pub(super) use lock::*;
pub(super) use ring::*;
pub(super) use session::*;

pub(super) fn timestamp_out(timestamp: Timestamp) -> prost_types::Timestamp {
    prost_types::Timestamp {
        seconds: i64::try_from(timestamp.0 / 1000).unwrap_or(i64::MAX),
        nanos: i32::try_from(timestamp.0 % 1000).unwrap_or(0) * 1_000_000,
    }
}

/// Cluster time has milliseconds; what is finer is cut off.
pub(super) fn timestamp_in(
    field: &'static str,
    timestamp: Option<prost_types::Timestamp>,
) -> Result<Option<Timestamp>, Error> {
    let Some(timestamp) = timestamp else { return Ok(None) };
    let seconds = u64::try_from(timestamp.seconds).ok();
    let nanos = u64::try_from(timestamp.nanos).ok().filter(|nanos| *nanos < 1_000_000_000);
    let millis = seconds
        .and_then(|seconds| seconds.checked_mul(1000))
        .and_then(|millis| millis.checked_add(nanos? / 1_000_000));
    millis.map(|millis| Some(Timestamp(millis))).ok_or_else(|| {
        Error::invalid(field, "INVALID_TIMESTAMP", format!("{field} is not a time after 1970"))
    })
}

pub(super) fn duration_out(duration: Duration) -> prost_types::Duration {
    prost_types::Duration {
        seconds: i64::try_from(duration.as_secs()).unwrap_or(i64::MAX),
        nanos: i32::try_from(duration.subsec_nanos()).unwrap_or(0),
    }
}

/// A duration that is not negative.
pub(super) fn duration_in(
    field: &'static str,
    duration: prost_types::Duration,
) -> Result<Duration, Error> {
    Duration::try_from(duration).map_err(|_| {
        Error::invalid(field, "INVALID_DURATION", format!("{field} is negative or malformed"))
    })
}

fn context_in(context: Option<v1::RequestContext>) -> Result<RequestContext, Error> {
    let Some(context) = context else { return Ok(RequestContext::default()) };
    Ok(RequestContext {
        request_id: context.request_id,
        resend: context.resend,
        first_sent: timestamp_in("context.first_sent_time", context.first_sent_time)?,
        expires: timestamp_in("context.expire_time", context.expire_time)?,
    })
}

fn consistency_in(
    consistency: i32,
    min_revision: u64,
    max_staleness: Option<prost_types::Duration>,
) -> Result<Consistency, Error> {
    let bounded = |length| duration_in("max_staleness", length);
    match v1::Consistency::try_from(consistency) {
        Ok(v1::Consistency::Unspecified | v1::Consistency::Linearizable) => {
            Ok(Consistency::Linearizable)
        }
        Ok(v1::Consistency::Local) => {
            let max_staleness = max_staleness.map(bounded).transpose()?;
            Ok(Consistency::Local { min_revision, max_staleness })
        }
        Err(_) => Err(Error::invalid(
            "consistency",
            "INVALID_CONSISTENCY",
            format!("consistency {consistency} is not known here"),
        )),
    }
}

/// A duration that may be left out, which is zero.
fn duration_or_zero(
    field: &'static str,
    duration: Option<prost_types::Duration>,
) -> Result<Duration, Error> {
    duration.map_or(Ok(Duration::ZERO), |duration| duration_in(field, duration))
}
