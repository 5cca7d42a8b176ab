//! What goes wrong around a node, told in one plain line when it begins and one when it ends.
//!
//! Whoever reads a log at night wants to know what is wrong and what to do. So the lines are about
//! causes that can be mended: nodes that do not answer, a disk that is slow or full, a machine that
//! does not let the node run. [`Troubles`] decides what there is to say, from one observation after
//! the other; [`watch`] observes.
//!
//! - A trouble is told once, when it has lasted for so long that it is none of the system's own
//!   doing, such as an election; and its end only if its beginning was.
//! - Nobody is blamed for what was not to be seen: before a node began to lead, or while it stood
//!   still, nobody could be heard.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinHandle;

use super::node::Node;

/// How often a node looks around.
const LOOK_INTERVAL: Duration = Duration::from_millis(500);
/// Looks from one measurement of the free space to the next.
const LOOKS_PER_MEASUREMENT: u32 = 10;
/// More than any pause of a node that is let run.
const STANDSTILL_MIN: Duration = Duration::from_secs(2);
/// Time without a leader that is worth a line, and election timeouts that are: more than elections
/// take, also where the first ones fail.
const LEADERLESS_MIN: Duration = Duration::from_secs(3);
const ELECTIONS_MIN: u32 = 6;
/// How long a follower says nothing before it is missed, if elections do not take as long.
const SILENCE_MIN: Duration = Duration::from_secs(5);
/// A sync this slow delays whoever waits for it by more than all else together.
const SLOW_SYNC_MIN: Duration = Duration::from_millis(200);
/// How long all syncs have to be fast before the disk counts as well.
const FAST_AGAIN_MIN: Duration = Duration::from_secs(30);
/// Free space below which it is time to act: checkpoints and snapshots take more than the log.
const FREE_BYTES_MIN: u64 = 256 << 20;
/// Free space without which the log cannot go on.
const SEGMENT_BYTES: u64 = 16 << 20;

/// What a node sees at one moment.
#[derive(Clone, Debug, Default)]
pub(super) struct Observation {
    /// Local monotonic time.
    pub(super) now: Duration,
    /// The leader that is heard: by this node, or if it is this node, by a majority.
    pub(super) leader: Option<u64>,
    /// Whether this node leads, or thinks so.
    pub(super) leads: bool,
    /// The other members, and the local monotonic time at which each was last heard.
    pub(super) peers: BTreeMap<u64, Option<Duration>>,
    /// The slowest sync of the log since the last observation.
    pub(super) slowest_sync: Duration,
    /// Space that is left for the data directory, where it is known.
    pub(super) free_bytes: Option<u64>,
}

/// A line for the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Line {
    /// Something is wrong.
    Begins(String),
    /// It is not wrong any more.
    Ends(String),
}

/// What is wrong at present, as far as it was told.
pub(super) struct Troubles {
    /// How the data directory is called.
    directory: String,
    /// How long there has to be no leader before that is told. Whoever answers at all is heard
    /// within that time, as all stand for election.
    leaderless_min: Duration,
    looked_at: Duration,
    /// Before this nobody could have been heard.
    listening_since: Duration,
    leads_since: Option<Duration>,
    leaderless_since: Option<Duration>,
    leaderless_told: bool,
    /// Who is missed, and since when.
    missed: BTreeMap<u64, Duration>,
    slow: Option<SlowDisk>,
    full: bool,
}

#[derive(Clone, Copy)]
struct SlowDisk {
    since: Duration,
    last: Duration,
    worst: Duration,
}

impl Troubles {
    pub(super) fn new(directory: String, election_timeout: Duration, now: Duration) -> Self {
        Self {
            directory,
            leaderless_min: LEADERLESS_MIN.max(election_timeout * ELECTIONS_MIN),
            looked_at: now,
            listening_since: now,
            leads_since: None,
            leaderless_since: None,
            leaderless_told: false,
            missed: BTreeMap::new(),
            slow: None,
            full: false,
        }
    }

