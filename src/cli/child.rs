//! The command that `lock exec` runs, as a child process.
//!
//! In a container `lock exec` may be process 1, which inherits every process that loses its parent
//! and has to ask for the end of each: until somebody does, it stays in the table of processes. So
//! all asking is here, and takes nobody's end from who waits for it.

use std::io;
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Command, ExitStatus};

use rustix::io::Errno;
use rustix::process::{Pid, Signal, WaitOptions, WaitStatus, getpid, kill_process, wait, waitpid};
use tokio::signal::unix::{self, SignalKind, signal};

/// A child process; killed if it is dropped before its end.
pub(super) struct Child {
    pid: Pid,
    ended: Option<ExitStatus>,
    /// Whether whoever loses his parent becomes a child of this process.
    inherits: bool,
    /// Told when any child has ended.
    ends: unix::Signal,
}

impl Child {
    pub(super) fn spawn(command: &mut Command) -> io::Result<Self> {
        // Listened for beforehand, so that no end is missed.
        let ends = signal(SignalKind::child())?;
        let pid = Pid::from_child(&command.spawn()?);
        Ok(Self { pid, ended: None, inherits: getpid().is_init(), ends })
    }

    pub(super) fn pid(&self) -> Pid {
        self.pid
    }

    /// Whether its end is not known. Its number is its own for as long.
    pub(super) fn is_running(&self) -> bool {
        self.ended.is_none()
    }

    /// Kills it, unless it has ended.
    pub(super) fn kill(&self) {
        if self.is_running() {
            // Should it end this instant, there is nothing left to do.
            let _ = kill_process(self.pid, Signal::KILL);
        }
    }

    /// Returns when it has ended.
    pub(super) async fn wait(&mut self) -> io::Result<ExitStatus> {
        loop {
            self.ask()?;
            if let Some(status) = self.ended {
                return Ok(status);
            }
            if self.ends.recv().await.is_none() {
                return Err(io::Error::other("the runtime is shutting down"));
            }
        }
    }

    /// Asks for the ends of this child and of those that were inherited.
    pub(super) fn ask(&mut self) -> io::Result<()> {
        while self.inherits || self.ended.is_none() {
            match self.next_end() {
                Ok(Some((pid, status))) if pid == self.pid => {
                    self.ended = Some(ExitStatus::from_raw(status.as_raw()));
                }
                Ok(Some(_)) => {}
                Ok(None) => return Ok(()),
                // There is no child any more.
                Err(Errno::CHILD) if self.ended.is_some() => return Ok(()),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    fn next_end(&self) -> rustix::io::Result<Option<(Pid, WaitStatus)>> {
        if self.inherits {
            return wait(WaitOptions::NOHANG);
        }
        waitpid(Some(self.pid), WaitOptions::NOHANG)
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        self.kill();
    }
}
