//! Who serves each position of a circle, exactly.
//!
//! A walk counter-clockwise, on which costs rise evenly: that of a point by 1/weight a position. A
//! point that is met costs nothing there, so it serves. From there on only a heavier point that was
//! met before can overtake it, since its cost rises more slowly; a lighter or equal one never does
//! and is forgotten. So what is still to be reckoned with is a stack whose weights rise towards its
//! bottom, a handful of points even in a large ring.
//!
//! One lap before the one that counts brings the points in view that lie beyond position 0. Those
//! of the first lap that are further than a lap away do no harm: the same point has been met again,
//! nearer.

use std::ops::RangeInclusive;

use super::{Circle, POSITIONS};

/// Calls `serve` with ranges of positions, from the highest down, and who serves them. Together
/// they are the circle.
pub(super) fn walk(circle: &Circle, mut serve: impl FnMut(u16, RangeInclusive<u64>)) {
    let lap = POSITIONS as i128;
    let mut walk = Walk { stack: Vec::new(), next: 2 * lap - 1 };
    for start in [lap, 0] {
        let mut count = |owner, low: i128, high: i128| {
            // On the second lap positions are what they are.
            if start == 0
                && let (Ok(low), Ok(high)) = (u64::try_from(low), u64::try_from(high))
            {
                serve(owner, low..=high);
            }
        };
        for (position, owner) in circle.positions.iter().zip(&circle.owners).rev() {
            let position = start + i128::from(*position);
            walk.to(position + 1, &mut count);
            walk.meet(Met { position, owner: *owner, weight: circle.weight(*owner).into() });
        }
        walk.to(start, &mut count);
    }
}

struct Walk {
    /// The last one serves now.
    stack: Vec<Met>,
    /// The highest position of which nobody has said who serves it.
    next: i128,
}

#[derive(Clone, Copy)]
struct Met {
    position: i128,
    owner: u16,
    weight: i128,
}

impl Walk {
    /// Says who serves the positions from the next down to `last`.
    fn to(&mut self, last: i128, count: &mut impl FnMut(u16, i128, i128)) {
        while self.next >= last {
            let Some((serving, waiting)) = self.stack.split_last() else {
                // Before the first point of the first lap.
                self.next = last - 1;
                return;
            };
            // A division is much dearer than to see that nobody overtakes, which is the rule.
            let ahead =
                waiting.iter().enumerate().filter(|(_, other)| other.is_ahead(serving, last));
            // Of two at one position the later, which is the lighter: whether the heavier has
            // overtaken that one too is the next question.
            let first = ahead.map(|(depth, other)| (other.overtakes(serving), depth)).max();
            let (end, depth) = first.unwrap_or((last - 1, waiting.len()));
            if self.next > end {
                count(serving.owner, end + 1, self.next);
                self.next = end;
            }
            self.stack.truncate(depth + 1);
        }
    }

    fn meet(&mut self, point: Met) {
        while self.stack.pop_if(|other| other.weight <= point.weight).is_some() {}
        self.stack.push(point);
    }
}

impl Met {
    /// Whether this one comes before `serving` at `position`.
    fn is_ahead(&self, serving: &Met, position: i128) -> bool {
        let cost = (self.position - position) * serving.weight;
        (cost, self.owner) < ((serving.position - position) * self.weight, serving.owner)
    }

    /// The highest position at which this one comes before `serving`, which is lighter and was met
    /// later. With positions p and q and weights v and w, this one's first: at x the cost is lower
    /// where (p - x)·w < (q - x)·v, that is x·(v - w) < q·v - p·w.
    fn overtakes(&self, serving: &Met) -> i128 {
        let bound = serving.position * self.weight - self.position * serving.weight;
        let wins_ties = self.owner < serving.owner;
        let bound = if wins_ties { bound } else { bound - 1 };
        bound.div_euclid(self.weight - serving.weight)
    }
}
