//! `quorate lock exec`: runs a command while holding a lock.
//!
//! The command is told to go when the lock is lost, which is before anybody else can have it, and
//! killed if it does not. Caveats: only the command itself is signalled, not what it has started;
//! and should this process be killed with SIGKILL, nobody is left to tell the command. What must
//! not go wrong even then demands the fencing token.

use std::io;
use std::os::unix::process::ExitStatusExt as _;
use std::process::{ExitCode, ExitStatus};
use std::time::Duration;

use clap::Args;
use rustix::process::{Pid, Signal, kill_process};
use tokio::process::{Child, Command};
use tokio::signal::unix::{SignalKind, signal};

use super::argument;
use super::failure::Failure;
use super::lock::ModeArguments;
use super::output;
use crate::client::{Client, Error, Guard, Lease, LeaseOptions, Loss};

/// The shortest and the longest time between SIGTERM and SIGKILL.
const GRACE_MIN: Duration = Duration::from_millis(500);
const GRACE_MAX: Duration = Duration::from_secs(5);

/// `quorate lock exec`.
#[derive(Args, Debug)]
#[command(override_usage = "quorate lock exec [OPTIONS] <NAME> -- <COMMAND>...")]
pub(crate) struct ExecArguments {
    /// The lock's name
    name: String,
    #[command(flatten)]
    mode: ModeArguments,
    /// How long the lock survives without a sign of life from this process: 1s to 24h
    #[arg(long, value_name = "TIME", default_value = "15s")]
    #[arg(value_parser = argument::positive_duration)]
    ttl: Duration,
    /// A label for people: who holds the lock [default: host and process id]
    #[arg(long, value_name = "LABEL")]
    owner: Option<String>,
    /// What to run, with its arguments
    #[arg(last = true, required = true, value_name = "COMMAND")]
    command: Vec<std::ffi::OsString>,
}

/// Gets the lock, runs the command, gives the lock back.
pub(crate) async fn run(arguments: ExecArguments, client: &Client) -> Result<ExitCode, Failure> {
    let mut signals = Signals::new()?;
    let owner = arguments.owner.clone().unwrap_or_else(owner);
    let options = LeaseOptions::new().ttl(arguments.ttl).owner(owner);
    let leases = client.leases();
    let lease = tokio::select! {
        granted = leases.grant(options) => granted?,
        signal = signals.next() => return Ok(ended_by(signal)),
    };
    let request = arguments.mode.request(&client.locks(), &arguments.name);
    let acquired = tokio::select! {
        acquired = request.acquire(&lease) => acquired,
        signal = signals.next() => {
            end(lease).await;
            return Ok(ended_by(signal));
        }
    };
    let guard = match acquired {
        Ok(guard) => guard,
        Err(error) => {
            end(lease).await;
            return Err(error.into());
        }
    };
    let outcome = attend(&arguments, &guard, &mut signals).await;
    if !guard.is_lost()
        && let Err(error) = guard.release().await
    {
        let message = match error {
            Error::LockNotHeld { .. } => "the lock was taken away while the command ran".to_owned(),
            error => format!("could not release the lock, it goes with its lease: {error}"),
        };
        output::message(&format!("quorate: {message}"));
    }
    end(lease).await;
    outcome
}

/// Runs the command until it has ended, however it does.
async fn attend(
    arguments: &ExecArguments,
    guard: &Guard,
    signals: &mut Signals,
) -> Result<ExitCode, Failure> {
    let Some((program, rest)) = arguments.command.split_first() else {
        return Err(Failure::Usage("name a command to run, after --".to_owned()));
    };
    let mut command = Command::new(program);
    command
        .args(rest)
        .env("QUORATE_FENCING_TOKEN", guard.token().to_string())
        .env("QUORATE_LOCK", guard.name())
        .kill_on_drop(true);
    let mut child = match command.spawn() {
        Ok(child) => child,
        Err(error) => {
            let shown = output::printable(&program.to_string_lossy());
            output::message(&format!("quorate: cannot run {shown}: {error}"));
            return Ok(ExitCode::from(if error.kind() == io::ErrorKind::NotFound {
                127
            } else {
                126
            }));
        }
    };
    let mut lost = std::pin::pin!(guard.lost());
    let loss = loop {
        tokio::select! {
            ended = child.wait() => return Ok(exit_code(ended?)),
            loss = &mut lost => break loss,
            signal = signals.next() => {
                if !signals.reaches_children(signal) {
                    send(&child, signal);
                }
            }
        }
    };
    let code = stop(&mut child, arguments, loss).await?;
    // What it did since the loss was not protected, so its word alone is no success.
    Ok(if code == ExitCode::SUCCESS { ExitCode::from(4) } else { code })
}

/// Ends the command, as the lock is lost.
async fn stop(
    child: &mut Child,
    arguments: &ExecArguments,
    loss: Loss,
) -> Result<ExitCode, Failure> {
    output::message(&format!(
        "quorate: the lock is lost: its lease {}; stopping the command",
        loss.describe()
    ));
    // The part of the time to live that is left when a guard gives up.
    let grace = (arguments.ttl / 20).clamp(GRACE_MIN, GRACE_MAX);
    send(child, Signal::TERM);
    match tokio::time::timeout(grace, child.wait()).await {
        Ok(ended) => Ok(exit_code(ended?)),
        Err(_) => {
            output::message("quorate: the command goes on; killing it");
            // It may have ended this instant.
            let _ = child.start_kill();
            Ok(exit_code(child.wait().await?))
        }
    }
}

/// Gives the lease back. Where that fails it ends by itself.
pub(super) async fn end(lease: Lease) {
    let is_lost = lease.is_lost();
    if let Err(error) = lease.revoke().await
        && !is_lost
    {
        tracing::debug!(%error, "could not revoke the lease");
    }
}

fn send(child: &Child, signal: Signal) {
    let pid = child.id().and_then(|pid| i32::try_from(pid).ok()).and_then(Pid::from_raw);
    if let Some(pid) = pid {
        // It has not been waited for, so the number is its own, even if it has ended.
        let _ = kill_process(pid, signal);
    }
}

/// The command's own code, or as a shell says it when a signal ended it.
fn exit_code(status: ExitStatus) -> ExitCode {
    let code = status.code().or_else(|| status.signal().map(|signal| 128 + signal));
    ExitCode::from(code.and_then(|code| u8::try_from(code).ok()).unwrap_or(1))
}

fn ended_by(signal: Signal) -> ExitCode {
    ExitCode::from(u8::try_from(128 + signal.as_raw()).unwrap_or(1))
}

/// Host and process, as far as they are known.
pub(super) fn owner() -> String {
    let system = rustix::system::uname();
    format!("{}/{}", system.nodename().to_string_lossy(), std::process::id())
}

/// The signals that ask this process to end.
pub(super) struct Signals {
    interrupt: tokio::signal::unix::Signal,
    terminate: tokio::signal::unix::Signal,
}

impl Signals {
    pub(super) fn new() -> Result<Self, Failure> {
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
        })
    }

    pub(super) async fn next(&mut self) -> Signal {
        tokio::select! {
            _ = self.interrupt.recv() => Signal::INT,
            _ = self.terminate.recv() => Signal::TERM,
        }
    }

    /// Whether the command has got it too: a terminal sends Ctrl-C to all in the foreground, and
    /// some programs take a second one for impatience.
    fn reaches_children(&self, signal: Signal) -> bool {
        let foreground = rustix::termios::tcgetpgrp(io::stdin()).ok();
        signal == Signal::INT && foreground == Some(rustix::process::getpgrp())
    }
}
