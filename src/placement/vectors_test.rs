//! The published vectors, `vectors.txt`. What stands there is algorithm version 1 for ever, so it
//! is only compared; `UPDATE_GOLDENFILES=1` writes the file if there is none.

use std::fmt::Write as _;
use std::path::Path;

use super::*;

const HEAD: &str = "\
# Test vectors of Quorate's placement of keys on the members of a ring, algorithm version 1.
# The algorithm is written down at the top of mod.rs, beside this file. Lines are words between
# blanks, and belong to the ring above them:
#
#   point NAME I POSITION        the member's point I lies here
#   ring LABEL                   begins a ring, which has the members that follow
#   member NAME WEIGHT SHARE     SHARE of the circle's 2^64 positions are this member's, in decimal
#   key KEY POSITION NAME...     the key lies here; its first three distinct members, in order
#
# A POSITION is a number in hexadecimal; a KEY is the key's bytes in hexadecimal, - if it has none.

version 1
";

/// Lengths at which XXH3-64 changes its ways, five bytes less, and the longest name.
const LENGTHS: [usize; 9] = [1, 3, 4, 11, 12, 123, 124, 235, 236];

fn rings() -> Vec<(&'static str, Vec<(&'static str, u32)>)> {
    let zones = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota"];
    let equal = zones.into_iter().map(|name| (name, 1)).chain([("kappa", 1)]).collect();
    vec![
        ("single", vec![("only", 7)]),
        ("ten-of-equal-weight", equal),
        ("three-that-differ", vec![("node-1", 1), ("node-2", 2), ("node-3", 5)]),
        ("extremes", vec![("10.0.0.1:8080", 1000), ("10.0.0.2:8080", 1), ("straße", 30)]),
    ]
}

fn keys() -> Vec<Vec<u8>> {
    let mut keys = vec![vec![], vec![0], vec![0xff; 40], "ключ".as_bytes().to_vec()];
    keys.extend((0..16).map(|number| format!("user-{number}").into_bytes()));
    // Longer than any of XXH3's short ways.
    keys.push((0..=255).collect());
    keys
}

fn hex(bytes: &[u8]) -> String {
    let digits: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    if digits.is_empty() { "-".to_owned() } else { digits }
}

fn points_of(name: &str) -> Vec<u64> {
    let circle = Circle::new([(name, 1)]).unwrap();
    let mut found = circle.positions.to_vec();
    // The circle has them in the order of their positions; the file speaks of their numbers.
    let number = |i: u32| {
        let bytes = [name.as_bytes(), &[0], &i.to_le_bytes()].concat();
        xxh3_64(&bytes)
    };
    let points: Vec<u64> = (0..POINTS_PER_MEMBER).map(number).collect();
    let mut sorted = points.clone();
    sorted.sort_unstable();
    found.sort_unstable();
    assert_eq!(found, sorted, "{name}");
    points
}

fn render() -> String {
    let mut text = HEAD.to_owned();
    let mut names: Vec<String> = LENGTHS.iter().map(|length| "n".repeat(*length)).collect();
    names.push("straße".to_owned());
    names.push("x".repeat(NAME_BYTES_MAX));
    text.push('\n');
    for name in names {
        let points = points_of(&name);
        for point in [0, 1, 2_047] {
            writeln!(text, "point {name} {point} {:016x}", points[point]).unwrap();
        }
    }
    for (label, members) in rings() {
        writeln!(text, "\nring {label}").unwrap();
        let circle = Circle::new(members).unwrap();
        for Share { member, positions } in circle.shares() {
            writeln!(text, "member {} {} {positions}", member.name, member.weight).unwrap();
        }
        for key in keys() {
            write!(text, "key {} {:016x}", hex(&key), xxh3_64(&key)).unwrap();
            for member in circle.locate_distinct(&key, 3) {
                write!(text, " {}", member.name).unwrap();
            }
            text.push('\n');
        }
    }
    text
}

#[test]
fn placement_is_as_published() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/placement/vectors.txt");
    let rendered = render();
    assert_eq!(ALGORITHM_VERSION, 1, "another algorithm has vectors of its own");
    if !path.exists() && std::env::var_os("UPDATE_GOLDENFILES").is_some() {
        std::fs::write(&path, &rendered).unwrap();
    }
    let published = std::fs::read_to_string(&path).unwrap();
    for (number, (found, expected)) in rendered.lines().zip(published.lines()).enumerate() {
        assert_eq!(found, expected, "line {}", number + 1);
    }
    assert_eq!(rendered.len(), published.len());
}
