//! The command line: one binary for nodes, operators and load.
//!
//! Results go to standard output and messages to standard error. Exit codes: 0, 1 failed, 2 usage,
//! 3 not found, 4 conflict, lost or refused, 75 unavailable or timed out; 128 and the number of the
//! signal that ended what waits.

mod argument;
mod bench;
mod bench_expiry;
mod bench_lease;
mod child;
mod cluster;
mod contender;
mod exec;
mod failure;
mod grammar;
mod lease;
mod ledger;
mod load;
mod lock;
pub mod logging;
mod output;
mod ring;
mod run;
pub mod serve;
mod session;
mod signals;

use std::ffi::OsString;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, CommandFactory as _, FromArgMatches as _, Parser, Subcommand};

use self::failure::Failure;
use self::logging::{LogFormat, Logging};
use self::output::{Format, Output};
use crate::client::{Client, ClientBuilder};

/// A Raft-replicated session store.
#[derive(Debug, Parser)]
#[command(name = "quorate", version, max_term_width = 100, arg_required_else_help = true)]
#[command(after_help = "Try it:\n  \
    quorate dev                                   # a cluster of three, in this terminal\n  \
    id=$(quorate session create theme=dark)       # in another\n  \
    quorate session get \"$id\"")]
struct Cli {
    #[command(flatten)]
    common: Common,
    #[command(subcommand)]
    command: Command,
}

/// What all commands understand.
#[derive(Args, Clone, Debug)]
struct Common {
    /// Where to find the cluster: host:port, several separated by commas
    #[arg(long, global = true, env = "QUORATE_ENDPOINTS", default_value = "127.0.0.1:7400")]
    #[arg(value_delimiter = ',', value_name = "ADDRESS", help_heading = "Global options")]
    endpoints: Vec<String>,
    /// The namespace to work in
    #[arg(long, global = true, env = "QUORATE_NAMESPACE", default_value = "default")]
    #[arg(value_name = "NAME", help_heading = "Global options")]
    namespace: String,
    /// How long a request may take, with all its retries; --wait of a lock comes on top of it
    #[arg(long, global = true, env = "QUORATE_TIMEOUT", default_value = "10s")]
    #[arg(value_parser = argument::positive_duration, value_name = "TIME")]
    #[arg(help_heading = "Global options")]
    timeout: Duration,
    /// Print tables or JSON
    #[arg(long, global = true, env = "QUORATE_OUTPUT", value_enum, default_value_t)]
    #[arg(value_name = "FORMAT", help_heading = "Global options")]
    output: Format,
}

impl Common {
    fn client(&self) -> ClientBuilder {
        Client::builder()
            .endpoints(&self.endpoints)
            .namespace(&self.namespace)
            .timeout(self.timeout)
    }

    fn output(&self) -> Output {
        Output { format: self.output }
    }
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run one node
    Serve(serve::ServeArguments),
    /// Run a cluster of three in one process, to try things out
    Dev(serve::DevArguments),
    /// Form a cluster, or look at one
    #[command(subcommand)]
    Cluster(cluster::ClusterCommand),
    /// Create, read and change sessions
    #[command(subcommand)]
    Session(session::SessionCommand),
    /// Grant, renew and look at leases
    #[command(subcommand)]
    Lease(lease::LeaseCommand),
    /// Take locks, run commands under them, see who has them
    #[command(subcommand)]
    Lock(lock::LockCommand),
    /// Join rings, and see which member serves which key
    #[command(subcommand)]
    Ring(ring::RingCommand),
    /// Measure a running cluster
    Bench(bench::BenchArguments),
}

/// Does what the process's arguments say.
pub fn run() -> ExitCode {
    let words: Vec<OsString> = std::env::args_os().collect();
    let cli = match parse(&words) {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version are such "errors" too. If they cannot be printed, nobody reads.
            let _ = error.print();
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2));
        }
    };
    let Cli { common, command } = cli;
    let result = match command {
        Command::Serve(arguments) => return finish(serve::serve(arguments)),
        Command::Dev(arguments) => return finish(serve::dev(arguments)),
        Command::Cluster(command) => block_on(cluster::run(command, &common)),
        Command::Session(command) => block_on(session::run(command, &common)),
        Command::Lease(command) => block_on(lease::run(command, &common)),
        Command::Ring(command) => block_on(ring::run(command, &common)),
        Command::Lock(command) => return finish(block_on(lock::run(command, &common))),
        Command::Bench(arguments) => block_on(bench::run(arguments, &common)),
    };
    finish(result.map(|()| ExitCode::SUCCESS))
}

fn parse(words: &[OsString]) -> Result<Cli, clap::Error> {
    let mut matches = grammar::matches(Cli::command(), words)?;
    Cli::from_arg_matches_mut(&mut matches)
}

