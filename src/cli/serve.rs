//! `quorate serve` and `quorate dev`: running nodes.
//!
//! Every option of `serve` can be a flag, a variable `QUORATE_…` or a key of a TOML file; the
//! first of these that names it wins. What comes out is a [`ServeOptions`], complete and checked,
//! for the node to be built from.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use clap::builder::BoolishValueParser;
use serde::Deserialize;

use super::argument;
use super::failure::Failure;
pub use super::logging::LogFormat;
use super::logging::{self, LineQueue, Logging};
use super::run;
use crate::client::NewMember;

const LISTEN_DEFAULT: &str = "127.0.0.1:7400";
const PEER_LISTEN_DEFAULT: &str = "127.0.0.1:7500";
const LOG_DEFAULT: &str = "info";
const HEARTBEAT_INTERVAL_DEFAULT: Duration = Duration::from_millis(100);
const ELECTION_TIMEOUT_DEFAULT: Duration = Duration::from_millis(500);
/// Below this a heartbeat costs more than it tells.
const HEARTBEAT_INTERVAL_MIN: Duration = Duration::from_millis(10);
/// Heartbeats that must fit into an election timeout, lest one that is late topple the leader.
const HEARTBEATS_IN_ELECTION_TIMEOUT_MIN: u32 = 3;
const ELECTION_TIMEOUT_MAX: Duration = Duration::from_secs(60);
const CONFIG_BYTES_MAX: u64 = 1024 * 1024;

/// What a node is run with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServeOptions {
    /// Its number in the cluster; not 0.
    pub node_id: u64,
    /// Where it keeps everything.
    pub data_dir: PathBuf,
    /// Where it listens for clients.
    pub listen: SocketAddr,
    /// Where it listens for other nodes.
    pub peer_listen: SocketAddr,
    /// `host:port` where clients reach it.
    pub advertise: String,
    /// `host:port` where other nodes reach it.
    pub peer_advertise: String,
    /// The cluster to form, this node included; empty to wait for `quorate cluster init`.
    pub initial_cluster: Vec<NewMember>,
    /// How often the leader says that it is there.
    pub heartbeat_interval: Duration,
    /// How long a follower hears nothing before it stands for election; the node spreads it.
    pub election_timeout: Duration,
    /// How log lines look.
    pub log_format: LogFormat,
    /// Which log lines there are: a level of Quorate's own, or filters as `RUST_LOG` has them.
    pub log: String,
}

/// `quorate serve`, as given: what is missing may be in the file.
#[derive(Args, Debug, Default)]
#[command(after_help = "Every option may also be a variable (QUORATE_NODE_ID=1) or a key of the \
    --config file (node-id = 1).\n\nExample:\n  \
    quorate serve --node-id 1 --data-dir /var/lib/quorate \\\n    \
    --initial-cluster 1=127.0.0.1:7500,2=127.0.0.1:7501,3=127.0.0.1:7502")]
pub(crate) struct ServeArguments {
    /// Number of this node in the cluster
    #[arg(long, env = "QUORATE_NODE_ID", value_name = "NUMBER")]
    node_id: Option<u64>,
    /// Where to keep everything
    #[arg(long, env = "QUORATE_DATA_DIR", value_name = "DIRECTORY")]
    data_dir: Option<PathBuf>,
    /// Where to listen for clients [default: 127.0.0.1:7400]
    #[arg(long, env = "QUORATE_LISTEN", value_name = "IP:PORT")]
    listen: Option<String>,
    /// Where to listen for other nodes [default: 127.0.0.1:7500]
    #[arg(long, env = "QUORATE_PEER_LISTEN", value_name = "IP:PORT")]
    peer_listen: Option<String>,
    /// Where clients reach this node [default: as --listen]
    #[arg(long, env = "QUORATE_ADVERTISE", value_name = "HOST:PORT")]
    advertise: Option<String>,
    /// Where other nodes reach this node [default: as --peer-listen]
    #[arg(long, env = "QUORATE_PEER_ADVERTISE", value_name = "HOST:PORT")]
    peer_advertise: Option<String>,
    /// All nodes of a cluster that forms itself, as NODE=HOST:PORT,…; without it the node waits
    /// for `quorate cluster init`
    #[arg(long, env = "QUORATE_INITIAL_CLUSTER", value_name = "MEMBERS")]
    initial_cluster: Option<String>,
    /// Listen beyond this machine, though there is no TLS yet
    #[arg(long, env = "QUORATE_INSECURE", num_args = 0..=1, default_missing_value = "true")]
    #[arg(require_equals = true, value_name = "BOOL", value_parser = BoolishValueParser::new())]
    insecure: Option<bool>,
    /// How often the leader says that it is there [default: 100ms]
    #[arg(long, env = "QUORATE_HEARTBEAT_INTERVAL", value_name = "TIME")]
    heartbeat_interval: Option<String>,
    /// How long a silent leader is borne [default: 500ms]
    #[arg(long, env = "QUORATE_ELECTION_TIMEOUT", value_name = "TIME")]
    election_timeout: Option<String>,
    /// How log lines look [default: text]
    #[arg(long, env = "QUORATE_LOG_FORMAT", value_enum, value_name = "FORMAT")]
    log_format: Option<LogFormat>,
    /// Which log lines there are: a level, or filters such as info,openraft=debug [default: info]
    #[arg(long, env = "QUORATE_LOG", value_name = "FILTER")]
    log: Option<String>,
    /// A TOML file with options
    #[arg(long, env = "QUORATE_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
}

