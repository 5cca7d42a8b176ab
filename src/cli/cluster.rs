//! `quorate cluster`: forming a cluster, and looking at one.

use std::time::{Duration, SystemTime};

use clap::{Args, Subcommand};
use serde_json::{Value, json};
use tokio::task::JoinSet;

use super::Common;
use super::argument;
use super::failure::Failure;
use super::output::{self, Table, length, length_json, printable, time_json, time_text};
use crate::client::{Client, NewMember};
use crate::proto::v1::{NodeRole, StatusResponse};

/// Longest time that one node may take to tell its state: the others' is worth knowing too.
const STATUS_TIMEOUT_MAX: Duration = Duration::from_secs(3);
/// Characters of a digest that are shown to people.
const DIGEST_CHARS: usize = 12;

/// What can be done with a cluster.
#[derive(Debug, Subcommand)]
pub(crate) enum ClusterCommand {
    /// Form a cluster of nodes that were started without --initial-cluster
    #[command(after_help = "Example:\n  quorate cluster init \
        --members 1=10.0.0.1:7500,2=10.0.0.2:7500,3=10.0.0.3:7500 --endpoints 10.0.0.1:7400")]
    Init(InitArguments),
    /// Print the state of every node
    Status,
    /// Set the cluster's time forward, after a stop of all nodes whose length nobody knows
    #[command(after_help = "Sessions whose deadline lies before the new time end at once; leases \
        do not feel it. Time cannot be\nset back. Without --yes it only says what it would do.\n\n\
        Example:\n  quorate cluster set-time now --yes")]
    SetTime(SetTimeArguments),
}

/// `quorate cluster set-time`.
#[derive(Args, Debug)]
pub(crate) struct SetTimeArguments {
    /// `now`, which is the leader's wall clock, or a time such as 2026-01-31T12:00:00Z
    #[arg(value_name = "TIME", value_parser = parse_time)]
    time: NewTime,
    /// Do it
    #[arg(long)]
    yes: bool,
}

/// What the time is to be.
#[derive(Clone, Copy, Debug)]
enum NewTime {
    /// What the leader's wall clock says.
    Now,
    At(SystemTime),
}

fn parse_time(text: &str) -> Result<NewTime, String> {
    if text == "now" {
        return Ok(NewTime::Now);
    }
    humantime::parse_rfc3339(text)
        .map(NewTime::At)
        .map_err(|_| "write now, or a time in UTC such as 2026-01-31T12:00:00Z".to_owned())
}

/// `quorate cluster init`.
#[derive(Args, Debug)]
pub(crate) struct InitArguments {
    /// The nodes and where they reach each other, as NODE=host:port,…
    #[arg(long, value_name = "MEMBERS", value_parser = Members::parse)]
    members: Members,
}

/// One argument that stands for several members.
#[derive(Clone, Debug)]
struct Members(Vec<NewMember>);

impl Members {
    fn parse(text: &str) -> Result<Self, String> {
        argument::members(text).map(Self)
    }
}

/// Does what the command says.
pub(crate) async fn run(command: ClusterCommand, common: &Common) -> Result<(), Failure> {
    let client = common.client().build()?;
    match command {
        ClusterCommand::Init(arguments) => {
            let cluster_id = client.initialize(arguments.members.0).await?;
            let text = format!("cluster {} formed", printable(&cluster_id));
            common.output().result(&text, &json!({ "cluster_id": cluster_id }))
        }
        ClusterCommand::Status => status(&client, common).await,
        ClusterCommand::SetTime(arguments) => set_time(&client, common, &arguments).await,
    }
}

async fn set_time(
    client: &Client,
    common: &Common,
    arguments: &SetTimeArguments,
) -> Result<(), Failure> {
    let leader = client.describe().await?.leader_address;
    if leader.is_empty() {
        let message = "no node leads; see `quorate cluster status`";
        return Err(Failure::Unavailable(message.to_owned()));
    }
    let at = match arguments.time {
        NewTime::Now => None,
        NewTime::At(time) => Some(time),
    };
    if !arguments.yes {
        let is = clock(&client.status(&leader).await?);
        return Err(Failure::Usage(preview(is, at)));
    }
    let set = client.set_time(&leader, at).await?;
    let leap = proto_length(set.leap).unwrap_or_default();
    let now = set.cluster_time.and_then(|time| SystemTime::try_from(time).ok());
    let text = if leap.is_zero() {
        "cluster time is later already, and stays as it is".to_owned()
    } else {
        let now = now.map_or_else(|| "-".to_owned(), time_text);
        format!("time leapt by {}; it is {now}", length(leap))
    };
    let object = json!({ "leap": length_json(Some(leap)), "cluster_time": time_json(now) });
    common.output().result(&text, &object)
}