    /// Takes note of what is seen, and returns what there is to say of it.
    pub(super) fn observe(&mut self, seen: &Observation) -> Vec<Line> {
        let mut lines = Vec::new();
        self.standstill(seen, &mut lines);
        self.leader(seen, &mut lines);
        self.followers(seen, &mut lines);
        self.syncs(seen, &mut lines);
        self.space(seen, &mut lines);
        lines
    }

    fn standstill(&mut self, seen: &Observation, lines: &mut Vec<Line>) {
        let before = std::mem::replace(&mut self.looked_at, seen.now);
        let gap = seen.now.saturating_sub(before);
        if gap < STANDSTILL_MIN {
            return;
        }
        lines.push(Line::Begins(format!(
            "this node stood still for {}: it or its machine was stopped, or gets too little of \
             the processor",
            length_text(gap)
        )));
        self.listening_since = seen.now;
        self.leads_since = None;
        if !self.leaderless_told {
            self.leaderless_since = None;
        }
    }

    fn leader(&mut self, seen: &Observation, lines: &mut Vec<Line>) {
        if let Some(leader) = seen.leader {
            let since = self.leaderless_since.take();
            if std::mem::take(&mut self.leaderless_told) {
                let length = length_text(seen.now.saturating_sub(since.unwrap_or(seen.now)));
                let leads = if seen.leads {
                    "this node leads, and a majority follows".to_owned()
                } else {
                    format!("node {leader} leads")
                };
                lines.push(Line::Ends(format!("{leads}: there was no leader for {length}")));
            }
            return;
        }
        let since = *self.leaderless_since.get_or_insert(seen.now);
        let length = seen.now.saturating_sub(since);
        if length < self.leaderless_min || self.leaderless_told {
            return;
        }
        self.leaderless_told = true;
        let silent: Vec<u64> = seen
            .peers
            .iter()
            .filter(|(_, heard)| self.silence(seen.now, **heard) >= self.leaderless_min)
            .map(|(node, _)| *node)
            .collect();
        let trouble =
            if seen.leads { "this node leads, but no majority has followed" } else { "no leader" };
        let cause = match silent.len() {
            0 => "all nodes answer; their logs say why they elect nobody".to_owned(),
            1 => format!("node {} does not answer; start it, or mend its network", silent[0]),
            _ => format!("nodes {} do not answer; start them, or mend the network", list(&silent)),
        };
        lines.push(Line::Begins(format!("{trouble} for {}: {cause}", length_text(length))));
    }

    fn followers(&mut self, seen: &Observation, lines: &mut Vec<Line>) {
        if !seen.leads {
            // Whoever leads knows better.
            self.leads_since = None;
            self.missed.clear();
            return;
        }
        let leads_since = *self.leads_since.get_or_insert(seen.now);
        self.missed.retain(|node, _| seen.peers.contains_key(node));
        for (node, heard) in &seen.peers {
            let silence = self.silence(seen.now, *heard).min(seen.now.saturating_sub(leads_since));
            if silence < SILENCE_MIN.max(self.leaderless_min) {
                if heard.is_some_and(|heard| self.missed.get(node).is_some_and(|at| heard > *at))
                    && let Some(since) = self.missed.remove(node)
                {
                    let length = length_text(seen.now.saturating_sub(since));
                    lines.push(Line::Ends(format!("node {node} answers again, after {length}")));
                }
            } else if !self.leaderless_told && !self.missed.contains_key(node) {
                self.missed.insert(*node, seen.now.saturating_sub(silence));
                lines.push(Line::Begins(format!(
                    "node {node} has not answered for {}: start it, or mend its machine or its \
                     network",
                    length_text(silence)
                )));
            }
        }
    }

