//! The limits that callers and operators meet, with the reason where there is more to it than a
//! round number. What only one module can outgrow is limited there.
//!
//! A limit that the state consults when it applies a command decides what an entry means, so it
//! belongs to the feature level (`state::level`): where two builds have other values, their nodes
//! part. Such a limit changes only together with `FEATURE_LEVEL`, the state keeps the old value for
//! the levels below, and a test in `state::level` names them all with the values that they have.

use std::time::Duration;

/// Longest namespace name, in bytes: a DNS label, so that it can be one.
pub const NAMESPACE_BYTES_MAX: usize = 63;
/// Longest name of anything else (attribute, principal), in bytes of UTF-8.
pub const NAME_BYTES_MAX: usize = 256;
/// Shortest session id that a caller may choose: 16 characters of base64url hold 96 bits.
pub const SESSION_ID_CHARS_MIN: usize = 16;
/// Longest session id that a caller may choose.
pub const SESSION_ID_CHARS_MAX: usize = 128;
/// Largest attribute value, in bytes.
pub const ATTRIBUTE_VALUE_BYTES_MAX: usize = 256 * 1024;
/// Largest session: the sum of its attributes' names and values, in bytes.
pub const SESSION_BYTES_MAX: usize = 1024 * 1024;
/// Most attributes of one session.
pub const SESSION_ATTRIBUTES_MAX: usize = 256;
/// Most attributes that a read names: what one session can have.
pub const ATTRIBUTE_NAMES_MAX: usize = SESSION_ATTRIBUTES_MAX;
/// Largest log entry, in bytes: one sync's worth at a millisecond or two.
pub const ENTRY_BYTES_MAX: usize = 2 * 1024 * 1024;
/// Largest request or message, in bytes; tonic's own default.
pub const REQUEST_BYTES_MAX: usize = 4 * 1024 * 1024;
/// Largest answer, in bytes of its encoding: gRPC's stock clients refuse messages of more than
/// 4 MiB, and on a pipeline the answer travels with a few bytes of its own around it.
pub const ANSWER_BYTES_MAX: usize = 4 * 1024 * 1024 - 64;
/// Most session selectors in one BatchGetSessions, and most sessions on one page of a list.
pub const PAGE_SIZE_MAX: usize = 1_000;
/// Records that one page of a list looks at, those that are over among them: a few milliseconds'
/// work. When so many have ended at once, a page may be short, or empty.
pub const PAGE_LOOKS_MAX: usize = 16_384;
/// Sessions on a page of a list whose caller did not say.
pub const PAGE_SIZE_DEFAULT: usize = 100;

/// Most nodes that a cluster is formed of, as each is asked and answers for itself.
pub const FOUNDERS_MAX: usize = 32;

/// Shortest idle or absolute timeout.
pub const TIMEOUT_MIN: Duration = Duration::from_secs(1);
/// Longest idle or absolute timeout that is not "never": ten years.
pub const TIMEOUT_MAX: Duration = Duration::from_secs(10 * 365 * 24 * 3600);
/// Idle timeout of a session whose creator did not say: the servlet default.
pub const IDLE_TIMEOUT_DEFAULT: Duration = Duration::from_secs(30 * 60);

/// Most requests that a record remembers.
pub const REMEMBERED_REQUESTS_MAX: usize = 8;
/// Longest time between a request's first sending and its expiry.
pub const REQUEST_LIFETIME_MAX: Duration = Duration::from_secs(60);
/// How far the clock of whoever dates a request may be ahead of the cluster's; a request is not
/// applied in the last so much of the longest lifetime. A client that asks for the time once a
/// minute is off by no more than a second.
pub const REQUEST_SKEW_MAX: Duration = Duration::from_secs(5);
/// Deadline of a request whose caller did not say.
pub const REQUEST_TIMEOUT_DEFAULT: Duration = Duration::from_secs(10);
/// How long a removed key stays retired: longer than any request lives.
pub const TOMBSTONE_LIFETIME: Duration = Duration::from_secs(60);
/// Most expired records that one Tick removes, so that none holds up the writes behind it: half a
/// millisecond's work. With a thousand, writers felt a great many expiries four times as much.
pub const EXPIRE_BATCH_MAX: usize = 256;