/// The same in a file. A key that is not known is an error: it was meant to do something.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct ConfigFile {
    node_id: Option<u64>,
    data_dir: Option<PathBuf>,
    listen: Option<String>,
    peer_listen: Option<String>,
    advertise: Option<String>,
    peer_advertise: Option<String>,
    initial_cluster: Option<ConfigMembers>,
    insecure: Option<bool>,
    heartbeat_interval: Option<String>,
    election_timeout: Option<String>,
    log_format: Option<LogFormat>,
    log: Option<String>,
}

/// `"1=a:7500,2=b:7500"` or `["1=a:7500", "2=b:7500"]`.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum ConfigMembers {
    Text(String),
    List(Vec<String>),
}

impl ConfigMembers {
    fn into_text(self) -> String {
        match self {
            Self::Text(text) => text,
            Self::List(list) => list.join(","),
        }
    }
}

impl ServeArguments {
    /// The options, from wherever they were given, checked.
    pub(crate) fn into_options(self) -> Result<ServeOptions, Failure> {
        let file = match &self.config {
            Some(path) => read_config(path)?,
            None => ConfigFile::default(),
        };
        let usage = |option: &str, error: &str| Failure::Usage(format!("--{option}: {error}"));
        let node_id = self
            .node_id
            .or(file.node_id)
            .ok_or_else(|| usage("node-id", "which number does this node have?"))?;
        if node_id == 0 {
            return Err(usage("node-id", "must not be 0"));
        }
        let data_dir = self
            .data_dir
            .or(file.data_dir)
            .filter(|path| !path.as_os_str().is_empty())
            .ok_or_else(|| usage("data-dir", "where is everything to be kept?"))?;
        let insecure = self.insecure.or(file.insecure).unwrap_or(false);
        let listening = |option: &str, given: Option<String>, default: &str| {
            let address = argument::socket_address(given.as_deref().unwrap_or(default))
                .map_err(|error| usage(option, &error))?;
            if !address.ip().is_loopback() && !insecure {
                let error = "there is no TLS yet; beyond this machine it needs --insecure and a \
                             network that you trust";
                return Err(usage(option, error));
            }
            Ok(address)
        };
        let listen = listening("listen", self.listen.or(file.listen), LISTEN_DEFAULT)?;
        let peer_listen = self.peer_listen.or(file.peer_listen);
        let peer_listen = listening("peer-listen", peer_listen, PEER_LISTEN_DEFAULT)?;
        let advertise = advertised("advertise", self.advertise.or(file.advertise), listen)?;
        let peer_advertise = self.peer_advertise.or(file.peer_advertise);
        let peer_advertise = advertised("peer-advertise", peer_advertise, peer_listen)?;
        let initial_cluster =
            self.initial_cluster.or(file.initial_cluster.map(ConfigMembers::into_text));
        let initial_cluster = match initial_cluster.filter(|text| !text.trim().is_empty()) {
            Some(text) => argument::members(&text).map_err(|e| usage("initial-cluster", &e))?,
            None => Vec::new(),
        };
        check_own_entry(&initial_cluster, node_id, &peer_advertise)?;
        let interval = self.heartbeat_interval.or(file.heartbeat_interval);
        let timeout = self.election_timeout.or(file.election_timeout);
        let (heartbeat_interval, election_timeout) =
            election_times(interval.as_deref(), timeout.as_deref())?;
        Ok(ServeOptions {
            node_id,
            data_dir,
            listen,
            peer_listen,
            advertise,
            peer_advertise,
            initial_cluster,
            heartbeat_interval,
            election_timeout,
            log_format: self.log_format.or(file.log_format).unwrap_or_default(),
            log: self.log.or(file.log).unwrap_or_else(|| LOG_DEFAULT.to_owned()),
        })
    }
}

