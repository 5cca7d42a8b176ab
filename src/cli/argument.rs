//! Arguments that are more than a word: timeouts, addresses, members, attributes, ids.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::io::Read;
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use super::failure::Failure;
use super::output;
use crate::client::{Handle, LeaseId, NewMember, Selector, SessionId, Timeout, check_address};
use crate::limits::{
    ATTRIBUTE_VALUE_BYTES_MAX, LEASE_TTL_MAX, LEASE_TTL_MIN, LOCK_DELAY_MAX, LOCK_PERMITS_MAX,
    LOCK_WAIT_MAX, NAME_BYTES_MAX, PAGE_SIZE_MAX, RING_MEMBERS_MAX, RING_TAG_VALUE_BYTES_MAX,
    RING_WEIGHT_MAX, SESSION_ID_CHARS_MAX,
};

/// A length such as `10s` or `1h30m`.
pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    humantime::parse_duration(text)
        .map_err(|error| format!("{error}; write it like 500ms, 10s or 1h30m"))
}

/// A length above zero.
pub(crate) fn positive_duration(text: &str) -> Result<Duration, String> {
    match duration(text)? {
        length if length.is_zero() => Err("must be above zero".to_owned()),
        length => Ok(length),
    }
}

fn duration_within(text: &str, range: RangeInclusive<Duration>) -> Result<Duration, String> {
    let length = duration(text)?;
    if range.contains(&length) {
        return Ok(length);
    }
    let (least, most) = (output::length(*range.start()), output::length(*range.end()));
    Err(format!("it must be {least} to {most}"))
}

/// A lease's time to live.
pub(crate) fn ttl(text: &str) -> Result<Duration, String> {
    duration_within(text, LEASE_TTL_MIN..=LEASE_TTL_MAX)
}

/// How long to wait for a lock.
pub(crate) fn wait(text: &str) -> Result<Duration, String> {
    duration_within(text, Duration::ZERO..=LOCK_WAIT_MAX)
}

/// A lock-delay.
pub(crate) fn lock_delay(text: &str) -> Result<Duration, String> {
    duration_within(text, Duration::ZERO..=LOCK_DELAY_MAX)
}

fn number_within<T: FromStr + PartialOrd + Display + Copy>(
    text: &str,
    range: RangeInclusive<T>,
) -> Result<T, String> {
    let number = text.parse().ok().filter(|number| range.contains(number));
    number.ok_or_else(|| format!("it must be a number from {} to {}", range.start(), range.end()))
}

/// How many permits a lock has, or how many of them to take.
pub(crate) fn permits(text: &str) -> Result<u32, String> {
    number_within(text, 1..=LOCK_PERMITS_MAX)
}

/// The weight of a member of a ring.
pub(crate) fn weight(text: &str) -> Result<u32, String> {
    number_within(text, 1..=RING_WEIGHT_MAX)
}

/// How many members to name for each key.
pub(crate) fn member_count(text: &str) -> Result<u32, String> {
    number_within(text, 1..=u32::try_from(RING_MEMBERS_MAX).unwrap_or(u32::MAX))
}

/// How many of what comes on one page.
pub(crate) fn page_limit(text: &str) -> Result<u32, String> {
    number_within(text, 1..=u32::try_from(PAGE_SIZE_MAX).unwrap_or(u32::MAX))
}

/// How many of a list.
pub(crate) fn list_limit(text: &str) -> Result<usize, String> {
    text.parse()
        .ok()
        .filter(|limit| *limit > 0)
        .ok_or_else(|| "it must be a number from 1 on".to_owned())
}

/// A fencing token.
pub(crate) fn token(text: &str) -> Result<u64, String> {
    text.parse().ok().filter(|token| *token > 0).ok_or_else(|| {
        "it must be a number from 1 on, as `quorate lock acquire` and `lock show` print it"
            .to_owned()
    })
}

/// A length, or `never`.
pub(crate) fn timeout(text: &str) -> Result<Timeout, String> {
    if text == "never" {
        return Ok(Timeout::Never);
    }
    duration(text).map(Timeout::After).map_err(|error| format!("{error}, or never"))
}

/// A lease's id.
pub(crate) fn lease_id(text: &str) -> Result<LeaseId, String> {
    LeaseId::new(text).map_err(|error| format!("{error}, as `quorate lease grant` prints it"))
}

/// A fence: `LOCK:TOKEN`. A lock's name may have colons of its own.
pub(crate) fn fence(text: &str) -> Result<(String, u64), String> {
    let parts = text.rsplit_once(':').filter(|(lock, _)| !lock.is_empty());
    let (lock, token) = parts.ok_or_else(|| format!("{text:?} is not LOCK:TOKEN"))?;
    let token = token.parse().map_err(|_| format!("{token:?} is no token: a number"))?;
    Ok((lock.to_owned(), token))
}

