//! Trouble that lies outside of what is stored: the system refuses a call, and nothing is known to
//! be wrong with the bytes. To set them aside would only lose them. A node stops instead, says what
//! stands in its way and what removes it, and comes back as it was.

use std::io;

/// What the system says of names, offsets and lengths, and those came out of what is stored.
const WITHIN: [i32; 8] = [
    libc::ENOENT,
    libc::EEXIST,
    libc::ENOTDIR,
    libc::EISDIR,
    libc::EINVAL,
    libc::EFBIG,
    libc::EOVERFLOW,
    libc::ENAMETOOLONG,
];

/// Whether the system had reasons of its own to refuse.
pub fn is_outside(error: &io::Error) -> bool {
    error.raw_os_error().is_some_and(|code| !WITHIN.contains(&code))
}

/// The error in words, with its remedy where there is one to name.
pub fn explain(error: &io::Error) -> String {
    match error.raw_os_error().and_then(remedy) {
        Some(remedy) => format!("{error}: {remedy}"),
        None => error.to_string(),
    }
}

fn remedy(code: i32) -> Option<&'static str> {
    Some(match code {
        libc::EMFILE => "allow this process more open files (ulimit -n, LimitNOFILE=)",
        libc::ENFILE => "allow the machine more open files (sysctl fs.file-max)",
        libc::EAGAIN => "allow this user more threads (ulimit -u, TasksMax=)",
        libc::ENOMEM => "give the machine, or this process, more memory",
        libc::ENOSPC => "make room on the disk",
        libc::EDQUOT => "raise this user's disk quota",
        libc::EACCES | libc::EPERM => "let this user read and write there",
        libc::EROFS => {
            "mount the file system writable; if the system made it read-only by itself, see its \
             log for errors of the disk"
        }
        libc::EIO => "see the system's log: the disk fails, and is to be treated as lost",
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_system_refuses_is_no_damage_and_has_a_remedy() {
        for code in [
            libc::EMFILE,
            libc::ENFILE,
            libc::EAGAIN,
            libc::ENOMEM,
            libc::ENOSPC,
            libc::EDQUOT,
            libc::EACCES,
            libc::EPERM,
            libc::EROFS,
            libc::EIO,
        ] {
            let error = io::Error::from_raw_os_error(code);
            assert!(is_outside(&error), "{error}");
            assert!(explain(&error).len() > error.to_string().len() + 10, "{error}");
        }
        for code in WITHIN {
            assert!(!is_outside(&io::Error::from_raw_os_error(code)));
        }
        assert!(!is_outside(&io::ErrorKind::UnexpectedEof.into()), "the file is too short");
    }
}