fn read_config(path: &Path) -> Result<ConfigFile, Failure> {
    let failed = |error: &dyn std::fmt::Display| {
        Failure::Usage(format!("--config {}: {error}", path.display()))
    };
    let size = std::fs::metadata(path).map_err(|error| failed(&error))?.len();
    if size > CONFIG_BYTES_MAX {
        return Err(failed(&format!("is larger than {CONFIG_BYTES_MAX} bytes")));
    }
    let text = std::fs::read_to_string(path).map_err(|error| failed(&error))?;
    toml::from_str(&text).map_err(|error| {
        // The parser draws pictures; a message is one line.
        let line = error.span().map(|span| text[..span.start].matches('\n').count() + 1);
        let place = line.map_or_else(String::new, |line| format!(" in line {line}"));
        let message = error.message().replace('\n', " ");
        failed(&format!("{message}{place}"))
    })
}

/// Where others find what listens at `listen`.
fn advertised(option: &str, given: Option<String>, listen: SocketAddr) -> Result<String, Failure> {
    match given {
        Some(address) => argument::address(&address)
            .map_err(|error| Failure::Usage(format!("--{option}: {error}"))),
        None if listen.ip().is_unspecified() => Err(Failure::Usage(format!(
            "--{option}: {listen} is every address of this machine; which one do others use?"
        ))),
        None => Ok(listen.to_string()),
    }
}

fn check_own_entry(
    members: &[NewMember],
    node_id: u64,
    peer_advertise: &str,
) -> Result<(), Failure> {
    if members.is_empty() {
        return Ok(());
    }
    let usage = |error: String| Err(Failure::Usage(format!("--initial-cluster: {error}")));
    match members.iter().find(|member| member.node_id == node_id) {
        None => usage(format!("node {node_id}, which is this one, is not listed")),
        Some(own) if own.peer_address != peer_advertise => usage(format!(
            "lists this node at {}, but others are to reach it at {peer_advertise} \
             (--peer-advertise)",
            own.peer_address
        )),
        Some(_) => Ok(()),
    }
}

fn election_times(
    interval: Option<&str>,
    timeout: Option<&str>,
) -> Result<(Duration, Duration), Failure> {
    let usage = |option: &str, error: String| Failure::Usage(format!("--{option}: {error}"));
    let parse = |option: &str, text: Option<&str>, default: Duration| match text {
        Some(text) => argument::duration(text).map_err(|error| usage(option, error)),
        None => Ok(default),
    };
    let interval = parse("heartbeat-interval", interval, HEARTBEAT_INTERVAL_DEFAULT)?;
    let timeout = parse("election-timeout", timeout, ELECTION_TIMEOUT_DEFAULT)?;
    if interval < HEARTBEAT_INTERVAL_MIN {
        let error = format!("must be at least {HEARTBEAT_INTERVAL_MIN:?}");
        return Err(usage("heartbeat-interval", error));
    }
    if timeout > ELECTION_TIMEOUT_MAX {
        let error = format!("must be at most {ELECTION_TIMEOUT_MAX:?}");
        return Err(usage("election-timeout", error));
    }
    if timeout < interval.saturating_mul(HEARTBEATS_IN_ELECTION_TIMEOUT_MIN) {
        let error = format!(
            "must be at least {HEARTBEATS_IN_ELECTION_TIMEOUT_MIN} times the heartbeat interval \
             of {interval:?}"
        );
        return Err(usage("election-timeout", error));
    }
    Ok((interval, timeout))
}

/// `quorate dev`.
#[derive(Args, Debug)]
#[command(
    after_help = "The nodes listen on 127.0.0.1:7400, 7401 and 7402 (for each other on 7500 \
    to 7502). Ctrl-C stops them."
)]
pub(crate) struct DevArguments {
    /// Keep everything here, for the next time [default: nothing is kept]
    #[arg(long, value_name = "DIRECTORY")]
    data_dir: Option<PathBuf>,
    /// Which log lines there are: a level, or filters such as info,openraft=debug
    #[arg(long, env = "QUORATE_LOG", value_name = "FILTER", default_value = "warn")]
    log: String,
}

