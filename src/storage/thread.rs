//! Threads whose end does not go unnoticed.

use std::any::Any;
use std::fmt;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread::{self, JoinHandle};

/// Who is told when a thread ends that nobody has told to.
#[derive(Clone)]
pub struct ThreadWatch(Arc<dyn Fn(&str) + Send + Sync>);

impl ThreadWatch {
    /// `told` is called with one line that says which thread it was, and why. It runs on the thread
    /// that ends.
    pub fn new(told: impl Fn(&str) + Send + Sync + 'static) -> Self {
        Self(Arc::new(told))
    }

    /// Starts a thread. Whoever watches is told if `work` panics, or returns a reason.
    ///
    /// # Errors
    ///
    /// If the system has no thread left.
    pub fn spawn(
        &self,
        name: &'static str,
        work: impl FnOnce() -> Result<(), String> + Send + 'static,
    ) -> io::Result<JoinHandle<()>> {
        let watch = self.clone();
        thread::Builder::new().name(name.to_owned()).spawn(move || {
            match catch_unwind(AssertUnwindSafe(work)) {
                Ok(Ok(())) => {}
                Ok(Err(reason)) => (watch.0)(&reason),
                Err(panic) => {
                    (watch.0)(&format!("thread {name} panicked: {}", panic_message(&*panic)));
                }
            }
        })
    }
}

impl Default for ThreadWatch {
    /// Nobody is told.
    fn default() -> Self {
        Self::new(|_| {})
    }
}

impl fmt::Debug for ThreadWatch {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("ThreadWatch")
    }
}

/// What a panic says.
pub fn panic_message(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message")
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    fn told_of(work: impl FnOnce() -> Result<(), String> + Send + 'static) -> Vec<String> {
        let told = Arc::new(Mutex::new(Vec::new()));
        let telling = told.clone();
        let watch = ThreadWatch::new(move |line| telling.lock().unwrap().push(line.to_owned()));
        watch.spawn("worker", work).unwrap().join().unwrap();
        std::mem::take(&mut told.lock().unwrap())
    }

    #[test]
    fn whoever_watches_hears_of_panics_and_reasons_and_of_nothing_else() {
        assert!(told_of(|| Ok(())).is_empty());
        assert_eq!(told_of(|| Err("the disk is gone".to_owned())), ["the disk is gone"]);
        assert_eq!(told_of(|| panic!("seven of {}", 9)), ["thread worker panicked: seven of 9"]);
        assert_eq!(told_of(|| panic!("plain")), ["thread worker panicked: plain"]);
    }
}
