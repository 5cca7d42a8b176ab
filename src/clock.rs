//! The only place that reads the machine's clocks, so that a simulation can own them. Pauses and
//! timeouts within one process run on tokio's timer instead.

use std::time::{Duration, SystemTime};

use rustix::time::{ClockId, clock_gettime};

/// What a node or a client knows of time.
pub trait Clock: Send + Sync + 'static {
    /// Time since some fixed moment. It never goes back, no clock step moves it, and it goes on
    /// while the machine sleeps (CLOCK_BOOTTIME), so that a deadline is never stretched by a nap.
    fn monotonic(&self) -> Duration;

    /// The wall clock, in milliseconds since the Unix epoch; zero if it is set before that.
    fn wall(&self) -> u64;

    /// Whether somebody sees to it that the wall clock is right. One that does not know says no:
    /// it is then not believed where that could end something too early.
    fn wall_is_synchronised(&self) -> bool {
        false
    }

    /// What names the stretch over which [`Clock::monotonic`] counts on: from one boot of the
    /// machine to the next. `None` if that is not known.
    fn boot_id(&self) -> Option<String> {
        None
    }
}

/// The clocks of this machine.
#[derive(Clone, Copy, Debug, Default)]
pub struct SystemClock;

impl Clock for SystemClock {
    fn monotonic(&self) -> Duration {
        let now = clock_gettime(ClockId::Boottime);
        // The kernel counts up from boot and keeps nanoseconds below a second.
        Duration::new(
            u64::try_from(now.tv_sec).unwrap_or_default(),
            u32::try_from(now.tv_nsec).unwrap_or_default(),
        )
    }

    #[expect(clippy::disallowed_methods, reason = "this is clock.rs")]
    fn wall(&self) -> u64 {
        let since_epoch = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        since_epoch.map_or(0, |d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX))
    }

    /// What the kernel was told by whoever disciplines the clock (chrony, ntpd, timesyncd, the
    /// host of a container). It forgets at a reboot, so a clock that was only read from the
    /// battery does not count.
    #[cfg(feature = "server")]
    fn wall_is_synchronised(&self) -> bool {
        kernel_says_synchronised()
    }

    fn boot_id(&self) -> Option<String> {
        let id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
        // A time namespace counts from an origin of its own.
        let namespace = std::fs::read_link("/proc/self/ns/time").unwrap_or_default();
        Some(format!("{} {}", id.trim(), namespace.display()))
    }
}

#[cfg(feature = "server")]
fn kernel_says_synchronised() -> bool {
    // SAFETY: a `timex` is plain numbers, for which zeros are valid, and `modes` of zero asks for
    // a reading, which writes to the struct and nowhere else.
    let (state, timex) = unsafe {
        let mut timex: libc::timex = std::mem::zeroed();
        let state = libc::adjtimex(&raw mut timex);
        (state, timex)
    };
    (0..libc::TIME_ERROR).contains(&state) && timex.status & libc::STA_UNSYNC == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clocks_run_forward() {
        let clock = SystemClock;
        let first = clock.monotonic();
        assert!(first > Duration::ZERO);
        assert!(clock.monotonic() >= first);
        // Later than the day on which this was written.
        assert!(clock.wall() > 1_760_000_000_000);
    }
}
