//! From words to a command: what the parser of arguments cannot be told in a declaration.
//!
//! - A variable that is set and empty is not set: `QUORATE_X: ${X:-}` is a habit of compose files.
//! - An id or a name may begin with a dash, `session get "$id"`. A parser that took such words for
//!   values everywhere would take a mistyped option for one too, so they are looked at again only
//!   when no option is meant: with one dash, where one value and no other may stand.

use std::ffi::{OsStr, OsString};

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{Arg, ArgAction, ArgMatches, Command};

/// What `words` mean to `command`.
pub(super) fn matches(command: Command, words: &[OsString]) -> Result<ArgMatches, clap::Error> {
    let command = each_argument(command, &|argument| match argument.get_env() {
        Some(name) if is_set_and_empty(name) => argument.env(None::<&'static str>),
        _ => argument,
    });
    let error = match command.clone().try_get_matches_from(words) {
        Ok(matches) => return Ok(matches),
        Err(error) => error,
    };
    if is_about_one_dash(&error, words) {
        let lenient = each_argument(command.clone(), &|argument| {
            let is_one =
                argument.is_positional() && matches!(argument.get_action(), ArgAction::Set);
            if is_one { argument.allow_hyphen_values(true) } else { argument }
        });
        if let Ok(matches) = lenient.try_get_matches_from(words) {
            return Ok(matches);
        }
    }
    Err(without_environment(command, words, error))
}

fn is_set_and_empty(name: &OsStr) -> bool {
    std::env::var_os(name).is_some_and(|value| value.to_string_lossy().trim().is_empty())
}

/// Whether the parser stumbled over a word such as `-Xy…`, or took it for a request for help.
fn is_about_one_dash(error: &clap::Error, words: &[OsString]) -> bool {
    match error.kind() {
        ErrorKind::UnknownArgument => match error.get(ContextKind::InvalidArg) {
            Some(ContextValue::String(word)) => !word.starts_with("--"),
            _ => false,
        },
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => words.iter().any(|word| {
            let word = word.to_string_lossy();
            word.len() > 2 && (word.starts_with("-h") || word.starts_with("-V"))
        }),
        _ => false,
    }
}

/// The error as it is without what the environment says: the parser takes that for something that
/// was typed, and so for a part of the usage that it shows.
fn without_environment(command: Command, words: &[OsString], error: clap::Error) -> clap::Error {
    if matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) {
        return error;
    }
    let command = each_argument(command, &|argument| argument.env(None::<&'static str>));
    match command.try_get_matches_from(words) {
        Err(other) if other.kind() == error.kind() => other,
        // It was the environment that could not be understood.
        _ => error,
    }
}

fn each_argument(command: Command, change: &dyn Fn(Arg) -> Arg) -> Command {
    command.mut_args(change).mut_subcommands(|subcommand| each_argument(subcommand, change))
}
