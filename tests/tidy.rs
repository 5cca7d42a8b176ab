//! The house rules that no compiler knows: layers, sizes, names, and what lies in the root.
//!
//! Each complaint is one line: file, line, rule. Code is looked at without its comments and
//! strings, so that both may speak of what code may not use. What is not seen: names that a macro
//! makes up, and a forbidden crate under another name.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on says where")]

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

/// Columns of a line.
const COLUMNS_MAX: usize = 100;
/// Lines of a file before its tests.
const LINES_MAX: usize = 900;

/// What each part of the crate may know of the others. Dependencies point down only.
const LAYERS: [(&str, &[&str]); 14] = [
    ("src/limits.rs", &[]),
    ("src/clock.rs", &[]),
    ("src/proto.rs", &[]),
    ("src/session_id.rs", &["limits"]),
    ("src/accept.rs", &[]),
    ("src/placement/", &["limits"]),
    ("src/state/", &["state", "limits", "placement", "proto::stored"]),
    ("src/storage/", &["storage"]),
    ("src/raft/", &["raft", "state", "storage", "accept", "clock", "limits", "proto::peer"]),
    ("src/service/", &["service", "raft", "state", "limits", "placement", "session_id"]),
    ("src/wire/", &["wire", "service", "raft", "state", "accept", "limits", "proto"]),
    ("src/server.rs", &["wire", "raft", "clock", "limits"]),
    ("src/client/", &["client", "clock", "limits", "placement", "session_id", "proto::v1"]),
    ("src/cli/", &["cli", "client", "server", "raft", "clock", "limits", "proto::v1"]),
];

/// Words that may stand in some files only: the word, where, why.
const CONFINED: [(&str, &[&str], &str); 14] = [
    ("openraft", &["src/raft/"], "openraft stops at the raft layer"),
    ("sled::", &["src/storage/sled.rs"], "sled stops at one file of the storage"),
    (
        "tonic",
        &["src/raft/", "src/wire/", "src/client/", "src/accept.rs", "src/proto.rs", "tests/"],
        "gRPC stops at the wire, the peers' network and the client",
    ),
    ("proto::stored", &["src/state/codec"], "what is stored is known to one codec"),
    ("proto::peer", &["src/raft/"], "what peers say is known to the raft layer"),
    ("bincode", &["src/storage/envelope.rs"], "bincode stops at the envelope"),
    ("clap", &["src/cli/"], "arguments are the command line's"),
    ("serde_json", &["src/cli/", "tests/"], "JSON is the command line's"),
    ("indicatif", &["src/cli/"], "progress is the command line's"),
    ("hdrhistogram", &["src/cli/"], "percentiles are the command line's"),
    (
        "prost",
        &["src/state/codec", "src/wire/", "src/client/", "src/storage/envelope.rs"],
        "see DESIGN §3",
    ),
    ("unsafe", &["src/clock.rs"], "there is no unsafe code but one system call"),
    ("transmute", &[], "there is no unsafe code"),
    ("static mut", &[], "nothing is global"),
];

/// What would make the core depend on anything but the log.
const IMPURE: [&str; 20] = [
    "tokio",
    "sled",
    "tonic",
    "openraft",
    "futures_util",
    "tracing",
    "HashMap",
    "HashSet",
    "hashbrown",
    "Instant",
    "SystemTime",
    "rand",
    "getrandom",
    "RandomState",
    "async",
    "await",
    "thread",
    "Mutex",
    "env",
    "fs",
];

/// What the root will hold and does not yet.
const ROOT_LATER: [&str; 1] = ["docker-compose.yml"];

/// Unfinished work.
const UNFINISHED: [&str; 3] = ["todo!", "unimplemented!", "dbg!"];

/// The root, as it was fixed.
const ROOT: [&str; 9] = [
    "Cargo.lock",
    "Cargo.toml",
    "LICENSE-APACHE",
    "LICENSE-MIT",
    "README.md",
    "benches",
    "build.rs",
    "proto",
    "src",
];

struct Source {
    /// Relative to the root, with forward slashes.
    path: String,
    lines: Vec<String>,
    /// The same lines with comments and the insides of strings blanked.
    code: Vec<String>,
}

impl Source {
    fn is_in(&self, places: &[&str]) -> bool {
        places.iter().any(|place| self.path.starts_with(place))
    }