impl DevArguments {
    /// The options of the three nodes, under `data_dir`.
    fn into_options(self, data_dir: &Path) -> Vec<ServeOptions> {
        let address = |port| SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port);
        let ports = [(1, 7400, 7500), (2, 7401, 7501), (3, 7402, 7502)];
        let initial_cluster = ports.map(|(node_id, _, peer)| NewMember {
            node_id,
            peer_address: address(peer).to_string(),
        });
        let node = |(node_id, client, peer)| ServeOptions {
            node_id,
            data_dir: data_dir.join(format!("node-{node_id}")),
            listen: address(client),
            peer_listen: address(peer),
            advertise: address(client).to_string(),
            peer_advertise: address(peer).to_string(),
            initial_cluster: initial_cluster.to_vec(),
            heartbeat_interval: HEARTBEAT_INTERVAL_DEFAULT,
            election_timeout: ELECTION_TIMEOUT_DEFAULT,
            log_format: LogFormat::Text,
            log: self.log.clone(),
        };
        ports.map(node).to_vec()
    }
}

/// Runs one node until it is told to stop.
pub(crate) fn serve(arguments: ServeArguments) -> Result<ExitCode, Failure> {
    let options = arguments.into_options()?;
    let logging = Logging::start(&options.log, options.log_format)?;
    logging::log_panics();
    Ok(run::run(vec![options], &logging, || {}))
}

/// Runs three nodes until they are told to stop.
pub(crate) fn dev(mut arguments: DevArguments) -> Result<ExitCode, Failure> {
    let logging = Logging::start(&arguments.log, LogFormat::Text)?;
    logging::log_panics();
    let out = LineQueue::start(std::io::stdout().as_fd(), |_| {})?;
    let Some(data_dir) = arguments.data_dir.take() else {
        let directory = tempfile::Builder::new()
            .prefix("quorate-dev-")
            .tempdir()
            .map_err(|error| Failure::Failed(format!("no temporary directory: {error}")))?;
        // The directory goes when this function returns, whatever the nodes came to.
        let nodes = arguments.into_options(directory.path());
        let announce = || out.say(&announcement(directory.path(), false));
        return Ok(run::run(nodes, &logging, announce));
    };
    let nodes = arguments.into_options(&data_dir);
    Ok(run::run(nodes, &logging, || out.say(&announcement(&data_dir, true))))
}