/// `IP:port` to listen on.
pub(crate) fn socket_address(text: &str) -> Result<SocketAddr, String> {
    let address: SocketAddr =
        text.parse().map_err(|_| "write it as IP:port, like 127.0.0.1:7400".to_owned())?;
    if address.port() == 0 {
        return Err("the port must not be 0: others have to find it".to_owned());
    }
    Ok(address)
}

/// `host:port` where others find something.
pub(crate) fn address(text: &str) -> Result<String, String> {
    check_address(text).map(|()| text.to_owned())
}

/// `1=host:port,2=host:port`: each number once, each address once.
pub(crate) fn members(text: &str) -> Result<Vec<NewMember>, String> {
    let mut members: Vec<NewMember> = Vec::new();
    for part in text.split(',').map(str::trim).filter(|part| !part.is_empty()) {
        let (node_id, peer) =
            part.split_once('=').ok_or_else(|| format!("{part:?} is not NODE=host:port"))?;
        let node_id = node_id
            .parse()
            .ok()
            .filter(|node_id| *node_id != 0)
            .ok_or_else(|| format!("{node_id:?} is no node id: a number from 1 on"))?;
        let member = NewMember { node_id, peer_address: address(peer)? };
        if members.iter().any(|other| other.node_id == node_id) {
            return Err(format!("node {node_id} is listed twice"));
        }
        if members.iter().any(|other| other.peer_address == member.peer_address) {
            return Err(format!("{peer} is listed twice"));
        }
        members.push(member);
    }
    if members.is_empty() {
        return Err("at least one member is needed, as NODE=host:port".to_owned());
    }
    Ok(members)
}

/// Standard input, which one argument at most may take.
#[derive(Debug, Default)]
pub(crate) struct Stdin {
    taken: bool,
}

impl Stdin {
    fn read(&mut self, bytes_max: usize) -> Result<Vec<u8>, Failure> {
        if std::mem::replace(&mut self.taken, true) {
            let message = "standard input can stand for one argument only";
            return Err(Failure::Usage(message.to_owned()));
        }
        read_at_most(std::io::stdin().lock(), "standard input", bytes_max)
    }
}

fn read_at_most(input: impl Read, name: &str, bytes_max: usize) -> Result<Vec<u8>, Failure> {
    let mut bytes = Vec::new();
    // One byte more than is allowed shows that there is more than is allowed.
    let limit = u64::try_from(bytes_max).unwrap_or(u64::MAX).saturating_add(1);
    input
        .take(limit)
        .read_to_end(&mut bytes)
        .map_err(|error| Failure::Failed(format!("{name}: {error}")))?;
    if bytes.len() > bytes_max {
        return Err(Failure::Usage(format!("{name} is longer than {bytes_max} bytes")));
    }
    Ok(bytes)
}

/// An id as given: itself, or `-` for the first line of standard input.
pub(crate) fn session_id(text: &str, stdin: &mut Stdin) -> Result<SessionId, Failure> {
    if text != "-" {
        return Ok(SessionId::new(text)?);
    }
    let bytes = stdin.read(SESSION_ID_CHARS_MAX + 2)?;
    let text = String::from_utf8(bytes)
        .map_err(|_| Failure::Usage("standard input is no session id".to_owned()))?;
    Ok(SessionId::new(text.trim_end_matches(['\n', '\r']))?)
}

/// Which session is meant: exactly one of the two ways to say it.
pub(crate) fn selector(
    id: Option<&str>,
    handle: Option<&str>,
    stdin: &mut Stdin,
) -> Result<Selector, Failure> {
    match (id, handle) {
        (Some(id), None) => Ok(session_id(id, stdin)?.into()),
        (None, Some(handle)) => Ok(Handle::new(handle)?.into()),
        (None, None) => {
            Err(Failure::Usage("name a session: ID, - for standard input, or --handle".to_owned()))
        }
        (Some(_), Some(_)) => {
            Err(Failure::Usage("name the session by its id or by --handle, not both".to_owned()))
        }
    }
}

/// A session's attributes, each name once: `name=value`, `name=@file`, `name=@@text` for the text
/// `@text`, or `name=-` for standard input; if they are `literal`, `name=value` only.
pub(crate) fn attributes(
    texts: &[String],
    literal: bool,
    stdin: &mut Stdin,
) -> Result<BTreeMap<String, Vec<u8>>, Failure> {
    let kind = Kind { name: "attribute", literal, bytes_max: ATTRIBUTE_VALUE_BYTES_MAX };
    named_values(kind, texts, stdin)
}