    /// Numbered from 1.
    fn numbered(&self) -> impl Iterator<Item = (usize, &str, &str)> {
        let both = self.lines.iter().zip(&self.code).enumerate();
        both.map(|(index, (line, code))| (index + 1, line.as_str(), code.as_str()))
    }
}

#[derive(Default)]
struct Complaints(String);

impl Complaints {
    fn add(&mut self, path: &str, line: usize, rule: impl std::fmt::Display) {
        writeln!(self.0, "{path}:{line}: {rule}").unwrap();
    }

    fn settle(self) {
        assert!(self.0.is_empty(), "\n{}", self.0);
    }
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn files(directory: &str, extension: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut open = vec![root().join(directory)];
    while let Some(directory) = open.pop() {
        for entry in fs::read_dir(&directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                open.push(path);
            } else if path.extension().is_some_and(|found| found == extension) {
                found.push(path);
            }
        }
    }
    found.sort();
    found
}

fn sources(directories: &[&str], extension: &str) -> Vec<Source> {
    let paths = directories.iter().flat_map(|directory| files(directory, extension));
    let sources: Vec<Source> = paths
        .map(|path| {
            let text = fs::read_to_string(&path).unwrap();
            let relative = path.strip_prefix(root()).unwrap().to_str().unwrap().to_owned();
            Source { path: relative, lines: lines(&text), code: lines(&code_of(&text)) }
        })
        .collect();
    assert!(!sources.is_empty(), "no files were found in {directories:?}");
    sources
}

fn lines(text: &str) -> Vec<String> {
    text.lines().map(str::to_owned).collect()
}

fn rust_sources() -> Vec<Source> {
    sources(&["src", "tests", "benches"], "rs")
}

/// Rust with its comments, and what its strings and characters hold, replaced by blanks.
fn code_of(text: &str) -> String {
    let mut code = String::with_capacity(text.len());
    let mut rest = text;
    let mut before = ' ';
    while let Some(first) = rest.chars().next() {
        let skipped = skipped_length(rest, before);
        let taken = if skipped == 0 { first.len_utf8() } else { skipped };
        let (piece, after) = rest.split_at(taken);
        if skipped == 0 {
            code.push(first);
        } else {
            code.extend(piece.chars().map(|c| if c == '\n' { '\n' } else { ' ' }));
        }
        before = piece.chars().next_back().unwrap();
        rest = after;
    }
    code
}

/// Length of the comment, string or character that `rest` begins with; 0 if it does not.
fn skipped_length(rest: &str, before: char) -> usize {
    let whole = rest.len();
    let to = |end: Option<usize>, length: usize| end.map_or(whole, |at| at + length);
    if rest.starts_with("//") {
        return to(rest.find('\n'), 0);
    }
    if rest.starts_with("/*") {
        return to(rest.find("*/"), 2);
    }
    if let Some(string) = rest.strip_prefix('"') {
        return 1 + escaped_length(string, '"');
    }
    let raw = rest.strip_prefix('r').filter(|_| !is_word(before) || before == 'b');
    if let Some(raw) = raw {
        let hashes = raw.len() - raw.trim_start_matches('#').len();
        if raw[hashes..].starts_with('"') {
            let end = format!("\"{}", "#".repeat(hashes));
            let body = 2 + hashes;
            return to(rest[body..].find(&end), body + end.len());
        }
    }
    if let Some(character) = rest.strip_prefix('\'') {
        // Anything else that begins so is a lifetime or a label.
        let mut chars = character.chars();
        match (chars.next(), chars.next()) {
            (Some('\\'), _) => return 1 + escaped_length(character, '\''),
            (Some(c), Some('\'')) => return 2 + c.len_utf8(),
            _ => {}
        }
    }
    0
}

/// Length up to and with the first `end` that no backslash escapes.
fn escaped_length(text: &str, end: char) -> usize {
    let mut escaped = false;
    for (at, c) in text.char_indices() {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            _ if c == end => return at + c.len_utf8(),
            _ => {}
        }
    }
    text.len()
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// Whether `code` holds `word` by itself: no longer name, and nobody else's member.
fn has_word(code: &str, word: &str) -> bool {
    code.match_indices(word).any(|(at, _)| {
        let starts = word.starts_with(is_word);
        let ends = word.ends_with(is_word);
        let before = code[..at].chars().next_back();
        let after = code[at + word.len()..].chars().next();
        // `super::sled::` is our module, not the crate.
        let member = word.ends_with("::") && code[..at].ends_with("::");
        !(starts && before.is_some_and(is_word) || ends && after.is_some_and(is_word) || member)
    })
}

