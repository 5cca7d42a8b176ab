//! Everything that is printed. Results go to standard output, as text for people or as JSON for
//! programs; messages go to standard error.
//!
//! JSON has the names of the protos, numbers as numbers, times in RFC 3339 and lengths as protobuf
//! writes them ("1800s"). Attribute values are strings where they are UTF-8, and otherwise
//! `{"base64": "…"}`.

use std::io::{self, BufWriter, Write as _};
use std::time::{Duration, SystemTime};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use clap::ValueEnum;
use serde_json::{Value, json};

use super::failure::Failure;

/// The first moment that RFC 3339 cannot write: the year 10000.
const YEAR_10000: Duration = Duration::from_secs(253_402_300_800);

/// How results are printed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// Aligned tables.
    #[default]
    Text,
    /// One object, or one a line for lists.
    Json,
}

/// Prints results in one format.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Output {
    pub(crate) format: Format,
}

impl Output {
    /// One result: `text` for people, `json` for programs.
    pub(crate) fn result(self, text: &str, json: &Value) -> Result<(), Failure> {
        let mut out = io::stdout().lock();
        match self.format {
            Format::Text => writeln!(out, "{text}")?,
            Format::Json => writeln!(out, "{json}")?,
        }
        Ok(out.flush()?)
    }

    /// A list: a table for people, an object a line for programs.
    pub(crate) fn list(self, table: &Table, objects: &[Value]) -> Result<(), Failure> {
        let mut out = BufWriter::new(io::stdout().lock());
        match self.format {
            Format::Text => write!(out, "{}", table.render())?,
            Format::Json => {
                for object in objects {
                    writeln!(out, "{object}")?;
                }
            }
        }
        Ok(out.flush()?)
    }
}

/// Says something to whoever runs the command. Nobody may be listening: that is no failure.
pub(crate) fn message(text: &str) {
    let _ = writeln!(io::stderr().lock(), "{text}");
}

/// Says why the command failed.
pub(crate) fn failure(failure: &Failure) {
    if !matches!(failure, Failure::BrokenPipe) {
        message(&format!("quorate: {failure}"));
    }
}

/// Rows of cells, aligned in columns two blanks apart.
#[derive(Debug, Default)]
pub(crate) struct Table {
    rows: Vec<Vec<String>>,
    /// Columns of numbers, which are aligned to the right.
    right: &'static [usize],
}

impl Table {
    /// A table with these headings.
    pub(crate) fn new(headings: &[&str], right: &'static [usize]) -> Self {
        Self { rows: vec![headings.iter().map(|heading| (*heading).to_owned()).collect()], right }
    }

    /// A table without headings.
    pub(crate) fn plain() -> Self {
        Self::default()
    }

    pub(crate) fn row(&mut self, cells: impl IntoIterator<Item: Into<String>>) {
        self.rows.push(cells.into_iter().map(Into::into).collect());
    }

    /// The lines, each with its end.
    pub(crate) fn render(&self) -> String {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let width = |column: usize| {
            let cells = self.rows.iter().filter_map(|row| row.get(column));
            cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..columns).map(width).collect();
        let mut text = String::new();
        for row in &self.rows {
            let mut line = String::new();
            for (column, cell) in row.iter().enumerate() {
                let padding = " ".repeat(widths[column] - cell.chars().count());
                let (before, after) =
                    if self.right.contains(&column) { (&*padding, "") } else { ("", &*padding) };
                line.extend([before, cell, after, "  "]);
            }
            text.push_str(line.trim_end());
            text.push('\n');
        }
        text
    }
}

/// A length in its two greatest units: `3m12s`, `2d4h`, `850ms`.
pub(crate) fn length(length: Duration) -> String {
    const UNITS: [(&str, u64); 4] = [("d", 86_400), ("h", 3_600), ("m", 60), ("s", 1)];
    let seconds = length.as_secs();
    if seconds == 0 {
        return match length.as_micros() {
            0 => "0s".to_owned(),
            micros @ 1..10_000 => format!("{}.{:02}ms", micros / 1_000, micros % 1_000 / 10),
            micros => format!("{}ms", micros / 1_000),
        };
    }
    let first = UNITS.iter().position(|(_, unit)| seconds >= *unit).unwrap_or(UNITS.len() - 1);
    let (name, unit) = UNITS[first];
    let mut text = format!("{}{name}", seconds / unit);
    if let Some((name, smaller)) = UNITS.get(first + 1) {
        let rest = seconds % unit / smaller;
        if rest > 0 {
            text.push_str(&format!("{rest}{name}"));
        }
    }
    text
}

