//! `quorate bench`: a closed loop of callers, and what they saw.
//!
//! Each caller sends a request, waits for its outcome and sends the next, so the latencies are
//! those of a cluster under this load and not of one that falls behind an arrival rate. What a
//! closed loop would hide, an outage, `ledger` makes visible.

use std::io::IsTerminal as _;
use std::time::Duration;

use clap::{Args, ValueEnum};
use hdrhistogram::Histogram;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};
use tokio::time::Instant;

use super::Common;
use super::argument;
use super::bench_expiry;
use super::bench_lease;
use super::contender;
use super::failure::Failure;
use super::ledger::Tally;
use super::load::{Load, Population};
use super::output::{self, Table, count, length};
use crate::client::{Client, ClientBuilder, Transport};

/// Time before anything is measured: connections, caches and the cluster settle.
const WARM_UP: Duration = Duration::from_millis(700);
/// Connections, unless told otherwise.
const CONNECTIONS_DEFAULT: usize = 8;
/// Connections and concurrent calls that prepare the sessions.
const PREPARE_CONNECTIONS: usize = 4;
const TICK: Duration = Duration::from_millis(200);

/// What to measure.
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  quorate bench --work update --clients 256 --duration 10s\n\n\
    mixed is 75 % get, 20 % update and 5 % touch. Sessions that create leaves behind expire \
    after five minutes. lock takes and releases a lock of each caller's own, handover one that all \
    of them wait for: its rate is that of hand-overs. renew keeps --leases alive and counts \
    renewals and losses. expire compares updates for --duration without, and then with so many \
    leases that end.")]
pub(crate) struct BenchArguments {
    /// What the callers do
    #[arg(long, value_enum, default_value_t = Work::Update)]
    work: Work,
    /// One gRPC call for each request, instead of pipelines
    #[arg(long)]
    unary: bool,
    /// How many callers at once
    #[arg(long, default_value_t = 64, value_name = "NUMBER", value_parser = up_to::<100_000>)]
    clients: usize,
    /// How long to measure
    #[arg(long, default_value = "10s", value_name = "TIME")]
    #[arg(value_parser = argument::positive_duration)]
    duration: Duration,
    /// Bytes of an attribute's value
    #[arg(long, default_value_t = 256, value_name = "BYTES")]
    value_size: usize,
    /// How many sessions the callers choose from
    #[arg(long, default_value_t = 10_000, value_name = "NUMBER")]
    #[arg(value_parser = up_to::<10_000_000>)]
    sessions: usize,
    /// How many leases renew keeps alive, or expire lets end
    #[arg(long, default_value_t = 1_000, value_name = "NUMBER")]
    #[arg(value_parser = up_to::<1_000_000>)]
    leases: usize,
    /// The time to live of those leases
    #[arg(long, default_value = "20s", value_name = "TIME")]
    #[arg(value_parser = argument::positive_duration)]
    ttl: Duration,
    /// Connections they share [default: one a caller, at most 8]
    #[arg(long, value_name = "NUMBER", value_parser = up_to::<10_000>)]
    connections: Option<usize>,
    /// Print operations and errors of every second to standard error
    #[arg(long)]
    timeline: bool,
}

/// What the callers do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Work {
    /// Set one attribute of a session
    Update,
    /// Read a session, linearizably
    Get,
    /// Create sessions
    Create,
    /// Mostly get, some update, a few touch
    Mixed,
    /// Take a lock that nobody else wants, on a held lease, and release it
    Lock,
    /// Hand one lock from caller to caller
    Handover,
    /// Keep leases alive
    Renew,
    /// Update sessions while leases end, all at the same time
    Expire,
}

impl Work {
    fn name(self) -> &'static str {
        match self {
            Self::Update => "update",
            Self::Get => "get",
            Self::Create => "create",
            Self::Mixed => "mixed",
            Self::Lock => "lock",
            Self::Handover => "handover",
            Self::Renew => "renew",
            Self::Expire => "expire",
        }
    }

    /// Whether it is about locks and leases, not sessions.
    fn is_coordination(self) -> bool {
        matches!(self, Self::Lock | Self::Handover | Self::Renew)
    }
}