    fn syncs(&mut self, seen: &Observation, lines: &mut Vec<Line>) {
        let slowest = seen.slowest_sync;
        if slowest >= SLOW_SYNC_MIN {
            if self.slow.is_none() {
                lines.push(Line::Begins(format!(
                    "slow fsync: {}; all writes wait for the disk under {}: find out what else \
                     uses it, or whether it fails",
                    length_text(slowest),
                    self.directory
                )));
            }
            let slow = SlowDisk { since: seen.now, last: seen.now, worst: slowest };
            let slow = self.slow.get_or_insert(slow);
            slow.last = seen.now;
            slow.worst = slow.worst.max(slowest);
            return;
        }
        if let Some(SlowDisk { since, last, worst }) = self.slow
            && seen.now.saturating_sub(last) >= FAST_AGAIN_MIN
        {
            self.slow = None;
            lines.push(Line::Ends(format!(
                "fsync is fast again under {}: it was slow for {}, {} at worst",
                self.directory,
                length_text(last.saturating_sub(since).max(worst)),
                length_text(worst)
            )));
        }
    }

    fn space(&mut self, seen: &Observation, lines: &mut Vec<Line>) {
        let Some(free) = seen.free_bytes else { return };
        let (directory, mebibytes) = (&self.directory, free >> 20);
        if free < FREE_BYTES_MIN && !self.full {
            self.full = true;
            let how = if free < SEGMENT_BYTES { "full" } else { "almost full" };
            lines.push(Line::Begins(format!(
                "disk {how}: {directory} has {mebibytes} MiB left; make room, as a node halts that \
                 cannot write"
            )));
        } else if free >= FREE_BYTES_MIN + FREE_BYTES_MIN / 4 && self.full {
            self.full = false;
            lines.push(Line::Ends(format!(
                "disk not full any more: {directory} has {mebibytes} MiB left"
            )));
        }
    }

    /// How long somebody has said nothing who could have been heard.
    fn silence(&self, now: Duration, heard: Option<Duration>) -> Duration {
        now.saturating_sub(heard.unwrap_or_default().max(self.listening_since))
    }
}

/// `301 ms`, `43 s`, `12 min`.
fn length_text(length: Duration) -> String {
    match length.as_secs() {
        0 => format!("{} ms", length.as_millis()),
        seconds @ 1..120 => format!("{seconds} s"),
        seconds => format!("{} min", seconds / 60),
    }
}

/// `1, 2 and 3`.
fn list(nodes: &[u64]) -> String {
    let names: Vec<String> = nodes.iter().map(ToString::to_string).collect();
    match names.split_last() {
        Some((last, [])) => last.clone(),
        Some((last, rest)) => format!("{} and {last}", rest.join(", ")),
        None => String::new(),
    }
}

/// Looks around for as long as the node lives, and logs what there is to say.
pub(super) async fn watch(node: Arc<Node>) {
    let directory = node.options.data_directory.clone();
    let election_timeout = node.options.timeouts.election_timeout;
    let name = directory.display().to_string();
    let mut troubles = Troubles::new(name, election_timeout, node.monotonic());
    // A disk that hangs keeps a thread, and none of the rest.
    let mut measuring: Option<JoinHandle<Option<u64>>> = None;
    let mut looks = 0_u32;
    loop {
        tokio::time::sleep(LOOK_INTERVAL).await;
        let mut seen = node.observation();
        if let Some(measured) = measuring.take_if(|measuring| measuring.is_finished()) {
            seen.free_bytes = measured.await.ok().flatten();
        }
        if measuring.is_none() && looks.is_multiple_of(LOOKS_PER_MEASUREMENT) {
            let directory = directory.clone();
            measuring = Some(tokio::task::spawn_blocking(move || {
                let system = rustix::fs::statvfs(&directory).ok()?;
                system.f_bavail.checked_mul(system.f_frsize)
            }));
        }
        looks = looks.wrapping_add(1);
        let node_id = node.node_id();
        for line in troubles.observe(&seen) {
            match line {
                Line::Begins(line) => tracing::warn!(node_id, "{line}"),
                Line::Ends(line) => tracing::info!(node_id, "{line}"),
            }
        }
    }
}