fn finish(result: Result<ExitCode, Failure>) -> ExitCode {
    result.unwrap_or_else(|failure| {
        output::failure(&failure);
        ExitCode::from(&failure)
    })
}

/// Runs a client's command. One thread serves thousands of requests; more would only share cores
/// with the nodes of the same machine.
fn block_on<T>(command: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
    let filter = std::env::var("QUORATE_LOG").unwrap_or_default();
    // Its lines are written at the end.
    let _logging = match filter.trim() {
        "" => None,
        filter => Some(Logging::start(filter, LogFormat::Text)?),
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::Failed(format!("cannot start: {error}")))?;
    runtime.block_on(command)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Cli, clap::Error> {
        let words: Vec<OsString> = line.split_whitespace().map(OsString::from).collect();
        super::parse(&words)
    }

    #[test]
    fn the_grammar_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn global_options_stand_anywhere() {
        let line = "quorate --output json session list --endpoints a:1,b:2 --timeout 2s";
        let common = parse(line).unwrap().common;
        assert_eq!(common.endpoints, ["a:1", "b:2"]);
        assert_eq!(common.timeout, Duration::from_secs(2));
        assert_eq!(common.output, Format::Json);
        assert_eq!(common.namespace, "default");
    }

    #[test]
    fn what_scripts_rely_on_is_understood() {
        for line in [
            "quorate serve --node-id 1 --data-dir d --listen 127.0.0.1:7400 \
             --peer-listen 127.0.0.1:7500 --initial-cluster 1=127.0.0.1:7500,2=b:7500 \
             --advertise a:1 --peer-advertise a:2 --insecure --log-format json --log debug \
             --heartbeat-interval 100ms --election-timeout 500ms --config f",
            "quorate dev",
            "quorate dev --data-dir d",
            "quorate cluster init --members 1=127.0.0.1:7500,2=127.0.0.1:7501",
            "quorate cluster status",
            "quorate session create",
            "quorate session create --id - --principal alice --idle-timeout 30m \
             --absolute-timeout never a=b c=@d",
            "quorate session get 0123456789abcdef --local",
            "quorate session get 0123456789abcdef --local --max-staleness 2s",
            "quorate session get -",
            "quorate session get --handle 0123456789abcdef0123456789abcdef",
            "quorate session set 0123456789abcdef --expect-version 3 --remove a --remove b \
             --principal p --idle-timeout never c=d e=-",
            "quorate session set --handle 0123456789abcdef0123456789abcdef a=b",
            "quorate session set --id - a=b",
            "quorate session touch 0123456789abcdef",
            "quorate session delete --id 0123456789abcdef",
            "quorate session list --principal p --limit 5",
            "quorate session set 0123456789abcdef --fence a:b:7 c=d",
            "quorate session delete 0123456789abcdef --fence a:7",
            "quorate lease grant --ttl 1m --owner me",
            "quorate lease keep-alive --once 0123456789abcdef0123456789abcdef",
            "quorate lease revoke 0123456789abcdef0123456789abcdef",
            "quorate lease show 0123456789abcdef0123456789abcdef --output json",
            "quorate lease list --limit 5",
            "quorate lock exec n --wait 10s --ttl 5s --lock-delay 1s -- sh -c 'exit 3' --shared",
            "quorate lock exec n --permits 3 -- true",
            "quorate lock acquire n --lease 0123456789abcdef0123456789abcdef --shared --wait 1m",
            "quorate lock release n --token 7 --lease 0123456789abcdef0123456789abcdef",
            "quorate lock show n --limit 5",
            "quorate lock list --limit 5",
            "quorate lock break n --token 7 --skip-lock-delay",
            "quorate ring join r m --lease 0123456789abcdef0123456789abcdef --address a:1 \
             --weight 3 zone=east",
            "quorate ring join r m --ttl 15s",
            "quorate ring leave r m --lease 0123456789abcdef0123456789abcdef",
            "quorate ring locate r a b --count 2 --local",
            "quorate ring show r --local --output json",
            "quorate bench --work mixed --unary --clients 64 --duration 10s --value-size 256 \
             --sessions 1000 --connections 4 --timeline --namespace bench",
            "quorate bench --work lock --clients 64",
            "quorate bench --work handover --clients 64",
            "quorate bench --work renew --leases 25000 --ttl 20s --timeline",
            "quorate bench --work expire --leases 100000 --clients 64",
        ] {
            if let Err(error) = parse(line) {
                panic!("{line}\n{error}");
            }
        }
    }

    #[test]
    fn an_id_or_a_name_may_begin_with_a_dash() {
        for line in [
            "quorate session get -123456789abcdef",
            "quorate session get -hV3456789abcdef --local",
            "quorate session get --timeout 2s -h23456789abcdef",
            "quorate session touch -123456789abcdef",
            "quorate session delete -123456789abcdef --fence a:7",
            "quorate session set -123456789abcdef --expect-version 3 a=b",
            "quorate session set -123456789abcdef -- -a=b",
            "quorate session create -- -a=b",
            "quorate lock show -n",
            "quorate lock show -- --limit",
            "quorate lock exec -n -- true -x",
            "quorate lock release -n --token 7",
            "quorate ring leave -r -m",
            "quorate ring show -r",
        ] {
            if let Err(error) = parse(line) {
                panic!("{line}\n{error}");
            }
        }
        let get = parse("quorate session get -123456789abcdef --local").unwrap();
        let get = format!("{get:?}");
        assert!(get.contains("-123456789abcdef") && get.contains("local: true"), "{get}");
    }

    #[test]
    fn a_mistyped_option_is_no_value() {
        for line in [
            "quorate session get --locl",
            "quorate session get -123456789abcdef --locl",
            "quorate session set 0123456789abcdef --expect-versoin=3 a=b",
            "quorate session set -123456789abcdef --expect-versoin=3 a=b",
            "quorate session set --handle 0123456789abcdef0123456789abcdef --limit=3 a=b",
            "quorate session create --prinicpal=alice",
            "quorate lock show --limt",
            "quorate lock acquire --shraed --lease 0123456789abcdef0123456789abcdef",
            "quorate ring locate r k --cuont 3",
            "quorate ring locate r -k",
        ] {
            let error = parse(line).unwrap_err();
            assert_eq!(error.kind(), clap::error::ErrorKind::UnknownArgument, "{line}");
        }
        for line in ["quorate -h", "quorate session get -h", "quorate lock exec --help"] {
            let error = parse(line).unwrap_err();
            assert_eq!(error.kind(), clap::error::ErrorKind::DisplayHelp, "{line}");
        }
    }

    #[test]
    fn a_number_out_of_range_is_refused_with_flag_and_range() {
        for (line, words) in [
            ("quorate lock exec n --permits 0 -- true", ["--permits", "from 1 to 1000000"]),
            ("quorate lock exec n --permits -1 -- true", ["--permits", "from 1 to 1000000"]),
            ("quorate lock exec n --permits 3 --take 0 -- true", ["--take", "from 1 to 1000000"]),
            ("quorate lock release n --token -1", ["--token", "from 1 on"]),
            ("quorate ring join r m --ttl 15s --weight -1", ["--weight", "from 1 to 1000"]),
            ("quorate ring locate r k --count -1", ["--count", "from 1 to 1000"]),
            ("quorate lock exec n --ttl 0s -- true", ["--ttl", "1s to 1d"]),
            ("quorate lease list --limit -1", ["--limit", "from 1 on"]),
            ("quorate bench --clients 99999999999", ["--clients", "from 1 to 100000"]),
            ("quorate bench --sessions 99999999999", ["--sessions", "from 1 to 10000000"]),
        ] {
            let error = parse(line).unwrap_err().to_string();
            assert!(words.iter().all(|word| error.contains(word)), "{line}\n{error}");
        }
        let error = parse("quorate ring join r m").unwrap_err().to_string();
        assert!(error.contains("--lease <ID>|--ttl <TIME>"), "{error}");
    }

    #[test]
    fn what_makes_no_sense_is_a_usage_error() {
        for line in [
            "quorate nonsense",
            "quorate session list --timeout 0s",
            "quorate session list --output yaml",
            "quorate session set 0123456789abcdef --expect-version x",
            "quorate cluster init",
            "quorate cluster init --members 1=a:1,1=b:1",
            "quorate bench --work nothing",
            "quorate bench --clients 0",
            "quorate session set 0123456789abcdef --fence 7 c=d",
            "quorate lease grant --ttl 0s",
            "quorate lease keep-alive",
            "quorate lease show 123",
            "quorate lock exec n",
            "quorate lock exec n true",
            "quorate lock exec n --permits 0 -- true",
            "quorate lock exec n --permits 3 --take 0 -- true",
            "quorate lock exec n --permits -1 -- true",
            "quorate lock exec n --wait 11m -- true",
            "quorate lock exec n --lock-delay 61s -- true",
            "quorate lock exec n --ttl 999ms -- true",
            "quorate lock release n --token -1",
            "quorate lock break n --token 0",
            "quorate lock list --limit 0",
            "quorate lease list --limit 0",
            "quorate session list --limit 0",
            "quorate lock show n --limit 1001",
            "quorate lock exec n --shared --permits 3 -- true",
            "quorate lock acquire n",
            "quorate lock release n",
            "quorate lock break n",
            "quorate ring join r m",
            "quorate ring join r m --ttl 15s --lease 0123456789abcdef0123456789abcdef",
            "quorate ring join r m --ttl 15s --weight 0",
            "quorate ring join r m --ttl 15s zone",
            "quorate ring locate r",
            "quorate ring locate r k --count 0",
        ] {
            assert_eq!(parse(line).unwrap_err().exit_code(), 2, "{line}");
        }
    }
}