/// A timeout for people.
pub(crate) fn timeout_text(timeout: Option<Duration>) -> String {
    timeout.map_or_else(|| "never".to_owned(), length)
}

/// A length that may be absent, for people.
pub(crate) fn length_or_dash(time: Option<Duration>) -> String {
    time.map_or_else(|| "-".to_owned(), length)
}

/// Text that somebody else chose and may have left empty.
pub(crate) fn printable_or_dash(text: &str) -> String {
    if text.is_empty() { "-".to_owned() } else { printable(text) }
}

/// What time it is in the cluster, by whose clock ages and expiries are told: this machine's may be
/// wrong. Where nobody has said what time it is, times are told as they are.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Now(pub(crate) Option<SystemTime>);

impl Now {
    /// How long ago something was.
    pub(crate) fn age(self, time: Option<SystemTime>) -> String {
        let Some(time) = time else { return "-".to_owned() };
        let Self(Some(now)) = self else { return format!("since {}", time_text(time)) };
        length(now.duration_since(time).unwrap_or_default())
    }

    /// How long until something is; `never` if it never is.
    pub(crate) fn until(self, time: Option<SystemTime>) -> String {
        let Some(time) = time else { return "never".to_owned() };
        let Self(Some(now)) = self else { return format!("at {}", time_text(time)) };
        time.duration_since(now).map_or_else(|_| "now".to_owned(), length)
    }

    /// The same within a sentence: `in 3m12s`.
    pub(crate) fn expiry(self, time: Option<SystemTime>) -> String {
        match (time, self.until(time)) {
            (Some(_), length) if self.0.is_some() && length != "now" => format!("in {length}"),
            (_, text) => text,
        }
    }
}

/// A time in RFC 3339, to the millisecond.
pub(crate) fn time_text(time: SystemTime) -> String {
    match time.duration_since(SystemTime::UNIX_EPOCH) {
        Ok(since) if since < YEAR_10000 => humantime::format_rfc3339_millis(time).to_string(),
        // Beyond what the format can say: so is anybody's use for it.
        _ => "9999-12-31T23:59:59.999Z".to_owned(),
    }
}

/// A time for programs; null for never.
pub(crate) fn time_json(time: Option<SystemTime>) -> Value {
    time.map_or(Value::Null, |time| Value::String(time_text(time)))
}

/// A length for programs, as protobuf writes it; null for never.
pub(crate) fn length_json(length: Option<Duration>) -> Value {
    let Some(length) = length else { return Value::Null };
    let nanos = format!("{:09}", length.subsec_nanos());
    let fraction = nanos.trim_end_matches('0');
    let dot = if fraction.is_empty() { "" } else { "." };
    Value::String(format!("{}{dot}{fraction}s", length.as_secs()))
}

/// An attribute's value for programs.
pub(crate) fn value_json(value: &[u8]) -> Value {
    match std::str::from_utf8(value) {
        Ok(text) => Value::String(text.to_owned()),
        Err(_) => json!({ "base64": STANDARD.encode(value) }),
    }
}

/// An attribute's value for people: on one line, and with nothing that a terminal would obey.
pub(crate) fn value_text(value: &[u8]) -> String {
    match std::str::from_utf8(value) {
        Ok(text) => printable(text),
        Err(_) => format!("({}, not text)", bytes(value.len() as u64)),
    }
}

/// Text that somebody else chose, with control characters escaped.
pub(crate) fn printable(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_control() || is_direction(c) {
            shown.extend(c.escape_default());
        } else {
            shown.push(c);
        }
    }
    shown
}