/// What setting the time would do.
fn preview(is: Option<SystemTime>, at: Option<SystemTime>) -> String {
    let new = at.map_or_else(|| "the leader's wall clock".to_owned(), time_text);
    let leap = is.zip(at).map(|(is, at)| at.duration_since(is));
    let is = is.map_or_else(|| "not known".to_owned(), time_text);
    match leap {
        Some(Err(_)) => {
            format!("cluster time is {is}, later than {new} already, and never goes back")
        }
        leap => {
            let by = leap
                .and_then(Result::ok)
                .map_or_else(String::new, |leap| format!(" by {}", length(leap)));
            format!(
                "cluster time is {is} and would leap{by} to {new}; sessions whose deadline lies \
                 before that end at once, and it cannot be undone: repeat it with --yes"
            )
        }
    }
}

/// One node, as it was found.
struct Node {
    /// From the membership; 0 where that is not known.
    node_id: u64,
    address: String,
    status: Result<StatusResponse, String>,
}

async fn status(client: &Client, common: &Common) -> Result<(), Failure> {
    let client = client.with_timeout(common.timeout.min(STATUS_TIMEOUT_MAX));
    let nodes = find_nodes(&client).await;
    let mut table = Table::new(
        &[
            "NODE",
            "ADDRESS",
            "ROLE",
            "TERM",
            "LEADER",
            "APPLIED",
            "COMMITTED",
            "LAG",
            "FSYNC P99",
            "CLOCK",
            "LEVEL",
            "REVISION",
            "DIGEST",
        ],
        &[0, 3, 4, 5, 6, 7, 8, 10, 11],
    );
    for node in &nodes {
        table.row(node.row());
    }
    let objects: Vec<Value> = nodes.iter().map(Node::json).collect();
    common.output().list(&table, &objects)?;
    for node in &nodes {
        match &node.status {
            Err(why) => output::message(&format!("quorate: {}", printable(why))),
            Ok(status) if !status.halted_reason.is_empty() => {
                let reason = printable(&status.halted_reason);
                output::message(&format!("quorate: node {} has halted: {reason}", node.node_id));
            }
            Ok(status) if !status.feature_level_obstacle.is_empty() => {
                output::message(&format!("quorate: {}", held_back(status)));
            }
            Ok(_) => {}
        }
        for warning in node.status.iter().flat_map(|status| &status.warnings) {
            output::message(&format!("quorate: node {}: {}", node.node_id, printable(warning)));
        }
    }
    if nodes.iter().all(|node| node.status.is_err()) {
        let message = "no node answers; is it running, and is --endpoints right?";
        return Err(Failure::Unavailable(message.to_owned()));
    }
    if let Some(message) = strangers(&nodes).or_else(|| disagreement(&nodes)) {
        return Err(Failure::Failed(message));
    }
    match lost_majority(&nodes) {
        Some(message) => Err(Failure::Unavailable(message)),
        None => Ok(()),
    }
}

/// Asks the endpoints, and then every member that has not answered at one of them where it says
/// that clients reach it: it may be wrong, or true elsewhere only.
async fn find_nodes(client: &Client) -> Vec<Node> {
    let endpoints = client.endpoints().into_iter().map(|address| (0, address));
    let mut nodes = ask(client, endpoints.collect()).await;
    let answers = nodes.iter().filter_map(|node| node.status.as_ref().ok());
    let members = answers.map(|status| &status.members).max_by_key(|members| members.len());
    let members = members.cloned().unwrap_or_default();
    let mut missing = Vec::new();
    for member in &members {
        if nodes.iter().any(|node| node.node_id == member.node_id) {
            continue;
        }
        match nodes.iter_mut().find(|node| node.address == member.client_address) {
            Some(silent) => silent.node_id = member.node_id,
            None => missing.push((member.node_id, member.client_address.clone())),
        }
    }
    nodes.extend(ask(client, missing).await);
    merged(nodes)
}