impl Node {
    /// What this node sees of itself and the others. A node that belongs to no cluster misses
    /// nobody.
    fn observation(&self) -> Observation {
        let own = self.node_id();
        let mut seen =
            Observation { now: self.monotonic(), leader: Some(own), ..Observation::default() };
        let Some(replica) = self.replica() else { return seen };
        let leader = self.leader_id();
        seen.leads = leader == Some(own);
        seen.leader = leader.filter(|_| !seen.leads || self.has_majority());
        let mut heard = replica.clock.last_heard();
        let others = replica.members().into_keys().filter(|node| *node != own);
        seen.peers = others.map(|node| (node, heard.remove(&node))).collect();
        seen.slowest_sync = replica.wal.take_slowest_sync();
        seen
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A cluster of three as node 1 sees it, every half second.
    struct Scene {
        troubles: Troubles,
        seen: Observation,
        silent: Vec<u64>,
    }

    impl Scene {
        fn new() -> Self {
            let now = Duration::from_secs(100);
            let seen = Observation {
                now,
                leader: Some(1),
                leads: true,
                peers: BTreeMap::from([(2, Some(now)), (3, Some(now))]),
                ..Observation::default()
            };
            let troubles = Troubles::new("data/1".to_owned(), Duration::from_millis(500), now);
            Self { troubles, seen, silent: Vec::new() }
        }

        /// Lets time pass, and returns what was said.
        fn pass(&mut self, seconds: f64) -> Vec<String> {
            let end = self.seen.now + Duration::from_secs_f64(seconds);
            let mut said = Vec::new();
            while self.seen.now < end {
                self.seen.now += LOOK_INTERVAL;
                said.extend(self.look());
            }
            said
        }

        fn look(&mut self) -> Vec<String> {
            for (node, heard) in &mut self.seen.peers {
                if !self.silent.contains(node) {
                    *heard = Some(self.seen.now);
                }
            }
            let lines = self.troubles.observe(&self.seen);
            lines
                .into_iter()
                .map(|line| match line {
                    Line::Begins(line) => format!("! {line}"),
                    Line::Ends(line) => format!("  {line}"),
                })
                .collect()
        }
    }

    #[test]
    fn a_healthy_cluster_and_an_election_say_nothing() {
        let mut scene = Scene::new();
        assert!(scene.pass(60.0).is_empty());
        scene.seen.leader = None;
        assert!(scene.pass(2.0).is_empty());
        (scene.seen.leader, scene.seen.leads) = (Some(3), false);
        assert!(scene.pass(60.0).is_empty());
    }

    #[test]
    fn a_lost_quorum_names_those_who_are_missing() {
        let mut scene = Scene::new();
        scene.seen.leads = false;
        scene.seen.leader = Some(3);
        scene.pass(10.0);
        (scene.silent, scene.seen.leader) = (vec![2, 3], None);
        assert_eq!(
            scene.pass(60.0),
            ["! no leader for 3 s: nodes 2 and 3 do not answer; start them, or mend the network"]
        );
        (scene.silent, scene.seen.leader) = (vec![], Some(2));
        assert_eq!(scene.pass(30.0), ["  node 2 leads: there was no leader for 60 s"]);
    }

    #[test]
    fn a_leader_without_its_majority_says_so_once() {
        let mut scene = Scene::new();
        scene.pass(10.0);
        (scene.silent, scene.seen.leader) = (vec![2, 3], None);
        assert_eq!(
            scene.pass(20.0),
            ["! this node leads, but no majority has followed for 3 s: nodes 2 and 3 do not \
              answer; start them, or mend the network"]
        );
        (scene.silent, scene.seen.leader) = (vec![3], Some(1));
        assert_eq!(
            scene.pass(5.0),
            [
                "  this node leads, and a majority follows: there was no leader for 20 s",
                "! node 3 has not answered for 20 s: start it, or mend its machine or its network"
            ]
        );
    }

    #[test]
    fn nobody_leads_though_all_answer() {
        let mut scene = Scene::new();
        (scene.seen.leader, scene.seen.leads) = (None, false);
        assert_eq!(
            scene.pass(20.0),
            ["! no leader for 3 s: all nodes answer; their logs say why they elect nobody"]
        );
    }

    #[test]
    fn a_follower_is_missed_by_the_leader_and_by_nobody_else() {
        let mut scene = Scene::new();
        scene.pass(10.0);
        scene.silent = vec![2];
        assert_eq!(
            scene.pass(43.0),
            ["! node 2 has not answered for 5 s: start it, or mend its machine or its network"]
        );
        scene.silent = vec![];
        assert_eq!(scene.pass(10.0), ["  node 2 answers again, after 43 s"]);

        let mut scene = Scene::new();
        (scene.seen.leader, scene.seen.leads, scene.silent) = (Some(3), false, vec![2]);
        assert!(scene.pass(60.0).is_empty());
        // A new leader has to have asked first.
        (scene.seen.leader, scene.seen.leads) = (Some(1), true);
        assert!(scene.pass(4.0).is_empty());
        assert_eq!(scene.pass(4.0).len(), 1);
        // A member that is removed is not missed any more.
        scene.seen.peers.remove(&2);
        assert!(scene.pass(10.0).is_empty());
    }

    #[test]
    fn a_node_that_stood_still_blames_nobody() {
        let mut scene = Scene::new();
        scene.seen.now += Duration::from_secs(4);
        assert_eq!(scene.look().len(), 1, "also before its first look");
        scene.pass(10.0);
        scene.silent = vec![2, 3];
        scene.seen.now += Duration::from_secs(60);
        scene.seen.leader = None;
        let said = scene.look();
        assert_eq!(said.len(), 1, "{said:?}");
        assert!(said[0].starts_with("! this node stood still for 60 s: "), "{said:?}");
        assert!(scene.pass(2.0).is_empty());
        (scene.silent, scene.seen.leader) = (vec![], Some(1));
        assert!(scene.pass(20.0).is_empty());
    }

    #[test]
    fn a_slow_disk_is_told_once_until_it_is_fast_again() {
        let mut scene = Scene::new();
        scene.seen.slowest_sync = Duration::from_millis(301);
        assert_eq!(
            scene.pass(0.5),
            ["! slow fsync: 301 ms; all writes wait for the disk under data/1: find out what \
                 else uses it, or whether it fails"]
        );
        for _ in 0..3 {
            scene.seen.slowest_sync = Duration::from_millis(1);
            assert!(scene.pass(10.0).is_empty());
            scene.seen.slowest_sync = Duration::from_millis(950);
            assert!(scene.pass(0.5).is_empty());
        }
        scene.seen.slowest_sync = Duration::from_millis(1);
        assert_eq!(
            scene.pass(60.0),
            ["  fsync is fast again under data/1: it was slow for 31 s, 950 ms at worst"]
        );
    }

    #[test]
    fn a_full_disk_is_told_before_it_is_too_late() {
        let mut scene = Scene::new();
        scene.seen.free_bytes = Some(100 << 20);
        assert_eq!(
            scene.pass(10.0),
            ["! disk almost full: data/1 has 100 MiB left; make room, as a node halts that \
                 cannot write"]
        );
        scene.seen.free_bytes = None;
        assert!(scene.pass(10.0).is_empty());
        // Not at every file that comes and goes.
        scene.seen.free_bytes = Some(FREE_BYTES_MIN + 1);
        assert!(scene.pass(10.0).is_empty());
        scene.seen.free_bytes = Some(2 << 30);
        assert_eq!(scene.pass(10.0), ["  disk not full any more: data/1 has 2048 MiB left"]);
        scene.seen.free_bytes = Some(3 << 20);
        let said = scene.pass(1.0);
        assert!(said[0].starts_with("! disk full: data/1 has 3 MiB left; "), "{said:?}");
    }
}
