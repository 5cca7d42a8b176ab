//! `quorate lock exec`: runs a command while holding a lock.
//!
//! The command is told to go when the lock is lost with its lease, which is before anybody else can
//! have it, and killed if it does not; for as long as that takes a lock-delay keeps others out.
//! That an operator has broken the lock is found out by asking, a few seconds late.
//!
//! In the foreground of a terminal the command shares this process's group, as with any command of
//! a shell: the terminal's own signals reach all of it, and only the command itself is sent others.
//! Elsewhere it has a group of its own, and what it has started, if that has stayed in the group,
//! gets what it gets. What goes on after a command that has ended by itself is left alone. As
//! process 1 of a container this one buries those that have lost their parents (`child`).
//!
//! Caveats: a stop (SIGTSTP, SIGSTOP) is not passed on; and should this process be killed with
//! SIGKILL, nobody is left to tell the command. What must not go wrong even then demands the
//! fencing token.

use std::ffi::OsString;
use std::io;
use std::os::fd::AsFd as _;
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::process::{Command, ExitCode, ExitStatus};
use std::time::Duration;

use clap::Args;
use rustix::process::{Signal, kill_process, kill_process_group, test_kill_process_group};
use tokio::time::Instant;

use super::argument;
use super::child::Child;
use super::failure::Failure;
use super::lock::ModeArguments;
use super::logging::LineQueue;
use super::output;
use super::signals::{Signals, ended_by};
use crate::client::{Client, Error, Guard, Lease, LeaseOptions, Loss};

/// The shortest and the longest time between SIGTERM and SIGKILL.
const GRACE_MIN: Duration = Duration::from_millis(500);
const GRACE_MAX: Duration = Duration::from_secs(5);
/// The same of the time between two questions whether the lock was broken.
const VERIFY_MIN: Duration = Duration::from_secs(1);
const VERIFY_MAX: Duration = Duration::from_secs(5);
/// How often it is looked whether the rest of a group has gone.
const GROUP_CHECK: Duration = Duration::from_millis(20);

/// `quorate lock exec`.
#[derive(Args, Debug)]
#[command(override_usage = "quorate lock exec [OPTIONS] <NAME> -- <COMMAND>...")]
pub(crate) struct ExecArguments {
    /// The lock's name
    name: String,
    #[command(flatten)]
    mode: ModeArguments,
    /// How long the lock survives without a sign of life from this process: 1s to 24h; below 3s an
    /// election of the cluster can cost the lock
    #[arg(long, value_name = "TIME", default_value = "15s")]
    #[arg(value_parser = argument::ttl)]
    ttl: Duration,
    /// A label for people: who holds the lock [default: host and process id]
    #[arg(long, value_name = "LABEL")]
    owner: Option<String>,
    /// What to run, with its arguments
    #[arg(last = true, required = true, value_name = "COMMAND")]
    command: Vec<OsString>,
}

/// Why the command is stopped.
enum Lost {
    Lease(Loss),
    Broken,
}

/// How the command has ended.
struct Ended {
    code: u8,
    /// Whether it was stopped because the lock was lost.
    lost: Option<Lost>,
}

/// Gets the lock, runs the command, gives the lock back. At the end nobody is waited for longer
/// than `patience`.
pub(crate) async fn run(
    arguments: ExecArguments,
    client: &Client,
    patience: Duration,
) -> Result<ExitCode, Failure> {
    if arguments.command.first().is_none_or(|program| program.is_empty()) {
        return Err(Failure::Usage("the command after -- is empty: name one to run".to_owned()));
    }
    let mut signals = Signals::new()?;
    let messages = LineQueue::start(io::stderr().as_fd(), |_| {})?;
    let owner = arguments.owner.clone().unwrap_or_else(owner);
    let options = LeaseOptions::new().ttl(arguments.ttl).owner(owner);
    let leases = client.leases();
    let lease = tokio::select! {
        granted = leases.grant(options) => granted?,
        signal = signals.next() => return Ok(ended_by(signal)),
    };
    let request = arguments.mode.request(&client.locks(), &arguments.name, grace(arguments.ttl))?;
    let acquired = tokio::select! {
        acquired = request.acquire(&lease) => acquired,
        signal = signals.next() => {
            give_up(lease, client, &mut signals, patience).await;
            return Ok(ended_by(signal));
        }
    };
    let guard = match acquired {
        Ok(guard) => guard,
        Err(error) => {
            give_up(lease, client, &mut signals, patience).await;
            return Err(not_obtained(error, &arguments.name));
        }
    };
    let ended = attend(&arguments, &guard, &mut signals, &messages).await;
    messages.flush();
    let lost = ended.as_ref().ok().and_then(|ended| ended.lost.as_ref());
    let was_held = give_back(guard, lease, lost, &mut signals, patience).await;
    // What a command did without the lock was not protected, so its word alone is no success.
    Ok(ExitCode::from(match ended?.code {
        0 if !was_held => 4,
        code => code,
    }))
}