/// The tags of a member of a ring, written as attributes are; their values are text.
pub(crate) fn tags(
    texts: &[String],
    literal: bool,
    stdin: &mut Stdin,
) -> Result<BTreeMap<String, String>, Failure> {
    let kind = Kind { name: "tag", literal, bytes_max: RING_TAG_VALUE_BYTES_MAX };
    let tags = named_values(kind, texts, stdin)?;
    let text = |(name, value): (String, Vec<u8>)| match String::from_utf8(value) {
        Ok(value) => Ok((name, value)),
        Err(_) => Err(Failure::Usage(format!(
            "the value of the tag {} is not text in UTF-8",
            output::printable(&name)
        ))),
    };
    tags.into_iter().map(text).collect()
}

/// What has names and values.
#[derive(Clone, Copy)]
struct Kind {
    name: &'static str,
    /// Whether values are what they look like.
    literal: bool,
    bytes_max: usize,
}

fn named_values(
    kind: Kind,
    texts: &[String],
    stdin: &mut Stdin,
) -> Result<BTreeMap<String, Vec<u8>>, Failure> {
    let mut values = BTreeMap::new();
    for text in texts {
        let (name, value) = named_value(kind, text, stdin)?;
        if values.contains_key(&name) {
            let name = output::printable(&name);
            return Err(Failure::Usage(format!("the {} {name} is given twice", kind.name)));
        }
        values.insert(name, value);
    }
    Ok(values)
}

