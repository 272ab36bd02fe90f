//! From a file, the environment and flags to a [`Config`], and back to text.

use std::path::Path;

use toml::de::{DeTable, DeValue};

use super::settings::{SETTINGS, Setting};
use super::{Config, ConfigError, Origin, Problem};

/// Applies a file's text on top of `config`. Either all of it is right or every problem is named.
pub(super) fn apply_file(config: &mut Config, path: &Path, text: &str) -> Result<(), ConfigError> {
    let table = DeTable::parse(text).map_err(|error| ConfigError::Syntax {
        path: path.to_path_buf(),
        line: line_of(text, error.span().map_or(0, |span| span.start)),
        message: error.message().to_owned(),
    })?;
    let mut problems = Vec::new();
    let mut file = File { path, text, config, problems: &mut problems };
    file.apply_table(table.get_ref(), "");
    if problems.is_empty() {
        return Ok(());
    }
    problems.sort_by_key(|problem| match problem {
        Problem::UnknownKey { origin, .. } | Problem::BadValue { origin, .. } => match origin {
            Origin::File { line, .. } => *line,
            Origin::Environment(_) | Origin::Flag(_) => 0,
        },
    });
    Err(ConfigError::Settings(problems))
}

struct File<'a> {
    path: &'a Path,
    text: &'a str,
    config: &'a mut Config,
    problems: &'a mut Vec<Problem>,
}

impl File<'_> {
    fn apply_table(&mut self, table: &DeTable<'_>, prefix: &str) {
        for (key, value) in table.iter() {
            let name = format!("{prefix}{}", key.get_ref());
            let origin = self.origin(key.span().start);
            if let Some(setting) = find(&name) {
                self.apply(setting, value.get_ref(), &self.text[value.span()], origin);
            } else if let (true, Some(section)) = (is_section(&name), value.get_ref().as_table()) {
                self.apply_table(section, &format!("{name}."));
            } else {
                let nearest = nearest(&name);
                self.problems.push(Problem::UnknownKey { origin, key: name, nearest });
            }
        }
    }

    fn apply(&mut self, setting: &'static Setting, value: &DeValue<'_>, written: &str, origin: Origin) {
        match (setting.set)(self.config, value) {
            Some(()) => {
                self.config.origins.insert(setting.key, origin);
            }
            None => self.problems.push(Problem::BadValue {
                origin,
                key: setting.key.to_owned(),
                value: written.to_owned(),
                expected: setting.expected,
            }),
        }
    }

    fn origin(&self, at: usize) -> Origin {
        Origin::File { path: self.path.to_path_buf(), line: line_of(self.text, at) }
    }
}

/// Applies the environment. Variables that are set and empty count as not set.
pub(super) fn apply_environment(
    config: &mut Config,
    variable: &dyn Fn(&str) -> Option<String>,
) -> Result<(), ConfigError> {
    let mut problems = Vec::new();
    for setting in SETTINGS {
        let Some(name) = setting.variable else { continue };
        if let Some(text) = variable(name).filter(|text| !text.is_empty()) {
            problems.extend(apply_text(config, setting, &text, Origin::Environment(name)));
        }
    }
    if problems.is_empty() { Ok(()) } else { Err(ConfigError::Settings(problems)) }
}

/// Applies flags: each a key, its value as text and the flag for messages.
pub(super) fn apply_flags(
    config: &mut Config,
    flags: &[(String, String, String)],
) -> Result<(), ConfigError> {
    let mut problems = Vec::new();
    for (key, text, flag) in flags {
        let origin = Origin::Flag(flag.clone());
        match find(key) {
            Some(setting) => problems.extend(apply_text(config, setting, text, origin)),
            None => problems.push(Problem::UnknownKey { origin, key: key.clone(), nearest: nearest(key) }),
        }
    }
    if problems.is_empty() { Ok(()) } else { Err(ConfigError::Settings(problems)) }
}

/// A text is taken as a TOML value if the setting accepts it as one, else as a plain string: nobody wants to quote
/// twice in a shell.
fn apply_text(config: &mut Config, setting: &'static Setting, text: &str, origin: Origin) -> Option<Problem> {
    let as_toml = DeValue::parse(text).ok().and_then(|value| (setting.set)(config, value.get_ref()));
    match as_toml.or_else(|| (setting.set)(config, &DeValue::String(text.into()))) {
        Some(()) => {
            config.origins.insert(setting.key, origin);
            None
        }
        None => Some(Problem::BadValue {
            origin,
            key: setting.key.to_owned(),
            value: format!("{text:?}"),
            expected: setting.expected,
        }),
    }
}

fn find(key: &str) -> Option<&'static Setting> {
    SETTINGS.iter().find(|setting| setting.key == key)
}

fn is_section(name: &str) -> bool {
    SETTINGS.iter().any(|setting| section(setting.key) == Some(name))
}

fn section(key: &str) -> Option<&str> {
    key.split_once('.').map(|(section, _)| section)
}

fn last(key: &str) -> &str {
    key.rsplit('.').next().unwrap_or(key)
}

/// The known key or section that is most like `key`: by its whole name, or by its last word for a
/// key in the wrong section.
fn nearest(key: &str) -> Option<String> {
    if is_section(key) {
        return Some(format!("[{key}]"));
    }
    let known = SETTINGS.iter().flat_map(|setting| [Some(setting.key), section(setting.key)]).flatten();
    let likeness = |candidate: &str| {
        let whole = strsim::normalized_damerau_levenshtein(key, candidate);
        let word = strsim::normalized_damerau_levenshtein(last(key), last(candidate));
        // A word alone says less than the whole: `mode` is in one section only by luck.
        whole.max(word * 0.9)
    };
    known
        .map(|candidate| (likeness(candidate), candidate))
        .filter(|(likeness, _)| *likeness >= 0.55)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, candidate)| candidate.to_owned())
}

/// Counted from 1.
fn line_of(text: &str, at: usize) -> usize {
    text.as_bytes().iter().take(at).filter(|byte| **byte == b'\n').count() + 1
}

pub(super) fn render_default_file() -> String {
    let defaults = Config::default();
    let mut text = String::from(
        "# a3s-box. Everything here is the default: uncomment what you change. Environment variables and flags\n\
         # override this file; `a3s-box config show` prints what counts and where it comes from.\n",
    );
    sections(&mut text, |text, setting| {
        text.push('\n');
        for line in setting.help.lines() {
            text.push_str(&format!("# {line}\n"));
        }
        if let Some(variable) = setting.variable {
            text.push_str(&format!("# (environment: {variable})\n"));
        }
        let value = (setting.show)(&defaults);
        let value = if value.is_empty() { "\"/…\"".to_owned() } else { value };
        text.push_str(&format!("#{} = {value}\n", last(setting.key)));
    });
    text
}

pub(super) fn render_effective(config: &Config) -> String {
    let mut text = String::new();
    sections(&mut text, |text, setting| {
        let value = (setting.show)(config);
        match config.origins.get(setting.key) {
            Some(origin) => text.push_str(&format!("{} = {value}  # {origin}\n", last(setting.key))),
            None if value.is_empty() => text.push_str(&format!("# {} is not set\n", last(setting.key))),
            None => text.push_str(&format!("{} = {value}\n", last(setting.key))),
        }
    });
    text
}

fn sections(text: &mut String, mut one: impl FnMut(&mut String, &'static Setting)) {
    let mut current = None;
    for setting in SETTINGS {
        if section(setting.key) != current {
            current = section(setting.key);
            if let Some(name) = current {
                text.push_str(&format!("\n[{name}]\n"));
            }
        }
        one(text, setting);
    }
}