/// A lock that somebody waited for is not one that he had: also where it was his own lease that
/// ended, trying again may help.
fn not_obtained(error: Error, name: &str) -> Failure {
    let name = output::printable(name);
    match error {
        Error::LeaseLost { message } => Failure::Unavailable(format!(
            "the lock {name} was not obtained, the lease that was to hold it is lost: {message}"
        )),
        error => Failure::naming(error, &format!("lock {name}")),
    }
}

/// Runs the command until it has ended, however it does. A command whose lock is lost has to be
/// stopped even where nobody reads what there is to say of it.
async fn attend(
    arguments: &ExecArguments,
    guard: &Guard,
    signals: &mut Signals,
    messages: &LineQueue,
) -> Result<Ended, Failure> {
    let mut running = match Running::start(&arguments.command, guard) {
        Ok(running) => running,
        Err((program, error)) => {
            output::message(&format!("quorate: cannot run {program}: {error}"));
            let code = if error.kind() == io::ErrorKind::NotFound { 127 } else { 126 };
            return Ok(Ended { code, lost: None });
        }
    };
    let mut lost = std::pin::pin!(guard.lost());
    let mut broken = std::pin::pin!(broken(guard, arguments.ttl));
    let loss = loop {
        tokio::select! {
            ended = running.child.wait() => {
                return Ok(Ended { code: exit_code(ended?), lost: None });
            }
            loss = &mut lost => break Lost::Lease(loss),
            () = &mut broken => break Lost::Broken,
            signal = signals.next() => running.pass_on(signal),
        }
    };
    let reason = match loss {
        Lost::Lease(loss) => format!("its lease {}", loss.describe()),
        Lost::Broken => "somebody has taken it away".to_owned(),
    };
    messages.say(&format!("quorate: the lock is lost: {reason}; stopping the command"));
    let code = exit_code(running.stop(grace(arguments.ttl), messages).await?);
    Ok(Ended { code, lost: Some(loss) })
}

/// Returns when the cluster says that the lock is not held any more. Where nobody answers the lease
/// says when it is too late.
async fn broken(guard: &Guard, ttl: Duration) {
    let interval = (ttl / 3).clamp(VERIFY_MIN, VERIFY_MAX);
    loop {
        tokio::time::sleep(interval).await;
        match guard.verify().await {
            // Of a lease that is lost its own word comes at once, and says more.
            Err(Error::LockNotHeld { .. }) if !guard.is_lost() => return,
            Ok(()) | Err(_) => {}
        }
    }
}

/// Gives lock and lease back after the command. Returns whether the lock was held until then, as
/// far as anybody knows.
async fn give_back(
    guard: Guard,
    lease: Lease,
    lost: Option<&Lost>,
    signals: &mut Signals,
    patience: Duration,
) -> bool {
    if guard.is_lost() {
        if lost.is_none() {
            output::message("quorate: the lock was lost with its lease while the command ran");
        }
        // The cluster has ended the lease, or will without being told.
        return false;
    }
    let returned = signals.part(patience, async {
        let released = if lost.is_none() { guard.release().await } else { Ok(()) };
        revoke(lease).await;
        released
    });
    let message = match returned.await {
        Some(Ok(())) => return lost.is_none(),
        Some(Err(Error::LockNotHeld { .. })) => {
            output::message("quorate: the lock was taken away while the command ran");
            return false;
        }
        Some(Err(error)) => {
            format!("could not release the lock, it goes with its lease: {error}")
        }
        None => "could not give the lock back in time; it goes with its lease".to_owned(),
    };
    output::message(&format!("quorate: {message}"));
    lost.is_none()
}

/// Gives up a lease, and what was waited for with it.
pub(super) async fn give_up(
    lease: Lease,
    client: &Client,
    signals: &mut Signals,
    patience: Duration,
) {
    if lease.is_lost() {
        return;
    }
    let given_up = signals.part(patience, async {
        revoke(lease).await;
        client.settled().await;
    });
    if given_up.await.is_none() {
        output::message("quorate: could not revoke the lease in time; it ends by itself");
    }
}

async fn revoke(lease: Lease) {
    // Where that fails it ends by itself.
    if let Err(error) = lease.revoke().await {
        tracing::debug!(%error, "could not revoke the lease");
    }
}