/// Paths that begin with `crate::`, without that and with what follows one level down.
fn own_paths(code: &str) -> Vec<String> {
    let names = |text: &str| -> Vec<String> {
        let name: String = text.chars().take_while(|c| is_word(*c)).collect();
        match text[name.len()..].strip_prefix("::{") {
            Some(list) => {
                let list = list.split('}').next().unwrap_or_default();
                list.split(',').map(|item| format!("{name}::{}", item.trim())).collect()
            }
            None => match text[name.len()..].strip_prefix("::") {
                Some(next) => {
                    let next: String = next.chars().take_while(|c| is_word(*c)).collect();
                    vec![format!("{name}::{next}")]
                }
                None => vec![name],
            },
        }
    };
    code.match_indices("crate::").flat_map(|(at, found)| names(&code[at + found.len()..])).collect()
}

#[test]
fn layers_point_down() {
    let mut complaints = Complaints::default();
    for source in sources(&["src"], "rs") {
        let Some((layer, known)) = LAYERS.iter().find(|(layer, _)| source.is_in(&[layer])) else {
            let open = ["src/lib.rs", "src/bin/"];
            if !source.is_in(&open) {
                complaints.add(&source.path, 1, "belongs to no layer; name it in tests/tidy.rs");
            }
            continue;
        };
        for (number, _, code) in source.numbered() {
            for path in own_paths(code) {
                let allowed =
                    |known: &&str| path == **known || path.starts_with(&format!("{known}::"));
                if !known.iter().any(allowed) {
                    let rule = format!("{layer} must not know of crate::{path}");
                    complaints.add(&source.path, number, rule);
                }
            }
        }
    }
    complaints.settle();
}

#[test]
fn foreign_words_stay_where_they_belong() {
    let mut complaints = Complaints::default();
    for source in sources(&["src"], "rs") {
        for (number, _, code) in source.numbered() {
            for (word, places, why) in &CONFINED {
                if has_word(code, word) && !source.is_in(places) {
                    complaints.add(&source.path, number, format!("`{word}`: {why}"));
                }
            }
        }
    }
    complaints.settle();
}

#[test]
fn the_core_is_pure() {
    let mut complaints = Complaints::default();
    for source in sources(&["src/state", "src/placement"], "rs") {
        // Tests and scripts of the core may read files; what they test may not.
        let is_test = source.path.ends_with("_test.rs");
        for (number, _, code) in before_tests(&source) {
            for word in IMPURE {
                if has_word(code, word) && !is_test {
                    let rule = format!("`{word}`: the core depends on nothing but the log");
                    complaints.add(&source.path, number, rule);
                }
            }
        }
    }
    complaints.settle();
}

/// The lines above the tests that end a file.
fn before_tests(source: &Source) -> impl Iterator<Item = (usize, &str, &str)> {
    let tests = source.lines.windows(2).position(|pair| {
        pair[0].trim() == "#[cfg(test)]" && pair[1].trim_start().starts_with("mod tests {")
    });
    source.numbered().take(tests.unwrap_or(source.lines.len()))
}

#[test]
fn files_can_be_read_in_one_sitting() {
    let mut complaints = Complaints::default();
    for source in rust_sources() {
        let lines = before_tests(&source).count();
        if lines > LINES_MAX {
            let rule = format!("{lines} lines before the tests; split it at {LINES_MAX}");
            complaints.add(&source.path, LINES_MAX + 1, rule);
        }
        let story = source.lines.iter().any(|line| line.starts_with("//!"));
        // A binary that only starts the library says so in the code.
        if !story {
            complaints.add(&source.path, 1, "begins without `//!`: what is it for?");
        }
    }
    complaints.settle();
}

#[test]
fn lines_fit() {
    let mut complaints = Complaints::default();
    let mut all = rust_sources();
    all.extend(sources(&["proto"], "proto"));
    for source in all {
        for (number, line, _) in source.numbered() {
            let columns = line.chars().count();
            if columns > COLUMNS_MAX {
                let rule = format!("{columns} columns; {COLUMNS_MAX} fit");
                complaints.add(&source.path, number, rule);
            }
            if line.ends_with([' ', '\t']) {
                complaints.add(&source.path, number, "blanks at the end of the line");
            }
            if line.contains('\t') {
                complaints.add(&source.path, number, "a tab");
            }
        }
    }
    complaints.settle();
}