/// Asks all of them at once.
async fn ask(client: &Client, asked: Vec<(u64, String)>) -> Vec<Node> {
    let mut asking = JoinSet::new();
    for (node_id, address) in asked {
        let client = client.clone();
        asking.spawn(async move {
            let status = if address.is_empty() {
                Err(format!("the client address of node {node_id} is not known yet"))
            } else {
                client.status(&address).await.map_err(|error| error.to_string())
            };
            let node_id = status.as_ref().map_or(node_id, |status| status.node_id);
            Node { node_id, address, status }
        });
    }
    asking.join_all().await
}

/// Each node once, though it may have answered at several addresses.
fn merged(mut nodes: Vec<Node>) -> Vec<Node> {
    nodes.sort_by(|a, b| (a.node_id, &a.address).cmp(&(b.node_id, &b.address)));
    nodes.dedup_by(|node, first| match (&node.status, &first.status) {
        (Ok(status), Ok(other)) => {
            (status.node_id, &status.cluster_id) == (other.node_id, &other.cluster_id)
        }
        _ => false,
    });
    nodes
}

impl Node {
    fn row(&self) -> Vec<String> {
        let number = if self.node_id == 0 { "?".to_owned() } else { self.node_id.to_string() };
        let mut row = vec![number, printable(&self.address)];
        match &self.status {
            Err(_) => row.push("unreachable".to_owned()),
            Ok(status) => row.extend([
                role(status).to_owned(),
                status.term.to_string(),
                if status.leader_id == 0 { "-".into() } else { status.leader_id.to_string() },
                status.applied_index.to_string(),
                status.committed_index.to_string(),
                status.checkpoint_lag_entries.to_string(),
                fsync_p99(status).map_or_else(|| "-".to_owned(), length),
                clock(status).map_or_else(|| "-".to_owned(), time_text),
                level(status).map_or_else(|| "-".to_owned(), |level| level.to_string()),
                status.revision.to_string(),
                printable(&status.state_digest).chars().take(DIGEST_CHARS).collect(),
            ]),
        }
        row
    }

    fn json(&self) -> Value {
        let status = match &self.status {
            Ok(status) => status,
            Err(why) => {
                return json!({
                    "node_id": self.node_id,
                    "client_address": self.address,
                    "role": "unreachable",
                    "error": why,
                });
            }
        };
        let members = status.members.iter().map(|member| {
            json!({
                "node_id": member.node_id,
                "peer_address": member.peer_address,
                "client_address": member.client_address,
                "incarnation": member.incarnation,
                "voter": member.voter,
            })
        });
        json!({
            "node_id": status.node_id,
            "client_address": self.address,
            "cluster_id": status.cluster_id,
            "role": role(status),
            "term": status.term,
            "leader_id": status.leader_id,
            "last_log_index": status.last_log_index,
            "committed_index": status.committed_index,
            "applied_index": status.applied_index,
            "snapshot_index": status.snapshot_index,
            "purged_index": status.purged_index,
            "revision": status.revision,
            "state_digest": status.state_digest,
            "cluster_time": time_json(clock(status)),
            "sessions": status.sessions,
            "checkpoint_lag_entries": status.checkpoint_lag_entries,
            "checkpoint_lag_bytes": status.checkpoint_lag_bytes,
            "checkpoint_age": length_json(proto_length(status.checkpoint_age)),
            "fsync_p99": length_json(fsync_p99(status)),
            "resident_bytes": status.resident_bytes,
            "version": status.version,
            "members": members.collect::<Vec<Value>>(),
            "feature_level": level(status),
            "supported_feature_level": supported_level(status),
            "feature_level_obstacle": status.feature_level_obstacle,
            "halted_reason": status.halted_reason,
            "warnings": status.warnings,
            "client_connections": status.client_connections,
            "refused_connections": status.refused_connections,
            "stuck_connections": status.stuck_connections,
            "answer_bytes": status.answer_bytes,
            "request_panics": status.request_panics,
        })
    }
}

fn role(status: &StatusResponse) -> &'static str {
    if !status.halted_reason.is_empty() {
        return "halted";
    }
    match status.role() {
        NodeRole::Leader => "leader",
        NodeRole::Follower => "follower",
        NodeRole::Candidate => "candidate",
        NodeRole::Learner => "learner",
        NodeRole::Uninitialized => "uninitialized",
        NodeRole::Unspecified => "unknown",
    }
}

