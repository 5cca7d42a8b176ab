//! What a process says while it works, on its way to whoever reads it.
//!
//! The reader of a log may be slow, hang or be gone, and the disk under it may be full. None of
//! that is the business of whoever has something to say, least of all of a node's only thread:
//!
//! - To say something is to put a line into a queue. It never waits for a write and never fails.
//! - A thread writes the lines, one after the other, and may hang in that for as long as it likes.
//! - What does not fit into the queue or cannot be written is lost, and counted. Once a line gets
//!   through again the log says how many did not.
//! - The process ends without waiting for the thread for longer than [`FLUSH_PATIENCE`].

use std::backtrace::{Backtrace, BacktraceStatus};
use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, ErrorKind, IsTerminal as _, Write};
use std::os::fd::{AsFd as _, BorrowedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use clap::ValueEnum;
use serde::Deserialize;
use tracing::level_filters::LevelFilter;
use tracing_subscriber::EnvFilter;

use super::failure::Failure;

/// Bytes of lines that wait to be written; what comes on top of them is lost.
const QUEUED_BYTES_MAX: usize = 1 << 20;
/// How long a process waits at its end for what it has said to be written.
const FLUSH_PATIENCE: Duration = Duration::from_millis(500);
/// Pause before another attempt at a descriptor that somebody has made non-blocking.
const RETRY_PAUSE: Duration = Duration::from_millis(10);

/// How log lines look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// The log of this process, and all else that it says on standard error. What is still queued is
/// written when this goes, if that takes no longer than half a second.
pub struct Logging {
    lines: LineQueue,
}

impl Logging {
    /// Sends log lines to standard error from now on: those that `filter` lets through.
    ///
    /// A level stands for that level of Quorate's own lines; the libraries that it is made of speak
    /// where the filter names them (`info,openraft=debug`).
    pub(super) fn start(filter: &str, format: LogFormat) -> Result<Self, Failure> {
        let filter = parse_filter(filter)?;
        let ansi = io::stderr().is_terminal();
        let lines = LineQueue::start(io::stderr().as_fd(), |lost| {
            tracing::warn!(
                lines = lost,
                "log lines were lost: whoever reads standard error did not keep up, or could not \
                 write"
            );
        })?;
        let writer = lines.clone();
        let subscriber = tracing_subscriber::fmt()
            .with_env_filter(filter)
            .with_ansi(ansi)
            // It would tell of a failed write by way of a panic where standard error fails too.
            .log_internal_errors(false)
            .with_writer(move || writer.clone());
        let started = match format {
            LogFormat::Text => subscriber.try_init(),
            LogFormat::Json => subscriber.json().try_init(),
        };
        started.map_err(|error| Failure::Failed(format!("cannot log: {error}")))?;
        Ok(Self { lines })
    }

    /// Says something to whoever runs the process, in its turn among the log lines.
    pub(super) fn say(&self, text: &str) {
        self.lines.say(text);
    }

    /// Lines that nobody will read, since the process began.
    pub fn lost_lines(&self) -> u64 {
        self.lines.lock().lost
    }
}

impl Drop for Logging {
    fn drop(&mut self) {
        self.lines.flush();
    }
}

/// Has panics logged like everything else. Rust's own way writes to standard error from the thread
/// that panics, and hangs with it.
pub(super) fn log_panics() {
    std::panic::set_hook(Box::new(|panic| {
        let thread = std::thread::current();
        let thread = thread.name().unwrap_or("without a name");
        let message = panic.payload_as_str().unwrap_or("without a message");
        let place = panic.location().map(ToString::to_string).unwrap_or_default();
        // Only where RUST_BACKTRACE asks for one.
        let backtrace = Backtrace::capture();
        if backtrace.status() == BacktraceStatus::Captured {
            tracing::error!(thread, place, %backtrace, "panic: {message}");
        } else {
            tracing::error!(thread, place, "panic: {message}");
        }
    }));
}

fn parse_filter(filter: &str) -> Result<EnvFilter, Failure> {
    let word = filter.trim();
    let level = word.parse::<LevelFilter>();
    // The parser takes any single word for the name of a target, and then logs nothing else.
    if word.chars().all(char::is_alphanumeric) && level.is_err() {
        let message = format!("--log {word}: not one of off, error, warn, info, debug, trace");
        return Err(Failure::Usage(message));
    }
    let directives = match level {
        Ok(level) => format!("quorate={level}"),
        Err(_) => word.to_owned(),
    };
    EnvFilter::try_new(directives)
        .map_err(|error| Failure::Usage(format!("--log {filter}: {error}")))
}

/// Lines on their way to a file descriptor; clones share the queue.
#[derive(Clone)]
pub(super) struct LineQueue {
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    queue: Mutex<Queue>,
    /// Signalled when a line has come, or has been dealt with.
    changed: Condvar,
}

#[derive(Default)]
struct Queue {
    lines: VecDeque<Vec<u8>>,
    bytes: usize,
    /// Whether a line has been taken out and not been dealt with.
    writing: bool,
    /// Lines lost so far.
    lost: u64,
}

impl LineQueue {
    /// A queue of its own for a descriptor, with the thread that writes. `tell` is called on that
    /// thread, with how many lines were lost, once one gets through again.
    pub(super) fn start(
        descriptor: BorrowedFd<'_>,
        tell: impl Fn(u64) + Send + 'static,
    ) -> io::Result<Self> {
        // Not by way of `io::stderr`, whose lock would be held for as long as a write hangs.
        let file = File::from(descriptor.try_clone_to_owned()?);
        let this = Self { shared: Arc::default() };
        let queue = this.clone();
        std::thread::Builder::new().name("log".into()).spawn(move || queue.write(file, &tell))?;
        Ok(this)
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.shared.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Queues a text of one or several lines, if there is room.
    pub(super) fn say(&self, text: &str) {
        self.push(format!("{text}\n").into_bytes());
    }

    fn push(&self, line: Vec<u8>) {
        let mut queue = self.lock();
        if queue.bytes + line.len() > QUEUED_BYTES_MAX {
            queue.lost += 1;
            return;
        }
        queue.bytes += line.len();
        queue.lines.push_back(line);
        drop(queue);
        self.shared.changed.notify_all();
    }

    /// Waits until all that was queued is dealt with, for as long as [`FLUSH_PATIENCE`].
    pub(super) fn flush(&self) {
        let busy = |queue: &mut Queue| queue.writing || !queue.lines.is_empty();
        // Whether it was in time makes no difference to what can be done.
        drop(self.shared.changed.wait_timeout_while(self.lock(), FLUSH_PATIENCE, busy));
    }

    /// The thread: lives for as long as the process.
    fn write(&self, mut out: impl Write, tell: &dyn Fn(u64)) {
        let mut told = 0;
        // Whether the last line ended in the middle.
        let mut torn = false;
        loop {
            let mut line = self.take();
            if torn {
                line.insert(0, b'\n');
            }
            let result = write_line(&mut out, &line);
            let lost = {
                let mut queue = self.lock();
                queue.writing = false;
                queue.lost += u64::from(result.is_err());
                queue.lost
            };
            match result {
                Ok(()) => torn = false,
                Err(written) => torn |= written > 0,
            }
            if result.is_ok() && lost > told {
                tell(lost - told);
                told = lost;
            }
            self.shared.changed.notify_all();
        }
    }

    fn take(&self) -> Vec<u8> {
        let mut queue = self.lock();
        loop {
            if let Some(line) = queue.lines.pop_front() {
                queue.bytes -= line.len();
                queue.writing = true;
                return line;
            }
            queue = self.shared.changed.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// For `tracing`, which writes each line in one piece.
impl Write for LineQueue {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.push(line.to_vec());
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Writes it all, or says how much of it was written.
fn write_line(out: &mut impl Write, line: &[u8]) -> Result<(), usize> {
    let mut written = 0;
    while written < line.len() {
        match out.write(&line[written..]) {
            Ok(0) => return Err(written),
            Ok(count) => written += count,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                std::thread::sleep(RETRY_PAUSE);
            }
            Err(_) => return Err(written),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;
    use std::sync::mpsc;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(30);

    /// What `Write::write` is to do, one after the other; afterwards it takes everything.
    struct Scripted {
        results: VecDeque<io::Result<usize>>,
        written: mpsc::Sender<Vec<u8>>,
    }

    impl Write for Scripted {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let count = self.results.pop_front().unwrap_or(Ok(usize::MAX))?.min(bytes.len());
            self.written.send(bytes[..count].to_vec()).unwrap();
            Ok(count)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn failing(kind: ErrorKind) -> io::Result<usize> {
        Err(kind.into())
    }

    /// Writes `lines` after these results; returns what came out, what was told and what was lost.
    fn written(results: Vec<io::Result<usize>>, lines: &[&str]) -> (String, Vec<u64>, u64) {
        let queue = LineQueue { shared: Arc::default() };
        for line in lines {
            queue.say(line);
        }
        queue.say("end");
        let (written, pieces) = mpsc::channel();
        let (told, losses) = mpsc::channel();
        let writer = queue.clone();
        std::thread::spawn(move || {
            let out = Scripted { results: results.into(), written };
            writer.write(out, &|lost| told.send(lost).unwrap());
        });
        let mut text = String::new();
        while !text.ends_with("end\n") {
            text += std::str::from_utf8(&pieces.recv_timeout(PATIENCE).unwrap()).unwrap();
        }
        queue.flush();
        let lost = queue.lock().lost;
        (text, losses.try_iter().collect(), lost)
    }

    #[test]
    fn lines_come_out_in_order() {
        let (text, told, lost) = written(Vec::new(), &["one", "two"]);
        assert_eq!((&*text, told, lost), ("one\ntwo\nend\n", Vec::new(), 0));
    }

    #[test]
    fn what_cannot_be_written_is_counted_and_told_once_writing_works() {
        let full = || failing(ErrorKind::StorageFull);
        let (text, told, lost) = written(vec![full(), full()], &["one", "two", "three"]);
        assert_eq!((&*text, told, lost), ("three\nend\n", vec![2], 2));
        let gone = failing(ErrorKind::BrokenPipe);
        let (text, told, lost) = written(vec![Ok(9), gone, Ok(9)], &["one", "two", "three"]);
        assert_eq!((&*text, told, lost), ("one\nthree\nend\n", vec![1], 1));
    }

    #[test]
    fn a_line_cut_in_the_middle_does_not_spoil_the_next() {
        let full = failing(ErrorKind::StorageFull);
        let (text, told, lost) = written(vec![Ok(2), full], &["one", "two"]);
        assert_eq!((&*text, told, lost), ("on\ntwo\nend\n", vec![1], 1));
    }

    #[test]
    fn a_descriptor_that_would_block_is_waited_for() {
        let busy = vec![Ok(1), failing(ErrorKind::WouldBlock), failing(ErrorKind::Interrupted)];
        let (text, told, lost) = written(busy, &["one"]);
        assert_eq!((&*text, told, lost), ("one\nend\n", Vec::new(), 0));
    }

    #[test]
    fn a_reader_that_hangs_costs_lines_and_nothing_else() {
        let (mut reader, writer) = io::pipe().unwrap();
        let (told, losses) = mpsc::channel();
        let queue = LineQueue::start(writer.as_fd(), move |lost| told.send(lost).unwrap()).unwrap();
        drop(writer);
        let line = "x".repeat(QUEUED_BYTES_MAX / 8);
        // The pipe holds less than one of them.
        for _ in 0..20 {
            queue.say(&line);
        }
        let lost = queue.lock().lost;
        assert!((10..20).contains(&lost), "{lost}");
        // It does not wait for ever, either.
        queue.flush();
        // Whoever reads again is told of the gap.
        std::thread::spawn(move || io::copy(&mut reader, &mut io::sink()));
        assert_eq!(losses.recv_timeout(PATIENCE).unwrap(), lost);
    }

    #[test]
    fn a_reader_that_is_gone_costs_lines_and_nothing_else() {
        let (mut reader, writer) = io::pipe().unwrap();
        let queue = LineQueue::start(writer.as_fd(), |_| {}).unwrap();
        drop(writer);
        queue.say("one");
        let mut read = [0; 4];
        reader.read_exact(&mut read).unwrap();
        assert_eq!(&read, b"one\n");
        drop(reader);
        queue.say("two");
        queue.flush();
        assert_eq!(queue.lock().lost, 1);
    }

    #[test]
    fn a_level_is_one_of_our_own_lines() {
        let parsed = |filter: &str| parse_filter(filter).map(|filter| filter.to_string());
        assert_eq!(parsed("info").unwrap(), "quorate=info");
        assert_eq!(parsed(" DEBUG ").unwrap(), "quorate=debug");
        assert_eq!(parsed("off").unwrap(), "quorate=off");
        assert_eq!(parsed("quorate::changes=debug").unwrap(), "quorate::changes=debug");
        let named = parsed("info,openraft=debug").unwrap();
        assert!(named.contains("openraft=debug"), "{named}");
        assert!(parsed("loud").unwrap_err().to_string().contains("not one of off, error"));
        assert!(parsed("quorate=loud").unwrap_err().to_string().contains("--log"));
    }
}