#[test]
fn nothing_is_left_unfinished() {
    let mut complaints = Complaints::default();
    for source in rust_sources() {
        for (number, _, code) in source.numbered() {
            for word in UNFINISHED {
                if has_word(code, word) {
                    complaints.add(&source.path, number, format!("`{word}` is unfinished work"));
                }
            }
        }
    }
    complaints.settle();
}

#[test]
fn tests_are_only_left_out_for_their_length() {
    let mut complaints = Complaints::default();
    for source in rust_sources() {
        for (number, line, code) in source.numbered() {
            let ignored = code.contains("#[ignore");
            if ignored && !line.trim_start().starts_with("#[ignore = \"soak: ") {
                complaints.add(&source.path, number, "#[ignore] needs a reason, \"soak: …\"");
            }
        }
    }
    complaints.settle();
}

#[test]
fn tests_wait_for_conditions() {
    let mut complaints = Complaints::default();
    for source in sources(&["tests"], "rs") {
        // The one place of each program that polls, with a deadline.
        let polls = matches!(&*source.path, "tests/it/cluster.rs" | "tests/in_process/nodes.rs");
        let sleeps = source.numbered().filter(|(_, _, code)| code.contains("sleep("));
        for (number, _, _) in sleeps.skip(usize::from(polls)) {
            complaints.add(&source.path, number, "sleeps; wait for something, with a deadline");
        }
    }
    complaints.settle();
}

#[test]
fn the_root_tells_the_story() {
    let mut found = BTreeSet::new();
    for entry in fs::read_dir(root()).unwrap() {
        found.insert(entry.unwrap().file_name().into_string().unwrap());
    }
    let ignored = fs::read_to_string(root().join(".gitignore")).unwrap();
    let ignored: BTreeSet<&str> =
        ignored.lines().filter_map(|line| line.strip_prefix('/')).collect();
    let fixed: BTreeSet<&str> = ROOT.into_iter().chain(["tests"]).collect();
    let mut complaints = Complaints::default();
    for name in &found {
        let name = name.as_str();
        let known = fixed.contains(name) || ROOT_LATER.contains(&name);
        if !known && !ignored.contains(name) && !name.starts_with('.') {
            complaints.add(name, 1, "does not belong into the root");
        }
    }
    for name in fixed {
        if !found.contains(name) {
            complaints.add(name, 1, "is missing from the root");
        }
    }
    complaints.settle();
}

/// The rules of Buf's category STANDARD, as far as they concern names.
#[test]
fn protos_are_named_as_buf_wants_them() {
    let mut complaints = Complaints::default();
    let mut messages: BTreeMap<String, String> = BTreeMap::new();
    for source in sources(&["proto"], "proto") {
        check_package(&source, &mut complaints);
        let mut blocks: Vec<Block> = Vec::new();
        for (number, _, code) in source.numbered() {
            let mut add = |rule: String| complaints.add(&source.path, number, rule);
            let words: Vec<&str> = code.split_whitespace().collect();
            match words.as_slice() {
                ["message", name, ..] if !is_camel(name) => add(format!("{name}: CamelCase")),
                ["enum", name, ..] if !is_camel(name) => add(format!("{name}: CamelCase")),
                ["service", name, ..] if !name.ends_with("Service") || !is_camel(name) => {
                    add(format!("{name}: a service is CamelCase and ends in Service"));
                }
                ["oneof", name, ..] if !is_snake(name) => add(format!("{name}: lower_snake_case")),
                ["rpc", ..] => check_call(code, &mut messages, &mut add),
                [.., name, "=", _] => match blocks.last_mut() {
                    Some(Block::Enum { name: of, values }) => {
                        check_value(of, name, &words, *values, &mut add);
                        *values += 1;
                    }
                    Some(Block::Fields) if !is_snake(name) => {
                        add(format!("{name}: a field is lower_snake_case"));
                    }
                    _ => {}
                },
                _ => {}
            }
            if code.contains('{') && !code.contains('}') {
                blocks.push(match words.as_slice() {
                    ["enum", name, ..] => Block::Enum { name: (*name).to_owned(), values: 0 },
                    ["message" | "oneof", ..] => Block::Fields,
                    _ => Block::Other,
                });
            } else if code.contains('}') && !code.contains('{') {
                blocks.pop();
            }
        }
    }
    assert!(!messages.is_empty(), "no calls were found");
    complaints.settle();
}

