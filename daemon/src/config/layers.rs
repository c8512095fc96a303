//! Completes the flags from the environment and from the file of `--config`.
//! Both speak the flags' own language: each value becomes a flag, is tried alone, and so is refused by its own name.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::io::Read;
use std::path::Path;

use clap::parser::ValueSource;
use clap::{ArgAction, CommandFactory, FromArgMatches};

use super::flags::Cli;
use super::{ConfigError, Environment};

/// Prefix of our environment variables.
const PREFIX: &str = "BINDERY_";
/// A configuration is short; more is a mistaken path.
const LARGEST_FILE: u64 = 1 << 20;

/// The flags with everything that completes them.
#[derive(Debug)]
pub(super) struct Layered {
    pub(super) cli: Cli,
    /// `BINDERY_` variables that name no flag.
    pub(super) ignored: Vec<String>,
}

/// One flag of the subcommand in use, as the layers see it.
#[derive(Debug, Clone)]
struct Flag {
    /// With hyphens, as on the command line.
    name: String,
    kind: Kind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Value,
    List,
    Switch,
    /// The one argument without a name.
    Positional,
}

/// A value that completes the command line, already in its words.
#[derive(Debug)]
struct Addition {
    name: String,
    words: Vec<String>,
}

/// Reads the command line and completes it.
///
/// # Errors
/// When a flag, variable or key is unknown or its value impossible.
pub(super) fn complete(
    arguments: Vec<OsString>,
    environment: &Environment,
) -> Result<Layered, ConfigError> {
    let matches = Cli::command().try_get_matches_from(&arguments).map_err(refused)?;
    let Some((subcommand, given)) = matches.subcommand().filter(|(name, _)| *name != "bench")
    else {
        return Ok(Layered {
            cli: Cli::from_arg_matches(&matches).map_err(refused)?,
            ignored: Vec::new(),
        });
    };
    let flags = flags_of(subcommand);
    let mut settled: BTreeSet<String> = flags
        .iter()
        .filter(|flag| {
            given.value_source(&flag.name.replace('-', "_")) == Some(ValueSource::CommandLine)
        })
        .flat_map(|flag| with_opposite(&flag.name))
        .collect();
    let mut words = arguments;
    let (variables, ignored) = from_environment(subcommand, &flags, environment)?;
    let path = given.get_one::<std::path::PathBuf>("config").cloned();
    let path = path.or_else(|| environment.get("BINDERY_CONFIG").map(Into::into));
    let keys =
        path.map(|path| from_file(subcommand, &flags, &path)).transpose()?.unwrap_or_default();
    for layer in [variables, keys] {
        let fresh: Vec<Addition> =
            layer.into_iter().filter(|addition| !settled.contains(&addition.name)).collect();
        for addition in fresh {
            settled.extend(with_opposite(&addition.name));
            words.extend(addition.words.into_iter().map(OsString::from));
        }
    }
    let cli = <Cli as clap::Parser>::try_parse_from(words).map_err(refused)?;
    Ok(Layered { cli, ignored })
}

fn refused(error: clap::Error) -> ConfigError {
    ConfigError::Flags(Box::new(error))
}

/// A switch and its opposite are one setting.
fn with_opposite(name: &str) -> Vec<String> {
    match name {
        "enable-prefix-caching" | "no-enable-prefix-caching" => {
            vec!["enable-prefix-caching".into(), "no-enable-prefix-caching".into()]
        }
        _ => vec![name.to_owned()],
    }
}

fn flags_of(subcommand: &str) -> Vec<Flag> {
    let command = Cli::command();
    let Some(command) = command.find_subcommand(subcommand) else { return Vec::new() };
    let kind = |arg: &clap::Arg| match arg.get_action() {
        _ if arg.is_positional() => Some(Kind::Positional),
        ArgAction::SetTrue => Some(Kind::Switch),
        ArgAction::Append => Some(Kind::List),
        ArgAction::Set => Some(Kind::Value),
        _ => None,
    };
    command
        .get_arguments()
        .filter_map(|arg| {
            Some(Flag { name: arg.get_id().as_str().replace('_', "-"), kind: kind(arg)? })
        })
        .collect()
}

fn from_environment(
    subcommand: &str,
    flags: &[Flag],
    environment: &Environment,
) -> Result<(Vec<Addition>, Vec<String>), ConfigError> {
    let mut additions = Vec::new();
    let mut ignored = Vec::new();
    for (variable, value) in environment.with_prefix(PREFIX) {
        let name = variable[PREFIX.len()..].to_ascii_lowercase().replace('_', "-");
        let Some(flag) = flags.iter().find(|flag| flag.name == name) else {
            ignored.push(variable.to_owned());
            continue;
        };
        let values = match flag.kind {
            Kind::List => value.split(',').map(str::to_owned).collect(),
            Kind::Value | Kind::Switch | Kind::Positional => vec![value.to_owned()],
        };
        let addition =
            addition(subcommand, flag, values).map_err(|reason| ConfigError::Variable {
                name: variable.to_owned(),
                reason: format!("{reason}{}", service_link_hint(value)),
            })?;
        additions.push(addition);
    }
    Ok((additions, ignored))
}