/// Shortest TTL of a lease.
pub const LEASE_TTL_MIN: Duration = Duration::from_secs(1);
/// Longest TTL of a lease.
pub const LEASE_TTL_MAX: Duration = Duration::from_secs(24 * 3600);
/// Most leases that one command renews, so that none holds up the writes behind it.
pub const LEASE_RENEWALS_MAX: usize = 1_000;
/// Most leases of one namespace.
pub const LEASES_MAX: usize = 1_000_000;
/// Most claims on locks that hang from one lease.
pub const CLAIMS_PER_LEASE_MAX: usize = 16_384;
/// Most Acquires, cancelled before they came, that one lease keeps out until they cannot come any
/// more; as many as one client may have under way when its leader is killed.
pub const VOIDS_PER_LEASE_MAX: usize = 256;
/// Most claims that wait for one lock.
pub const LOCK_WAITERS_MAX: usize = 100_000;
/// Longest time that an Acquire waits.
pub const LOCK_WAIT_MAX: Duration = Duration::from_secs(10 * 60);
/// Longest lock-delay.
pub const LOCK_DELAY_MAX: Duration = Duration::from_secs(60);
/// Most permits of one lock.
pub const LOCK_PERMITS_MAX: u32 = 1_000_000;
/// How far the place of a waiter in its queue is counted, as counting takes time for each place.
pub const LOCK_POSITION_MAX: usize = 1_000;
/// Most members of one ring: 20 MiB of points on whoever routes by it.
pub const RING_MEMBERS_MAX: usize = 1_000;
/// Largest weight of a member of a ring.
pub const RING_WEIGHT_MAX: u32 = 1_000;
/// Most tags of a member of a ring.
pub const RING_MEMBER_TAGS_MAX: usize = 64;
/// Longest value of a tag, in bytes.
pub const RING_TAG_VALUE_BYTES_MAX: usize = 1_024;
/// Most bytes of names and values of a member's tags: so a message holds a ring of any size.
pub const RING_MEMBER_TAG_BYTES_MAX: usize = 2_048;
/// Most members of rings that hang from one lease.
pub const MEMBERS_PER_LEASE_MAX: usize = 1_024;
/// Most keys of one LocateKeys, and most members for each.
pub const LOCATE_KEYS_MAX: usize = 1_000;
/// Longest key that is located, in bytes.
pub const LOCATE_KEY_BYTES_MAX: usize = 1_024;
/// Most members named in one answer to LocateKeys.
pub const LOCATE_PLACEMENTS_MAX: usize = 10_000;

/// Log entries under way at once from one node's queue; the prototype gained nothing beyond 8.
pub const ENTRIES_IN_FLIGHT_MAX: usize = 8;
/// Commands that a node holds, queued or under way, before it refuses more.
pub const PROPOSALS_PENDING_MAX: usize = 65_536;
/// Bytes of commands that a node holds before it refuses more.
pub const PROPOSAL_BYTES_PENDING_MAX: usize = 128 * 1024 * 1024;
/// Requests under way on one pipeline before the server stops reading from it.
pub const PIPELINE_IN_FLIGHT_MAX: usize = 4_096;
/// Bytes that a node holds for requests under way; see `service::admission`. Beyond, it reads no
/// more of them from its streams.
pub const ASKED_BYTES_OF_NODE_MAX: usize = 16 * 1024 * 1024;
/// The same of one connection.
pub const ASKED_BYTES_OF_CONNECTION_MAX: usize = 4 * 1024 * 1024;
/// What each connection may ask however much others do: some sixty requests.
pub const ASKED_BYTES_OF_CONNECTION_MIN: usize = 32 * 1024;
/// Bytes that a node holds of requests that have not come whole. Beyond, it refuses more. One
/// connection may hold half of what is free, which is 85 MiB while it is alone: twenty of the
/// largest requests at once.
pub const INCOMING_BYTES_OF_NODE_MAX: usize = 256 * 1024 * 1024;
/// What each connection may send however much others do.
pub const INCOMING_BYTES_OF_CONNECTION_MIN: usize = 64 * 1024;
/// Bytes that a node holds for answers that their connections have not taken yet. Beyond, reads
/// wait.
pub const ANSWER_BYTES_OF_NODE_MAX: usize = 128 * 1024 * 1024;
/// The part of what is free of that which one connection may hold: 2.6 MiB while it is alone. After
/// 64 connections, one by one, have taken theirs in answers of 700 KiB, there are 22 MiB left.
pub const ANSWER_SHARE_OF_FREE: usize = 48;
/// Reads that wait for barriers on one node before it refuses more.
pub const READS_PENDING_MAX: usize = 65_536;
/// Calls under way on one connection. A client may also cancel so many before the server has begun
/// with them, without losing its connection: that is what HTTP/2 lets it open.
pub const CALLS_OF_CONNECTION_MAX: u32 = 4_096;
/// Calls that break HTTP/2's rules before their connection is closed; h2's own default.
pub const FAULTY_CALLS_OF_CONNECTION_MAX: usize = 1_024;
/// Connections of clients at once, if the limit of open files allows as many.
pub const CLIENT_CONNECTIONS_MAX: usize = 16_384;
/// Connections of other nodes at once; each has a few.
pub const PEER_CONNECTIONS_MAX: usize = 64;
/// Files that are kept for log, checkpoints, snapshots and connections to other nodes; or half of
/// all, if that is more, as the log grows with the state. Each segment takes two, and there are
/// some forty before a snapshot lets the first ones go.
pub const FILES_RESERVED_MIN: usize = 160;
/// KeepAlive messages under way on one stream before the server stops reading from it; each may
/// renew a thousand leases.
pub const KEEP_ALIVES_IN_FLIGHT_MAX: usize = 64;
/// Calls on one node that wait for locks before it refuses more.
pub const ACQUIRES_WAITING_MAX: usize = 131_072;
/// Acquires that wait on one pipeline before it refuses more. They do not count as under way: a
/// release on the same pipeline may be what they wait for.
pub const PIPELINE_WAITING_MAX: usize = 16_384;
/// Read barriers under way at once; the prototype gained a tenth over one.
pub const BARRIERS_IN_FLIGHT_MAX: usize = 4;