enum Block {
    Enum { name: String, values: usize },
    Fields,
    Other,
}

fn check_package(source: &Source, complaints: &mut Complaints) {
    let directory = source.path.trim_start_matches("proto/").rsplit_once('/').unwrap().0;
    let expected = format!("package {};", directory.replace('/', "."));
    if !source.code.contains(&expected) {
        complaints.add(&source.path, 1, format!("the directory calls for `{expected}`"));
    }
    let version = directory.rsplit('/').next().unwrap();
    let numbered = version.strip_prefix('v').is_some_and(|n| n.parse::<u32>().is_ok());
    if !numbered {
        complaints.add(&source.path, 1, "the package has no version");
    }
    if !source.lines.iter().any(|line| line == "syntax = \"proto3\";") {
        complaints.add(&source.path, 1, "the syntax is not proto3");
    }
    let name = source.path.rsplit('/').next().unwrap().trim_end_matches(".proto");
    if !is_snake(name) {
        complaints.add(&source.path, 1, "the file's name is not lower_snake_case");
    }
}

/// Each call has messages of its own, named after it.
fn check_call(code: &str, messages: &mut BTreeMap<String, String>, add: &mut impl FnMut(String)) {
    let mut names = code
        .split(|c: char| !is_word(c) && c != '.')
        .filter(|word| !word.is_empty() && !["rpc", "stream", "returns"].contains(word));
    let (Some(call), Some(request), Some(response)) = (names.next(), names.next(), names.next())
    else {
        return add("a call on more than one line".to_owned());
    };
    if !is_camel(call) {
        add(format!("{call}: CamelCase"));
    }
    for (message, suffix) in [(request, "Request"), (response, "Response")] {
        if message != format!("{call}{suffix}") {
            add(format!("{message}: {call} takes or gives {call}{suffix}"));
        }
        if let Some(other) = messages.insert(message.to_owned(), call.to_owned()) {
            add(format!("{message}: {other} uses it already"));
        }
    }
}

fn check_value(of: &str, name: &str, words: &[&str], index: usize, add: &mut impl FnMut(String)) {
    let mut prefix = String::new();
    for c in of.chars() {
        if c.is_uppercase() && !prefix.is_empty() {
            prefix.push('_');
        }
        prefix.extend(c.to_uppercase());
    }
    let upper = name.chars().all(|c| c.is_ascii_uppercase() || c.is_ascii_digit() || c == '_');
    if !upper || !name.starts_with(&format!("{prefix}_")) {
        add(format!("{name}: a value of {of} is UPPER_SNAKE_CASE and begins with {prefix}_"));
    }
    let is_zero = words.last().is_some_and(|number| *number == "0;");
    if index == 0 && !(is_zero && name == format!("{prefix}_UNSPECIFIED")) {
        add(format!("{name}: the first value is {prefix}_UNSPECIFIED = 0"));
    }
}

fn is_camel(name: &str) -> bool {
    name.starts_with(|c: char| c.is_ascii_uppercase())
        && name.chars().all(|c| c.is_ascii_alphanumeric())
}

fn is_snake(name: &str) -> bool {
    name.starts_with(|c: char| c.is_ascii_lowercase())
        && name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_')
        && !name.contains("__")
        && !name.ends_with('_')
}

#[test]
fn the_rules_see_code_and_nothing_else() {
    let code =
        code_of("let a = \"sled::x // no\"; // sled::y\nb('\"', 'c', r#\"sled::\"#);/* \n */d");
    assert!(!code.contains("sled"), "{code}");
    assert_eq!(code.lines().count(), 3);
    assert!(code.contains("let a =") && code.contains("b(") && code.ends_with('d'), "{code}");
    assert!(code_of("fn f<'a>(x: &'a str)").contains("'a>(x: &'a str)"));
    assert!(has_word("use sled::Db;", "sled::"));
    assert!(!has_word("use super::sled::Db;", "sled::"));
    assert!(has_word("x.await", "await") && !has_word("awaited", "await"));
    assert_eq!(own_paths("use crate::proto::{v1, peer};"), ["proto::v1", "proto::peer"]);
    assert_eq!(own_paths("crate::state::State"), ["state::State"]);
    assert!(is_snake("node_id") && !is_snake("nodeId") && !is_snake("node__id"));
    assert!(is_camel("NodeRole") && !is_camel("Node_Role"));
}
