//! Requests on their way in: what has come of those that have not come whole.
//!
//! gRPC's decoder keeps what it has of a message until all of it is there. A message is small
//! beside what a node can hold, but one connection may have thousands of calls. So these bytes
//! count, for the node and for the connection, and a call for which there is no room is refused. A
//! message that comes whole, as nearly all do, counts for nothing here.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use http_body::{Frame, SizeHint};
use tonic::Status;
use tonic::body::Body;
use tonic::codegen::http;

use super::status::status;
use crate::service::{Error, Share};

/// Bytes before each message: one of flags, and four of its length.
const HEAD_BYTES: usize = 5;

/// How much has come of the message that comes.
#[derive(Default)]
struct Incomplete {
    head: usize,
    /// Once the head is whole, what has yet to come.
    missing: usize,
    bytes: usize,
}

impl Incomplete {
    fn advance(&mut self, mut data: &[u8]) {
        while !data.is_empty() {
            let step = if self.head < HEAD_BYTES {
                if self.head > 0 {
                    self.missing = self.missing << 8 | usize::from(data[0]);
                }
                self.head += 1;
                1
            } else {
                let step = self.missing.min(data.len());
                self.missing -= step;
                step
            };
            self.bytes += step;
            data = &data[step..];
            if self.head == HEAD_BYTES && self.missing == 0 {
                *self = Self::default();
            }
        }
    }
}

/// The body of a request.
struct Received {
    body: Body,
    share: Arc<Share>,
    incomplete: Incomplete,
}

impl Received {
    /// Counts what has come.
    fn advance(&mut self, data: &[u8]) -> Result<(), Error> {
        let before = self.incomplete.bytes;
        self.incomplete.advance(data);
        if self.share.receive(before, self.incomplete.bytes) {
            return Ok(());
        }
        self.incomplete.bytes = before;
        Err(Error::no_room_to_receive())
    }
}

impl Drop for Received {
    fn drop(&mut self) {
        self.share.receive(self.incomplete.bytes, 0);
    }
}

impl http_body::Body for Received {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let polled = Pin::new(&mut self.body).poll_frame(context);
        polled.map(|next| {
            next.map(|frame| {
                let frame = frame?;
                if let Some(data) = frame.data_ref() {
                    self.advance(data).map_err(status)?;
                }
                Ok(frame)
            })
        })
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// Lets what comes of a request count on its connection.
pub(super) fn received(request: http::Request<Body>) -> http::Request<Body> {
    match request.extensions().get::<Arc<Share>>().cloned() {
        Some(share) => request
            .map(|body| Body::new(Received { body, share, incomplete: Incomplete::default() })),
        None => request,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::{INCOMING_BYTES_OF_CONNECTION_MIN, REQUEST_BYTES_MAX};
    use crate::service::Admission;

    fn message(bytes: usize) -> Vec<u8> {
        let length = u32::try_from(bytes).unwrap().to_be_bytes();
        [&[0][..], &length, &vec![7; bytes]].concat()
    }

    fn receiving(share: &Arc<Share>) -> Received {
        let (body, share) = (Body::empty(), share.clone());
        Received { body, share, incomplete: Incomplete::default() }
    }

    #[test]
    fn what_has_not_come_whole_counts_until_it_has() {
        let admission = Admission::new();
        let share = admission.share(|| {});
        let mut received = receiving(&share);
        let messages = [message(300), message(0), message(70_000), message(1)].concat();
        received.advance(&messages).unwrap();
        assert_eq!(admission.held_bytes(), 0);
        // However it is cut.
        for bytes in [1, 4, 299, 7_000] {
            for part in messages.chunks(bytes) {
                received.advance(part).unwrap();
            }
            assert_eq!(admission.held_bytes(), 0, "{bytes} at a time");
        }
        received.advance(&messages[..200]).unwrap();
        assert_eq!(admission.held_bytes(), 200);
        drop(received);
        assert_eq!(admission.held_bytes(), 0);
    }

    #[test]
    fn calls_that_never_come_whole_are_refused_and_others_are_not() {
        let admission = Admission::new();
        let share = admission.share(|| {});
        let part = &message(REQUEST_BYTES_MAX - 5)[..REQUEST_BYTES_MAX - 1];
        let mut calls = Vec::new();
        let refused = loop {
            let mut call = receiving(&share);
            if let Err(error) = call.advance(part) {
                break error;
            }
            calls.push(call);
            assert!(calls.len() < 100, "{} bytes", admission.held_bytes());
        };
        assert_eq!(refused.reason, "OVERLOADED");
        assert!(calls.len() > 16, "{} large requests at once", calls.len());
        let other = admission.share(|| {});
        receiving(&other).advance(part).unwrap();
        // However little room there is, small requests are heard.
        let many: Vec<_> = (0..200).map(|_| admission.share(|| {})).collect();
        for share in &many {
            let mut call = receiving(share);
            if call.advance(part).is_ok() {
                calls.push(call);
            }
        }
        let late = admission.share(|| {});
        receiving(&late).advance(&part[..INCOMING_BYTES_OF_CONNECTION_MIN]).unwrap();
        drop(calls);
        assert_eq!(admission.held_bytes(), 0);
    }
}