/// The time between SIGTERM and SIGKILL: the part of the time to live that is left when a guard
/// gives up.
fn grace(ttl: Duration) -> Duration {
    (ttl / 20).clamp(GRACE_MIN, GRACE_MAX)
}

/// A command that runs.
struct Running {
    child: Child,
    /// Whether it has a process group of its own, and all of that is signalled.
    has_group: bool,
}

impl Running {
    fn start(command: &[OsString], guard: &Guard) -> Result<Self, (String, io::Error)> {
        let (program, rest) = command.split_first().unwrap_or((const { &OsString::new() }, &[]));
        let has_group = !is_in_foreground();
        let mut command = Command::new(program);
        command
            .args(rest)
            .env("QUORATE_FENCING_TOKEN", guard.token().to_string())
            .env("QUORATE_LOCK", guard.name());
        if has_group {
            command.process_group(0);
        }
        let child = Child::spawn(&mut command)
            .map_err(|error| (output::printable(&program.to_string_lossy()), error))?;
        Ok(Self { child, has_group })
    }

    /// Sends it a signal that this process has got, unless it has got that itself: a terminal sends
    /// Ctrl-C and Ctrl-\ to all in the foreground, and some programs take a second one for
    /// impatience.
    fn pass_on(&self, signal: Signal) {
        let from_terminal = signal == Signal::INT || signal == Signal::QUIT;
        if !(from_terminal && !self.has_group && is_in_foreground()) {
            self.send(signal);
        }
    }

    fn send(&self, signal: Signal) {
        let pid = self.child.pid();
        if self.has_group && kill_process_group(pid, signal).is_ok() {
            return;
        }
        // It has not been waited for, so the number is its own, even if it has ended.
        if self.child.is_running() {
            let _ = kill_process(pid, signal);
        }
    }

    /// Ends it, and the rest of its group.
    async fn stop(&mut self, grace: Duration, messages: &LineQueue) -> Result<ExitStatus, Failure> {
        let deadline = Instant::now() + grace;
        self.send(Signal::TERM);
        let Ok(ended) = tokio::time::timeout_at(deadline, self.child.wait()).await else {
            messages.say("quorate: the command goes on; killing it");
            self.send(Signal::KILL);
            // It may have left its group.
            self.child.kill();
            return Ok(self.child.wait().await?);
        };
        while self.has_rest() && Instant::now() < deadline {
            tokio::time::sleep(GROUP_CHECK).await;
            // Who has ended is in the group until he was asked for.
            self.child.ask()?;
        }
        if self.has_rest() {
            messages.say("quorate: what the command has started goes on; killing it");
            self.send(Signal::KILL);
        }
        Ok(ended?)
    }

    /// Whether anything of its group is there. Nobody else gets the group's number while it is.
    fn has_rest(&self) -> bool {
        self.has_group && test_kill_process_group(self.child.pid()).is_ok()
    }
}

/// Whether this process is in the foreground of the terminal that is its standard input.
fn is_in_foreground() -> bool {
    // Asked in this order: the first process of a namespace may be of a group without a number
    // there, which may be asked for no more than a terminal that is none.
    let Ok(foreground) = rustix::termios::tcgetpgrp(io::stdin()) else { return false };
    foreground == rustix::process::getpgrp()
}

/// The command's own code, or as a shell says it when a signal ended it.
fn exit_code(status: ExitStatus) -> u8 {
    let code = status.code().or_else(|| status.signal().map(|signal| 128 + signal));
    code.and_then(|code| u8::try_from(code).ok()).unwrap_or(1)
}

/// Host and process, as far as they are known.
pub(super) fn owner() -> String {
    let system = rustix::system::uname();
    format!("{}/{}", system.nodename().to_string_lossy(), std::process::id())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lost_lease_is_no_lost_lock_to_who_has_only_waited() {
        let lost = || Error::LeaseLost { message: "the lease has ended".to_owned() };
        let failure = not_obtained(lost(), "job");
        assert_eq!(failure.code(), 75);
        assert!(failure.to_string().contains("not obtained"), "{failure}");
        let held = Error::LockHeld { message: "held".to_owned() };
        assert_eq!(not_obtained(held, "job").code(), 75);
    }

    #[test]
    fn the_grace_is_what_the_guard_leaves_of_the_ttl() {
        assert_eq!(grace(Duration::from_secs(1)), GRACE_MIN);
        assert_eq!(grace(Duration::from_secs(20)), Duration::from_secs(1));
        assert_eq!(grace(Duration::from_secs(86_400)), GRACE_MAX);
    }
}