fn named_value(kind: Kind, text: &str, stdin: &mut Stdin) -> Result<(String, Vec<u8>), Failure> {
    let (name, value) = text
        .split_once('=')
        .ok_or_else(|| Failure::Usage(format!("{text:?} is not name=value")))?;
    if !(1..=NAME_BYTES_MAX).contains(&name.len()) {
        let message = format!("the name of each {} has 1 to {NAME_BYTES_MAX} bytes", kind.name);
        return Err(Failure::Usage(message));
    }
    let value = match value.strip_prefix('@') {
        _ if kind.literal => value.as_bytes().to_vec(),
        Some(text) if text.starts_with('@') => text.as_bytes().to_vec(),
        Some(path) => {
            let path = PathBuf::from(path);
            let shown = path.display().to_string();
            let file = std::fs::File::open(&path).map_err(|error| {
                let remedy = format!("for the text @{shown} write {name}=@@{shown}");
                Failure::Failed(format!("{shown}: {error}; {remedy}"))
            })?;
            read_at_most(file, &shown, kind.bytes_max)?
        }
        None if value == "-" => stdin.read(kind.bytes_max)?,
        None => value.as_bytes().to_vec(),
    };
    Ok((name.to_owned(), value))
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    fn attribute(text: &str, stdin: &mut Stdin) -> Result<(String, Vec<u8>), Failure> {
        let bytes_max = ATTRIBUTE_VALUE_BYTES_MAX;
        named_value(Kind { name: "attribute", literal: false, bytes_max }, text, stdin)
    }

    #[test]
    fn ranges_are_named_in_plain_words() {
        assert_eq!(permits("1000000"), Ok(1_000_000));
        for bad in ["0", "-1", "1000001", "x", ""] {
            assert_eq!(permits(bad).unwrap_err(), "it must be a number from 1 to 1000000");
        }
        assert_eq!(weight("-1").unwrap_err(), "it must be a number from 1 to 1000");
        assert_eq!(member_count("1000"), Ok(1_000));
        assert!(page_limit("1001").is_err() && list_limit("1001").is_ok());
        for bad in ["0", "-1", "x"] {
            assert!(list_limit(bad).unwrap_err().contains("from 1 on"));
            assert!(token(bad).unwrap_err().contains("from 1 on"));
        }
        assert_eq!(token("18446744073709551615"), Ok(u64::MAX));
        for bad in ["0s", "999ms", "25h"] {
            assert_eq!(ttl(bad).unwrap_err(), "it must be 1s to 1d");
        }
        assert_eq!(wait("11m").unwrap_err(), "it must be 0s to 10m");
        assert_eq!(wait("0s"), Ok(Duration::ZERO));
        assert_eq!(lock_delay("61s").unwrap_err(), "it must be 0s to 1m");
    }

    #[test]
    fn a_name_is_given_once() {
        let stdin = &mut Stdin::default();
        let texts = ["a=1", "b=2", "a=1"].map(str::to_owned);
        let failure = attributes(&texts, false, stdin).unwrap_err();
        assert_eq!((failure.code(), &*failure.to_string()), (2, "the attribute a is given twice"));
        let failure = tags(&texts, false, stdin).unwrap_err();
        assert_eq!((failure.code(), &*failure.to_string()), (2, "the tag a is given twice"));
        assert_eq!(attributes(&texts[..2], false, stdin).unwrap().len(), 2);
    }

    #[test]
    fn tags_come_from_where_attributes_come_from() {
        let stdin = &mut Stdin { taken: true };
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(b"east").unwrap();
        let texts = [format!("zone=@{}", file.path().display())];
        assert_eq!(tags(&texts, false, stdin).unwrap()["zone"], "east");
        file.write_all(b"\xff").unwrap();
        assert!(matches!(tags(&texts, false, stdin), Err(Failure::Usage(_))), "it is not text");
        file.write_all(&[b'x'; RING_TAG_VALUE_BYTES_MAX]).unwrap();
        assert!(tags(&texts, false, stdin).unwrap_err().to_string().contains("1024"));
        assert!(matches!(tags(&["zone=-".to_owned()], false, stdin), Err(Failure::Usage(_))));
    }

    #[test]
    fn timeouts() {
        assert_eq!(timeout("never"), Ok(Timeout::Never));
        assert_eq!(timeout("1h30m"), Ok(Timeout::After(Duration::from_secs(5_400))));
        assert!(timeout("soon").unwrap_err().contains("never"));
        assert!(positive_duration("0s").is_err());
        assert_eq!(positive_duration("500ms"), Ok(Duration::from_millis(500)));
    }

    #[test]
    fn members_are_numbered_and_distinct() {
        let parsed = members("1=127.0.0.1:7500, 2=node-b:7500,3=[::1]:7502").unwrap();
        assert_eq!(parsed.iter().map(|m| m.node_id).collect::<Vec<_>>(), [1, 2, 3]);
        assert_eq!(parsed[1].peer_address, "node-b:7500");
        for bad in ["", "1", "0=a:1", "x=a:1", "1=a", "1=a:0", "1=a:1,1=b:1", "1=a:1,2=a:1"] {
            assert!(members(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn fences() {
        assert_eq!(fence("a:b:17"), Ok(("a:b".to_owned(), 17)));
        for bad in ["", "17", ":17", "a:", "a:x", "a:-1"] {
            assert!(fence(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn addresses() {
        assert!(socket_address("127.0.0.1:7400").is_ok());
        assert!(socket_address("localhost:7400").is_err());
        assert!(socket_address("127.0.0.1:0").is_err());
        for bad in ["", ":1", "a", "a:", "a:x", "a b:1", "a:99999", "a/b:1", "a:1:2", "::1:7400"] {
            assert!(address(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn attributes_come_from_the_command_line_or_a_file() {
        let stdin = &mut Stdin::default();
        assert_eq!(attribute("a=b=c", stdin).unwrap(), ("a".into(), b"b=c".to_vec()));
        assert_eq!(attribute("a=", stdin).unwrap(), ("a".into(), Vec::new()));
        assert!(matches!(attribute("a", stdin), Err(Failure::Usage(_))));
        assert!(matches!(attribute("=b", stdin), Err(Failure::Usage(_))));

        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(b"\x00\xff").unwrap();
        let argument = format!("a=@{}", file.path().display());
        assert_eq!(attribute(&argument, stdin).unwrap().1, b"\x00\xff");
        file.write_all(&vec![0; ATTRIBUTE_VALUE_BYTES_MAX]).unwrap();
        assert!(matches!(attribute(&argument, stdin), Err(Failure::Usage(_))));
        let failure = attribute("a=@/no/such/file", stdin).unwrap_err();
        assert_eq!(failure.code(), 1);
        assert!(failure.to_string().contains("write a=@@/no/such/file"), "{failure}");
    }

    #[test]
    fn values_that_look_like_sources_have_a_way_to_be_said() {
        let stdin = &mut Stdin { taken: true };
        assert_eq!(attribute("a=@@alice", stdin).unwrap().1, b"@alice");
        assert_eq!(attribute("a=@@", stdin).unwrap().1, b"@");
        assert_eq!(attribute("a=--", stdin).unwrap().1, b"--");
        let texts = ["a=@alice", "b=-", "c=@@x"].map(str::to_owned);
        let values: Vec<_> = attributes(&texts, true, stdin).unwrap().into_values().collect();
        assert_eq!(values, [&b"@alice"[..], b"-", b"@@x"]);
        assert_eq!(tags(&texts, true, stdin).unwrap()["b"], "-");
    }

    #[test]
    fn standard_input_is_taken_once() {
        let stdin = &mut Stdin { taken: true };
        assert!(matches!(attribute("a=-", stdin), Err(Failure::Usage(_))));
        assert!(matches!(session_id("-", stdin), Err(Failure::Usage(_))));
    }

    #[test]
    fn a_session_is_named_in_one_way() {
        let stdin = &mut Stdin::default();
        let handle = "0123456789abcdef0123456789abcdef";
        assert!(matches!(selector(None, Some(handle), stdin), Ok(Selector::Handle(_))));
        assert!(matches!(selector(Some("0123456789abcdef"), None, stdin), Ok(Selector::Id(_))));
        assert!(selector(None, None, stdin).is_err());
        assert!(selector(Some("0123456789abcdef"), Some(handle), stdin).is_err());
    }
}
