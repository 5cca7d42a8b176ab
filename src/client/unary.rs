//! One gRPC call for each request, for those who do not want a pipeline.
//!
//! The generated client wants to own what it sends and has a method for each kind of request. Here
//! a request is shared with the caller, who may need it for a resend, so it is written without
//! being owned, and one table says what there is to know of each kind.

use std::sync::Arc;
use std::time::Duration;

use prost::Message as _;
use tonic::Status;
use tonic::client::Grpc;
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::codegen::http::uri::PathAndQuery;
use tonic::transport::Channel;

use super::RESPONSE_BYTES_MAX;
use super::connection::timed;
use crate::proto::v1::pipeline_request::Request;
use crate::proto::v1::pipeline_response::Response;
use crate::proto::v1::{
    AcquireLockResponse, BatchGetSessionsResponse, BreakLockResponse, CancelAcquireResponse,
    CreateSessionResponse, DeleteSessionResponse, GetLeaseResponse, GetLockResponse,
    GetRingResponse, GetSessionResponse, GrantLeaseResponse, JoinRingResponse,
    KeepAliveLeasesResponse, LeaveRingResponse, ListLeasesResponse, ListLocksResponse,
    ListSessionsResponse, LocateKeysResponse, ReleaseLockResponse, RevokeLeaseResponse,
    TouchSessionResponse, UpdateSessionResponse,
};

/// Sends one request and waits for its answer.
pub(super) async fn call(
    channel: Channel,
    request: Arc<Request>,
    timeout: Duration,
) -> Result<Response, Status> {
    let mut grpc = Grpc::new(channel)
        .max_decoding_message_size(RESPONSE_BYTES_MAX)
        .max_encoding_message_size(usize::MAX);
    grpc.ready().await.map_err(|error| Status::from_error(Box::new(error)))?;
    let path = PathAndQuery::from_static(path_of(&request));
    let codec = UnaryCodec { decode: decoder_of(&request) };
    Ok(grpc.unary(timed(request, timeout), path, codec).await?.into_inner())
}

type Decode = fn(&mut DecodeBuf<'_>) -> Result<Response, prost::DecodeError>;

/// What there is to know of each kind of request: its method, and what that answers.
macro_rules! methods {
    ($($kind:ident: $path:literal -> $answer:ty,)*) => {
        fn path_of(request: &Request) -> &'static str {
            match request {
                $(Request::$kind(_) => $path,)*
            }
        }

        fn encode(
            request: &Request,
            buffer: &mut EncodeBuf<'_>,
        ) -> Result<(), prost::EncodeError> {
            match request {
                $(Request::$kind(message) => message.encode(buffer),)*
            }
        }

        fn decoder_of(request: &Request) -> Decode {
            match request {
                $(Request::$kind(_) => |buffer| <$answer>::decode(buffer).map(Response::$kind),)*
            }
        }
    };
}

methods! {
    CreateSession: "/quorate.v1.SessionService/CreateSession" -> CreateSessionResponse,
    GetSession: "/quorate.v1.SessionService/GetSession" -> GetSessionResponse,
    BatchGetSessions: "/quorate.v1.SessionService/BatchGetSessions" -> BatchGetSessionsResponse,
    UpdateSession: "/quorate.v1.SessionService/UpdateSession" -> UpdateSessionResponse,
    TouchSession: "/quorate.v1.SessionService/TouchSession" -> TouchSessionResponse,
    DeleteSession: "/quorate.v1.SessionService/DeleteSession" -> DeleteSessionResponse,
    ListSessions: "/quorate.v1.SessionService/ListSessions" -> ListSessionsResponse,
    GrantLease: "/quorate.v1.LeaseService/GrantLease" -> GrantLeaseResponse,
    KeepAliveLeases: "/quorate.v1.LeaseService/KeepAliveLeases" -> KeepAliveLeasesResponse,
    RevokeLease: "/quorate.v1.LeaseService/RevokeLease" -> RevokeLeaseResponse,
    GetLease: "/quorate.v1.LeaseService/GetLease" -> GetLeaseResponse,
    ListLeases: "/quorate.v1.LeaseService/ListLeases" -> ListLeasesResponse,
    AcquireLock: "/quorate.v1.LockService/AcquireLock" -> AcquireLockResponse,
    CancelAcquire: "/quorate.v1.LockService/CancelAcquire" -> CancelAcquireResponse,
    ReleaseLock: "/quorate.v1.LockService/ReleaseLock" -> ReleaseLockResponse,
    GetLock: "/quorate.v1.LockService/GetLock" -> GetLockResponse,
    ListLocks: "/quorate.v1.LockService/ListLocks" -> ListLocksResponse,
    BreakLock: "/quorate.v1.LockService/BreakLock" -> BreakLockResponse,
    JoinRing: "/quorate.v1.RingService/JoinRing" -> JoinRingResponse,
    LeaveRing: "/quorate.v1.RingService/LeaveRing" -> LeaveRingResponse,
    LocateKeys: "/quorate.v1.RingService/LocateKeys" -> LocateKeysResponse,
    GetRing: "/quorate.v1.RingService/GetRing" -> GetRingResponse,
}

/// The codec of one call.
#[derive(Clone, Copy)]
struct UnaryCodec {
    decode: Decode,
}

impl Codec for UnaryCodec {
    type Encode = Arc<Request>;
    type Decode = Response;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        *self
    }

    fn decoder(&mut self) -> Self {
        *self
    }
}

impl Encoder for UnaryCodec {
    type Item = Arc<Request>;
    type Error = Status;

    fn encode(&mut self, request: Arc<Request>, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        encode(&request, buffer).map_err(|error| Status::internal(error.to_string()))
    }
}

impl Decoder for UnaryCodec {
    type Item = Response;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<Response>, Status> {
        // As tonic does for messages that it decodes itself.
        (self.decode)(buffer).map(Some).map_err(|error| Status::internal(error.to_string()))
    }
}