/// Kubernetes puts `<SERVICE>_PORT=tcp://...` into every Pod of a namespace that has a Service of that name.
fn service_link_hint(value: &str) -> &'static str {
    if value.starts_with("tcp://") || value.starts_with("udp://") {
        "; this is a link that Kubernetes made from a Service named bindery: set enableServiceLinks: false in the Pod"
    } else {
        ""
    }
}

fn from_file(subcommand: &str, flags: &[Flag], path: &Path) -> Result<Vec<Addition>, ConfigError> {
    let failed = |reason: String| ConfigError::File { path: path.to_owned(), reason };
    let text = read_bounded(path).map_err(failed)?;
    let document: serde_yaml::Value =
        serde_yaml::from_str(&text).map_err(|error| failed(error.to_string()))?;
    let mapping = match document {
        serde_yaml::Value::Mapping(mapping) => mapping,
        serde_yaml::Value::Null => return Ok(Vec::new()),
        _ => return Err(failed("wanted keys and values, such as max-num-seqs: 64".into())),
    };
    let allowed: Vec<&str> =
        flags.iter().map(|flag| flag.name.as_str()).filter(|name| *name != "config").collect();
    let mut additions = Vec::new();
    for (key, value) in mapping {
        let key = scalar(key).map_err(failed)?;
        let name = key.replace('_', "-");
        let flag = flags.iter().find(|flag| flag.name == name && name != "config");
        let Some(flag) = flag else {
            return Err(failed(format!("unknown key {key}, allowed are: {}", allowed.join(", "))));
        };
        let in_key = |reason: String| failed(format!("{name}: {reason}"));
        let values = scalars(flag.kind, value).map_err(in_key)?;
        additions.push(addition(subcommand, flag, values).map_err(in_key)?);
    }
    Ok(additions)
}

fn read_bounded(path: &Path) -> Result<String, String> {
    let file = std::fs::File::open(path).map_err(|error| error.to_string())?;
    let mut text = String::new();
    file.take(LARGEST_FILE + 1).read_to_string(&mut text).map_err(|error| error.to_string())?;
    if text.len() as u64 > LARGEST_FILE {
        return Err(format!("wanted at most {LARGEST_FILE} bytes, got more"));
    }
    Ok(text)
}

fn scalars(kind: Kind, value: serde_yaml::Value) -> Result<Vec<String>, String> {
    match (kind, value) {
        (Kind::List, serde_yaml::Value::Sequence(values)) => {
            values.into_iter().map(scalar).collect()
        }
        (_, value) => scalar(value).map(|value| vec![value]),
    }
}

fn scalar(value: serde_yaml::Value) -> Result<String, String> {
    match value {
        serde_yaml::Value::String(text) => Ok(text),
        serde_yaml::Value::Number(number) => Ok(number.to_string()),
        serde_yaml::Value::Bool(bool) => Ok(bool.to_string()),
        serde_yaml::Value::Null
        | serde_yaml::Value::Sequence(_)
        | serde_yaml::Value::Mapping(_)
        | serde_yaml::Value::Tagged(_) => Err("wanted text, a number or a boolean".into()),
    }
}

/// The words of one setting, tried alone so that a bad value is refused with its origin.
fn addition(subcommand: &str, flag: &Flag, values: Vec<String>) -> Result<Addition, String> {
    let words: Vec<String> = match flag.kind {
        Kind::Positional => values,
        Kind::Value | Kind::List => {
            values.into_iter().map(|value| format!("--{}={value}", flag.name)).collect()
        }
        Kind::Switch => {
            switch(&flag.name, values.first().map_or("", String::as_str))?.into_iter().collect()
        }
    };
    let trial = ["bindery", subcommand].into_iter().map(str::to_owned).chain(words.iter().cloned());
    match Cli::command().try_get_matches_from(trial) {
        Ok(_) => Ok(Addition { name: flag.name.clone(), words }),
        Err(error) => Err(brief(&error)),
    }
}

/// The word that sets a switch to `value`, none where that is its default.
fn switch(name: &str, value: &str) -> Result<Option<String>, String> {
    let on = match value.to_ascii_lowercase().as_str() {
        "1" | "true" | "yes" | "on" => true,
        "0" | "false" | "no" | "off" => false,
        _ => return Err(format!("wanted true or false, got {value:?}")),
    };
    Ok(match (name, on) {
        (_, true) => Some(format!("--{name}")),
        ("enable-prefix-caching", false) => Some("--no-enable-prefix-caching".into()),
        ("no-enable-prefix-caching", false) => Some("--enable-prefix-caching".into()),
        (_, false) => None,
    })
}

/// What clap says, without its usage lines.
fn brief(error: &clap::Error) -> String {
    let text = error.render().to_string();
    let lines = text
        .lines()
        .map(str::trim)
        .take_while(|line| !line.starts_with("Usage:") && !line.starts_with("For more"));
    let message = lines.filter(|line| !line.is_empty()).collect::<Vec<_>>().join(" ");
    message.trim_start_matches("error: ").to_owned()
}