fn up_to<const MAX: usize>(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(number) if (1..=MAX).contains(&number) => Ok(number),
        _ => Err(format!("must be a number from 1 to {MAX}")),
    }
}

/// Prepares, warms up, measures and reports.
pub(crate) async fn run(arguments: BenchArguments, common: &Common) -> Result<(), Failure> {
    let population = Population::new(arguments.sessions, arguments.value_size)?;
    if arguments.work != Work::Create && !arguments.work.is_coordination() {
        let client = common.client().connections(PREPARE_CONNECTIONS);
        prepare(&client.connect().await?, &population).await?;
    }
    let transport = if arguments.unary { Transport::Unary } else { Transport::Pipeline };
    let connections =
        arguments.connections.unwrap_or_else(|| CONNECTIONS_DEFAULT.min(arguments.clients));
    let builder: ClientBuilder = common.client().transport(transport).connections(connections);
    let client = builder.connect().await?;
    if arguments.work == Work::Renew {
        let BenchArguments { leases, ttl, duration, timeline, .. } = arguments;
        return bench_lease::run(&client, leases, ttl, duration, timeline, common).await;
    }
    let contenders = if arguments.work.is_coordination() {
        contender::prepare(&client, arguments.work, arguments.clients).await?
    } else {
        Vec::new()
    };
    let load = Load::start(&client, arguments.work, population, arguments.clients, &contenders)?;
    if arguments.work == Work::Expire {
        tokio::time::sleep(WARM_UP).await;
        let BenchArguments { leases, ttl, duration, .. } = arguments;
        return bench_expiry::run(&client, load, leases, ttl, duration, common).await;
    }
    measure(&load, &arguments).await;
    let tally = load.finish().await;
    contender::end(contenders).await;
    report(&tally, &arguments, connections, common)
}

async fn prepare(client: &Client, population: &Population) -> Result<(), Failure> {
    let bar = progress_bar(Some(population.sessions as u64));
    bar.set_message("preparing sessions");
    let result = population.prepare(client, |ready| bar.inc(ready)).await;
    bar.finish_and_clear();
    result
}

/// Warms up, then lets the callers be measured for as long as asked.
async fn measure(load: &Load, arguments: &BenchArguments) {
    let bar = progress_bar(None);
    bar.set_message("warming up");
    tokio::time::sleep(WARM_UP).await;
    load.measure();
    let start = Instant::now();
    let end = start + arguments.duration;
    let mut second = Second { start, operations: 0, errors: 0 };
    loop {
        let now = Instant::now();
        let (operations, errors) = load.progress();
        if now >= end {
            break;
        }
        let elapsed = (now - start).as_secs_f64().max(0.001);
        let rate = (operations as f64 / elapsed) as u64;
        bar.set_message(format!("{}/s, {} errors", count(rate), count(errors)));
        if arguments.timeline && now >= second.start + Duration::from_secs(1) {
            let line = second.advance(now, start, operations, errors);
            bar.suspend(|| output::message(&line));
        }
        tokio::time::sleep_until(end.min(now + TICK)).await;
    }
    load.stop();
    bar.finish_and_clear();
}

/// Where the current line of the timeline began.
struct Second {
    start: Instant,
    operations: u64,
    errors: u64,
}

impl Second {
    /// The line for what has happened since the last one.
    fn advance(&mut self, now: Instant, begin: Instant, operations: u64, errors: u64) -> String {
        let elapsed = (now - self.start).as_secs_f64();
        let rate = ((operations - self.operations) as f64 / elapsed) as u64;
        let line = format!(
            "{:>6.1} s {:>12}/s {:>8} errors",
            (now - begin).as_secs_f64(),
            count(rate),
            count(errors - self.errors)
        );
        *self = Self { start: now, operations, errors };
        line
    }
}