/// The feature level in force; none from a node whose version does not say, or outside a cluster.
fn level(status: &StatusResponse) -> Option<u32> {
    Some(status.feature_level).filter(|level| *level > 0)
}

fn supported_level(status: &StatusResponse) -> Option<u32> {
    Some(status.supported_feature_level).filter(|level| *level > 0)
}

/// Why the leader does not raise the level.
fn held_back(status: &StatusResponse) -> String {
    format!(
        "the cluster stays at feature level {}, and node {} knows {}: {}",
        status.feature_level,
        status.node_id,
        status.supported_feature_level,
        printable(&status.feature_level_obstacle)
    )
}

fn fsync_p99(status: &StatusResponse) -> Option<Duration> {
    proto_length(status.fsync_p99)
}

fn proto_length(length: Option<prost_types::Duration>) -> Option<Duration> {
    length.and_then(|length| length.try_into().ok())
}

fn clock(status: &StatusResponse) -> Option<SystemTime> {
    status.cluster_time.and_then(|time| time.try_into().ok())
}

/// Nodes that belong to different clusters: somebody's address or data directory is wrong.
fn strangers(nodes: &[Node]) -> Option<String> {
    let mut members = nodes
        .iter()
        .filter_map(|node| node.status.as_ref().ok().map(|status| (node, status)))
        .filter(|(_, status)| !status.cluster_id.is_empty());
    let (first, status) = members.next()?;
    let (other, its) = members.find(|(_, other)| other.cluster_id != status.cluster_id)?;
    Some(format!(
        "TWO CLUSTERS: {} belongs to cluster {} and {} to cluster {}; one of them has the wrong \
         data directory or address, stop it before anything is written there",
        printable(&first.address),
        printable(&status.cluster_id),
        printable(&other.address),
        printable(&its.cluster_id),
    ))
}

/// Whether the voters that answer and follow one leader are too few.
fn lost_majority(nodes: &[Node]) -> Option<String> {
    let answers: Vec<&StatusResponse> =
        nodes.iter().filter_map(|node| node.status.as_ref().ok()).collect();
    let members = answers.iter().map(|status| &status.members).max_by_key(|it| it.len())?;
    let voters = members.iter().filter(|member| member.voter).count();
    if voters == 0 {
        return Some("no cluster yet: form it with `quorate cluster init`".to_owned());
    }
    let well = |status: &&&StatusResponse| {
        status.leader_id != 0
            && status.halted_reason.is_empty()
            && members.iter().any(|member| member.voter && member.node_id == status.node_id)
    };
    let well = answers.iter().filter(well).count();
    (2 * well <= voters)
        .then(|| format!("no majority: {well} of {voters} voters answer and have a leader"))
}