/// Characters that reverse the order of what follows them on a terminal.
fn is_direction(c: char) -> bool {
    matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// A size: `17 B`, `3.4 KiB`.
pub(crate) fn bytes(count: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut unit = 0;
    let mut scaled = count as f64;
    while scaled >= 1_024.0 && unit + 1 < UNITS.len() {
        scaled /= 1_024.0;
        unit += 1;
    }
    if unit == 0 { format!("{count} B") } else { format!("{scaled:.1} {}", UNITS[unit]) }
}

/// A number with its thousands apart: `1,234,567`.
pub(crate) fn count(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths() {
        for (given, shown) in [
            (Duration::ZERO, "0s"),
            (Duration::from_micros(420), "0.42ms"),
            (Duration::from_micros(1_234), "1.23ms"),
            (Duration::from_millis(850), "850ms"),
            (Duration::from_secs(12), "12s"),
            (Duration::from_secs(192), "3m12s"),
            (Duration::from_secs(1_800), "30m"),
            (Duration::from_secs(2 * 86_400 + 4 * 3_600 + 59), "2d4h"),
        ] {
            assert_eq!(length(given), shown);
        }
        assert_eq!(timeout_text(None), "never");
    }

    #[test]
    fn ages_are_told_by_the_cluster_s_clock() {
        let at = |seconds| Some(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds));
        let now = Now(at(1_000));
        assert_eq!(now.age(at(940)), "1m");
        // What a node that is a little ahead has just made.
        assert_eq!(now.age(at(1_001)), "0s");
        assert_eq!((&*now.until(at(1_600)), &*now.expiry(at(1_600))), ("10m", "in 10m"));
        assert_eq!((&*now.until(at(1_000)), &*now.expiry(at(999))), ("0s", "now"));
        assert_eq!((&*now.age(None), &*now.expiry(None)), ("-", "never"));
        let unknown = Now(None);
        assert_eq!(unknown.age(at(940)), "since 1970-01-01T00:15:40.000Z");
        assert_eq!(unknown.expiry(at(940)), "at 1970-01-01T00:15:40.000Z");
        assert_eq!(unknown.expiry(None), "never");
    }

    #[test]
    fn json_lengths_and_times_are_protobuf_s() {
        assert_eq!(length_json(Some(Duration::from_secs(1_800))), json!("1800s"));
        assert_eq!(length_json(Some(Duration::from_millis(1_500))), json!("1.5s"));
        assert_eq!(length_json(None), Value::Null);
        let time = SystemTime::UNIX_EPOCH + Duration::from_millis(1_763_870_722_042);
        assert_eq!(time_json(Some(time)), json!("2025-11-23T04:05:22.042Z"));
        // What a broken server may send must not bring the command down.
        let far = SystemTime::UNIX_EPOCH + Duration::from_secs(1 << 60);
        assert_eq!(time_json(Some(far)), json!("9999-12-31T23:59:59.999Z"));
    }

    #[test]
    fn values_are_strings_where_they_can_be() {
        assert_eq!(value_json("žluť".as_bytes()), json!("žluť"));
        assert_eq!(value_json(b"\xff\x00"), json!({"base64": "/wA="}));
        assert_eq!(value_text(b"\xff\x00"), "(2 B, not text)");
        assert_eq!(value_text(b"a\x1b[31m\nb"), "a\\u{1b}[31m\\nb");
        assert_eq!(printable("a\u{202e}b"), "a\\u{202e}b");
    }

    #[test]
    fn tables_are_aligned() {
        let mut table = Table::new(&["NAME", "SIZE", "NOTE"], &[1]);
        table.row(["a", "1", ""]);
        table.row(["long name", "1000", "x"]);
        let lines = ["NAME       SIZE  NOTE", "a             1", "long name  1000  x", ""];
        assert_eq!(table.render(), lines.join("\n"));
        assert_eq!(Table::plain().render(), "");
    }

    #[test]
    fn sizes_and_counts() {
        assert_eq!(bytes(17), "17 B");
        assert_eq!(bytes(3_500), "3.4 KiB");
        assert_eq!(bytes(u64::MAX), "16777216.0 TiB");
        assert_eq!(count(0), "0");
        assert_eq!(count(999), "999");
        assert_eq!(count(1_234_567), "1,234,567");
    }
}