/// A line on the terminal; invisible when standard error is none.
fn progress_bar(total: Option<u64>) -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let bar = total.map_or_else(ProgressBar::new_spinner, ProgressBar::new);
    let template = if total.is_some() { "{msg} {pos}/{len} [{bar:30}] {eta}" } else { "{msg}" };
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
    bar
}

fn report(
    tally: &Tally,
    arguments: &BenchArguments,
    connections: usize,
    common: &Common,
) -> Result<(), Failure> {
    let rate = tally.rate();
    let quantiles = Quantiles::of(&tally.latencies);
    let transport = if arguments.unary { "unary" } else { "pipeline" };
    let mut table = Table::plain();
    let mut work = format!(
        "{} over {transport}, {} callers, {connections} connections",
        arguments.work.name(),
        count(arguments.clients as u64),
    );
    if !arguments.work.is_coordination() {
        let (sessions, bytes) = (arguments.sessions as u64, arguments.value_size as u64);
        work.push_str(&format!(", {} sessions, {} B values", count(sessions), count(bytes)));
    }
    table.row(["work".to_owned(), work]);
    let (done, elapsed) = (count(tally.operations), tally.length);
    table.row([
        "rate".to_owned(),
        format!("{} operations/s ({done} in {})", count(rate as u64), length(elapsed)),
    ]);
    for (name, value) in quantiles.named() {
        table.row([name.to_owned(), format!("{} µs", count(value))]);
    }
    table.row(["longest stall".to_owned(), micros_text(tally.stall)]);
    for (kind, number) in &tally.errors {
        table.row([format!("errors: {kind}"), count(*number)]);
    }
    if tally.errors.is_empty() {
        table.row(["errors", "none"]);
    }
    table.row(["unfinished".to_owned(), tally.unfinished_text()]);
    let json = json!({
        "work": arguments.work.name(),
        "transport": transport,
        "clients": arguments.clients,
        "connections": connections,
        "sessions": arguments.sessions,
        "value_size": arguments.value_size,
        "duration": output::length_json(Some(elapsed)),
        "operations": tally.operations,
        "operations_per_second": (rate * 10.0).round() / 10.0,
        "latency_us": quantiles.json(),
        "longest_stall": output::length_json(Some(tally.stall)),
        "errors": tally.errors,
        "unfinished": tally.unfinished,
        "oldest_unfinished": output::length_json(Some(tally.oldest)),
    });
    common.output().result(table.render().trim_end(), &json)?;
    tally.verdict()
}

/// A length as latencies are printed.
pub(crate) fn micros_text(length: Duration) -> String {
    format!("{} µs", count(u64::try_from(length.as_micros()).unwrap_or(u64::MAX)))
}

/// Latencies in microseconds.
pub(crate) struct Quantiles {
    pub(crate) p50: u64,
    p90: u64,
    pub(crate) p99: u64,
    p999: u64,
    pub(crate) max: u64,
}

impl Quantiles {
    pub(crate) fn of(nanos: &Histogram<u64>) -> Self {
        let micros = |nanos: u64| (nanos + 500) / 1_000;
        let at = |quantile| micros(nanos.value_at_quantile(quantile));
        Self {
            p50: at(0.5),
            p90: at(0.9),
            p99: at(0.99),
            p999: at(0.999),
            max: micros(nanos.max()),
        }
    }

    fn named(&self) -> [(&'static str, u64); 5] {
        [
            ("p50", self.p50),
            ("p90", self.p90),
            ("p99", self.p99),
            ("p99.9", self.p999),
            ("max", self.max),
        ]
    }

    pub(crate) fn json(&self) -> Value {
        let named = self.named().into_iter();
        Value::Object(named.map(|(name, value)| (name.to_owned(), value.into())).collect())
    }
}