/// Nodes at one revision must have one state. When they have not, replication is broken and
/// nothing else matters.
fn disagreement(nodes: &[Node]) -> Option<String> {
    let states: Vec<&StatusResponse> = nodes
        .iter()
        .filter_map(|node| node.status.as_ref().ok())
        .filter(|status| !status.state_digest.is_empty() && !status.cluster_id.is_empty())
        .collect();
    for (index, first) in states.iter().enumerate() {
        let differs = |other: &&&StatusResponse| {
            other.cluster_id == first.cluster_id
                && other.revision == first.revision
                && other.state_digest != first.state_digest
        };
        if let Some(other) = states[index + 1..].iter().find(differs) {
            return Some(format!(
                "NODES DISAGREE: at revision {} node {} has state {} and node {} has state {}; \
                 stop writing, keep both data directories and report it",
                first.revision,
                first.node_id,
                printable(&first.state_digest),
                other.node_id,
                printable(&other.state_digest),
            ));
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(node_id: u64, revision: u64, digest: &str) -> Node {
        let status = StatusResponse {
            cluster_id: "c".into(),
            node_id,
            revision,
            state_digest: digest.to_owned(),
            ..Default::default()
        };
        Node { node_id, address: format!("127.0.0.1:740{node_id}"), status: Ok(status) }
    }

    #[test]
    fn what_setting_the_time_would_do_is_said_before() {
        let time = |seconds| Some(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds));
        assert!(preview(time(1_000), time(1_060)).contains("would leap by 1m to 1970-01-01T00:17"));
        assert!(preview(time(1_000), None).contains("would leap to the leader's wall clock"));
        assert!(preview(time(1_000), time(999)).contains("never goes back"));
        assert!(preview(None, time(999)).contains("cluster time is not known"));
    }

    #[test]
    fn nodes_of_one_revision_must_agree() {
        assert_eq!(disagreement(&[node(1, 5, "aa"), node(2, 5, "aa"), node(3, 4, "bb")]), None);
        let unreachable = Node { node_id: 3, address: "a:1".into(), status: Err("refused".into()) };
        let nodes = [node(1, 5, "aa"), unreachable, node(2, 5, "bb")];
        let message = disagreement(&nodes).unwrap();
        assert!(message.contains("node 1 has state aa and node 2 has state bb"), "{message}");
    }

    #[test]
    fn a_node_of_another_cluster_is_told_apart() {
        let mut other = node(3, 9, "cc");
        assert_eq!(strangers(&[node(1, 5, "aa"), node(2, 5, "aa"), node(3, 9, "cc")]), None);
        if let Ok(status) = &mut other.status {
            status.cluster_id = "d".into();
        }
        let message = strangers(&[node(1, 5, "aa"), other]).unwrap();
        assert!(message.contains("127.0.0.1:7401 belongs to cluster c and 127.0.0.1:7403"));
    }

    #[test]
    fn fewer_voters_than_a_majority_are_a_failure() {
        let members: Vec<crate::proto::v1::Member> = (1..=3)
            .map(|node_id| crate::proto::v1::Member { node_id, voter: true, ..Default::default() })
            .collect();
        let with_leader = |node_id, leader_id| {
            let mut node = node(node_id, 5, "aa");
            if let Ok(status) = &mut node.status {
                status.members = members.clone();
                status.leader_id = leader_id;
            }
            node
        };
        let gone = || Node { node_id: 3, address: "a:1".into(), status: Err("refused".into()) };
        assert_eq!(lost_majority(&[with_leader(1, 1), with_leader(2, 1), gone()]), None);
        let message = lost_majority(&[with_leader(1, 0), with_leader(2, 1), gone()]).unwrap();
        assert!(message.contains("1 of 3 voters"), "{message}");
        assert!(lost_majority(&[node(1, 0, "")]).unwrap().contains("cluster init"));
    }

    #[test]
    fn a_node_that_answers_at_two_addresses_is_one() {
        let at =
            |address: &str, node_id| Node { address: address.into(), ..node(node_id, 5, "aa") };
        let mut stranger = at("d:1", 2);
        if let Ok(status) = &mut stranger.status {
            status.cluster_id = "other".into();
        }
        let silent = Node { node_id: 2, address: "e:1".into(), status: Err("refused".into()) };
        let nodes = merged(vec![at("c:1", 2), at("a:1", 2), at("b:1", 1), stranger, silent]);
        let addresses: Vec<&str> = nodes.iter().map(|node| &*node.address).collect();
        assert_eq!(addresses, ["b:1", "a:1", "d:1", "e:1"]);
    }

    #[test]
    fn a_node_that_does_not_answer_has_its_row() {
        let node = Node { node_id: 2, address: "a:1".into(), status: Err("refused".into()) };
        assert_eq!(node.row(), ["2", "a:1", "unreachable"]);
        assert_eq!(node.json()["role"], "unreachable");
    }

    #[test]
    fn a_level_that_is_held_back_is_explained() {
        let mut node = node(1, 5, "aa");
        let Ok(status) = &mut node.status else { panic!() };
        // A version that does not say.
        assert_eq!((level(status), supported_level(status)), (None, None));
        status.feature_level = 2;
        status.supported_feature_level = 3;
        status.feature_level_obstacle = "not heard from 3".into();
        let message = held_back(status);
        assert!(message.contains("level 2, and node 1 knows 3: not heard from 3"), "{message}");
        assert_eq!(node.row()[10], "2");
        assert_eq!(node.json()["feature_level"], 2);
        assert_eq!(node.json()["feature_level_obstacle"], "not heard from 3");
    }

    #[test]
    fn times_that_make_no_sense_are_left_out() {
        let status = StatusResponse {
            cluster_time: Some(prost_types::Timestamp { seconds: i64::MIN, nanos: -1 }),
            fsync_p99: Some(prost_types::Duration { seconds: -1, nanos: 0 }),
            ..Default::default()
        };
        let node = Node { node_id: 1, address: "a:1".into(), status: Ok(status) };
        assert_eq!(node.row().len(), 13);
        assert_eq!(node.json()["fsync_p99"], Value::Null);
    }
}