/// What `quorate dev` says when its nodes serve.
fn announcement(data_dir: &Path, kept: bool) -> String {
    let data = if kept { "kept" } else { "removed at the end" };
    format!(
        "Quorate is ready: three nodes on 127.0.0.1:7400, 127.0.0.1:7401 and 127.0.0.1:7402\n\
         Data in {} ({data}). Ctrl-C stops it. In another terminal:\n\n  \
         quorate session create --principal alice theme=dark\n  \
         quorate session list\n  \
         quorate cluster status\n  \
         quorate bench --work update --clients 64 --duration 5s",
        data_dir.display()
    )
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    fn arguments() -> ServeArguments {
        ServeArguments { node_id: Some(1), data_dir: Some("d".into()), ..ServeArguments::default() }
    }

    fn error(arguments: ServeArguments) -> String {
        match arguments.into_options() {
            Err(Failure::Usage(message)) => message,
            other => panic!("{other:?}"),
        }
    }

    fn config(text: &str) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(text.as_bytes()).unwrap();
        file
    }

    #[test]
    fn defaults_suit_one_machine() {
        let options = arguments().into_options().unwrap();
        assert_eq!(options.listen.to_string(), "127.0.0.1:7400");
        assert_eq!(options.advertise, "127.0.0.1:7400");
        assert_eq!(options.peer_advertise, "127.0.0.1:7500");
        assert_eq!(options.heartbeat_interval, Duration::from_millis(100));
        assert_eq!(options.election_timeout, Duration::from_millis(500));
        assert!(options.initial_cluster.is_empty());
        assert_eq!(options.log, LOG_DEFAULT);
    }

    #[test]
    fn what_is_needed_is_asked_for() {
        assert!(error(ServeArguments { node_id: None, ..arguments() }).contains("--node-id"));
        assert!(error(ServeArguments { node_id: Some(0), ..arguments() }).contains("--node-id"));
        assert!(error(ServeArguments { data_dir: None, ..arguments() }).contains("--data-dir"));
    }

    #[test]
    fn beyond_loopback_it_must_be_insecure_on_purpose() {
        let open = || ServeArguments { listen: Some("10.0.0.1:7400".into()), ..arguments() };
        assert!(error(open()).contains("--insecure"));
        let insecure = ServeArguments { insecure: Some(true), ..open() };
        assert_eq!(insecure.into_options().unwrap().advertise, "10.0.0.1:7400");

        let any = || ServeArguments {
            listen: Some("0.0.0.0:7400".into()),
            insecure: Some(true),
            ..arguments()
        };
        assert!(error(any()).contains("--advertise"));
        let advertised = ServeArguments { advertise: Some("node-1:7400".into()), ..any() };
        assert_eq!(advertised.into_options().unwrap().advertise, "node-1:7400");
    }

    #[test]
    fn a_cluster_must_list_this_node_where_it_is() {
        let listed =
            |members: &str| ServeArguments { initial_cluster: Some(members.into()), ..arguments() };
        let options = listed("1=127.0.0.1:7500,2=127.0.0.1:7501").into_options().unwrap();
        assert_eq!(options.initial_cluster.len(), 2);
        assert!(error(listed("2=127.0.0.1:7501")).contains("not listed"));
        assert!(error(listed("1=127.0.0.1:9999")).contains("127.0.0.1:7500"));
        assert!(error(listed("1")).contains("--initial-cluster"));
    }

    #[test]
    fn elections_leave_room_for_heartbeats() {
        let times = |interval: &str, timeout: &str| ServeArguments {
            heartbeat_interval: Some(interval.into()),
            election_timeout: Some(timeout.into()),
            ..arguments()
        };
        assert!(times("50ms", "150ms").into_options().is_ok());
        assert!(error(times("50ms", "149ms")).contains("--election-timeout"));
        assert!(error(times("1ms", "500ms")).contains("--heartbeat-interval"));
        assert!(error(times("soon", "500ms")).contains("--heartbeat-interval"));
        assert!(error(times("1s", "1h")).contains("--election-timeout"));
    }

    #[test]
    fn flags_come_before_the_file() {
        let file = config(
            "node-id = 7\ndata-dir = \"/data\"\nlisten = \"127.0.0.1:1\"\n\
             initial-cluster = [\"1=127.0.0.1:7500\", \"2=b:7500\"]\nlog-format = \"json\"\n",
        );
        let arguments = ServeArguments {
            node_id: Some(1),
            config: Some(file.path().into()),
            ..ServeArguments::default()
        };
        let options = arguments.into_options().unwrap();
        assert_eq!(options.node_id, 1);
        assert_eq!(options.data_dir, Path::new("/data"));
        assert_eq!(options.listen.port(), 1);
        assert_eq!(options.initial_cluster[1].peer_address, "b:7500");
        assert_eq!(options.log_format, LogFormat::Json);
    }

    #[test]
    fn a_file_that_says_something_unknown_is_refused() {
        let message = |text: &str| {
            let file = config(text);
            error(ServeArguments { config: Some(file.path().into()), ..arguments() })
        };
        let unknown = message("log = \"info\"\nlissten = \"127.0.0.1:1\"\n");
        assert!(unknown.contains("lissten") && unknown.contains("line 2"), "{unknown}");
        assert!(!unknown.contains('\n'), "{unknown}");
        assert!(message("node-id = \"x\"\n").contains("--config"));
        assert!(message("[[[").contains("--config"));
        let missing = ServeArguments { config: Some("/no/such/file".into()), ..arguments() };
        assert!(error(missing).contains("/no/such/file"));
    }

    #[test]
    fn dev_is_three_nodes_that_know_each_other() {
        let arguments = DevArguments { data_dir: None, log: "warn".into() };
        let nodes = arguments.into_options(Path::new("d"));
        assert_eq!(nodes.len(), 3);
        for (node, number) in nodes.iter().zip(1..) {
            assert_eq!(node.node_id, number);
            assert_eq!(node.data_dir, Path::new("d").join(format!("node-{number}")));
            assert_eq!(node.initial_cluster.len(), 3);
            check_own_entry(&node.initial_cluster, number, &node.peer_advertise).unwrap();
        }
        assert_eq!(nodes[2].listen.to_string(), "127.0.0.1:7402");
    }
}
