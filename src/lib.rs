//! Quorate: a session store for services that run as many copies. Sessions are replicated by one
//! Raft log, acknowledged only when a majority has them on disk, and readable linearizably from
//! any node. README.md is for those who run it; this page is for those who read it.
//!
//! # Layers
//!
//! ```text
//!   gRPC (quorate.v1)                        cli ── client
//!          │                                 (speak quorate.v1 too)
//!   wire      bytes ⇄ domain types; no decisions
//!   service   use cases: validate, digest ids, build a command or a query
//!   raft      the shell around openraft: queue, read barrier, log, network, time
//!      ├────────────────────────────┐
//!   state                        storage
//!   the core: pure, in memory    bytes on disk: write-ahead log, sled, snapshot files
//! ```
//!
//! Dependencies point down only; `tests/tidy.rs` sees to that. [`state`] and [`storage`] know
//! neither each other nor anything above, `state` neither tokio nor openraft nor a clock. What is
//! generated from `quorate.v1` stops at `wire`, `quorate.peer.v1` and openraft at `raft`,
//! `quorate.stored.v1` at one codec in `state`, sled at one file of `storage`.
//!
//! A node is a value: listeners, directory and clock are handed to it, so that three of them run
//! in one process. The command line gives each a single-threaded runtime; what blocks has threads
//! of its own: the log's writer, its supply of segments, checkpoints and snapshots.
//!
//! # The life of a write
//!
//! 1. `wire::session` (one gRPC call; `wire::lease` and `wire::lock` are like it) or
//!    `wire::pipeline` (a stream of many) decodes it with `wire::convert` and calls, say,
//!    [`service::Sessions::update`].
//! 2. The service validates, turns the session id into its digest
//!    ([`service::session_digest`]: below this line nobody knows an id), names and dates the
//!    request if the client has not, and builds a [`state::Command`].
//! 3. [`raft::Node::write`] encodes the command, once, and puts it into the queue of
//!    `raft::proposals`. Whatever queued while earlier entries were under way becomes the next
//!    pack: at most 2 MiB, at most eight packs at a time, no timer.
//! 4. The leader stamps the pack with cluster time and proposes it as one log entry. Any other
//!    node sends it to the leader instead (`Proposals::forward`, `Proposals::lead_for`), over a
//!    stream that `raft::exchange` keeps open.
//! 5. openraft hands the entry to `raft::log`, which queues it for [`storage::wal`], and to
//!    `raft::network`, which streams it to the other nodes: their syncs run beside the leader's
//!    own. One write and one sync take everything that queued during the sync before.
//! 6. Once a majority has synced it, it is committed. `raft::machine` decodes it, moves the clock
//!    of the [`state::State`] to the stamp, and applies command by command. Applying cannot fail:
//!    what cannot be done is a [`state::Rejection`] inside the reply.
//! 7. The replies go back through the callbacks of steps 3 and 2, and `wire` encodes them. The
//!    changes go into the dirty map (`raft::dirty`) for the next checkpoint; nobody waits for it.
//!
//! # The life of a read
//!
//! 1. `wire` decodes, [`service::Sessions::get`] validates, digests and builds a [`state::Query`].
//! 2. [`raft::Node::read`] puts it behind a barrier. It joins the next round that has not been
//!    sent: the leader asks the voters whether they have voted in a later term than its own, and a
//!    majority that has not proves that what it had applied by then, or had told others is
//!    committed, is current. A follower asks the leader for such a round and then waits until it
//!    has applied as far (`raft::barrier` acts, `raft::rounds` decides).
//! 3. The query looks at the state in memory, of the node that was asked, and `wire` encodes the
//!    answer. A read writes nothing; one that also touches the session may propose a command.
//!
//! A local read ([`raft::Node::read_local`]) skips step 2, or waits for a revision; if it bounds
//! its age, that is told by what the node heard last from a leader with a majority
//! (`raft::freshness`).
//!
//! # The life of a wait
//!
//! 1. An Acquire is a write: [`service::Locks::acquire`], [`raft::Node::acquire`], the log. When
//!    the lock is not free, the claim that it makes is a record like any other, and waits.
//! 2. The caller's node follows that claim in its own state (`raft::following`). The entry that
//!    grants or ends it is applied here as everywhere, and its change answers the caller.
//! 3. A caller, connection, node or leader that goes away takes nothing with it: the same request,
//!    sent to any node, finds its claim. Only a Cancel, or the end of its wait or lease, ends it.
//!
//! Renewals of leases go before everything else that waits to be proposed (`raft::lanes`).
//!
//! # Versions
//!
//! What an entry means is decided by the feature level in the state (`state::level`), which a
//! command of the log raises: the leader proposes it once every member has said that its build
//! knows the higher one (`raft::level`). So nodes of two builds make the same of every entry, and
//! one that cannot halts.
//!
//! # What is on disk
//!
//! ```text
//! lock        held for as long as the node lives                   storage::directory
//! identity    cluster, node, incarnation, the founding members     storage::directory
//! wal/        the Raft log and vote: what makes an answer true      storage::wal
//! sled/       the state as of a recent entry, a checkpoint          storage::checkpoint, sled
//! time        what the time was, until the machine is rebooted      storage::timekeeping
//! snapshots/  the state as one file: a second line, sent to nodes   storage::snapshot
//!             that are far behind; the log is purged up to it only
//! ```
//!
//! A start takes the newer of checkpoint and snapshot and lets openraft apply the log behind it
//! again (`raft::recovery`). Checkpoint and snapshot can be lost and rebuilt while the log reaches
//! back far enough; the log cannot, so a node whose log is damaged refuses to start. Nobody but the
//! node's user may read any of it.
//!
//! # Time
//!
//! Only the stamps in the log make time pass for the state, so all nodes agree on what has
//! expired, and nothing expires while nobody leads. A leader stamps with its monotonic clock,
//! continued from the latest time that anybody is known to have acted on (`raft::clock`): neither
//! a failover nor a step of a wall clock moves it back or makes it leap. It leaps only when a
//! majority had lost count, which takes a stop of the whole cluster: by what was noted before the
//! stop (`raft::timekeeper`), which holds until the machines are rebooted; else to the wall clocks
//! of a majority whose kernels call them synchronised; else not at all, and an operator is asked.
//! What is due is gone for every reader at once; `raft::ticker` proposes a Tick, which removes it
//! in bounded steps.
//!
//! # Retries
//!
//! A request has an id, the time of its first sending and a time at which it expires, at most 60 s
//! later. The record that it changed remembers the last eight of them (`state::retry`), and so
//! does the tombstone that the record leaves for a minute. So [`client`], or a node whose leader
//! went away, sends it again, marked as a resend, and it happens once; where that can no longer be
//! told the answer is `OUTCOME_UNKNOWN`, never a second application.

// In reading order. Their headers say more; a doc comment here would take their links from them.

// Every limit, with its reason.
pub mod limits;

// What is generated from `proto/`.
pub mod proto;

// The only place that reads a clock.
#[cfg(feature = "client")]
pub mod clock;

// How a session is named in secret.
#[cfg(feature = "client")]
mod session_id;

// Which member of a ring serves a key.
#[cfg(feature = "client")]
pub mod placement;

// The core: the session store as a pure, deterministic state machine.
#[cfg(feature = "server")]
pub mod state;

// Bytes on disk, whatever they mean.
#[cfg(feature = "server")]
pub mod storage;

// The shell around openraft: from a command to its place in the log, and back.
#[cfg(feature = "server")]
pub mod raft;

// Use cases, free of any protocol.
#[cfg(feature = "server")]
pub mod service;

// Bytes of the API to and from domain types.
#[cfg(feature = "server")]
pub mod wire;

// Connections that are accepted: how many, and how long they may be silent.
#[cfg(feature = "server")]
pub mod accept;

// A node as a process runs it.
#[cfg(feature = "server")]
pub mod server;

// The client library.
#[cfg(feature = "client")]
pub mod client;

// The command line.
#[cfg(feature = "server")]
pub mod cli;
