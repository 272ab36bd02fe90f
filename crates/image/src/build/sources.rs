//! What an instruction takes: paths and patterns of the context, less what `.dockerignore` leaves out.

use std::fs;
use std::path::{Component, Path, PathBuf};

use super::tree::follow;

/// A file or directory of the context, by a path below it.
pub(super) struct Source {
    /// As it was named; what it is called in the image.
    pub(super) named: PathBuf,
    /// Where that leads, all links followed inside the context.
    pub(super) path: PathBuf,
}

/// The sources of one word, sorted.
pub(super) fn find(context: &Path, ignored: &Ignored, text: &str) -> Result<Vec<Source>, String> {
    let named = inside(text)?;
    if !is_pattern(text) {
        let source = source(context, named)?;
        let is_dir = context.join(&source.path).is_dir();
        if !is_dir && (ignored.matches(&source.named) || ignored.matches(&source.path)) {
            return Err(format!("{text} is left out by .dockerignore"));
        }
        return Ok(vec![source]);
    }
    let mut found = vec![PathBuf::new()];
    for part in named.components() {
        let part = part.as_os_str().to_string_lossy().into_owned();
        if !is_pattern(&part) {
            found.iter_mut().for_each(|path| path.push(&part));
            continue;
        }
        let mut fitting = Vec::new();
        for directory in found {
            let at = context.join(follow_links(context, &directory)?);
            let Ok(entries) = fs::read_dir(&at) else { continue };
            for entry in entries {
                let name = entry.map_err(|e| format!("could not read {}: {e}", at.display()))?.file_name();
                if fits_name(&part, &name.to_string_lossy()) {
                    fitting.push(directory.join(name));
                }
            }
        }
        found = fitting;
    }
    found.retain(|path| fs::symlink_metadata(context.join(path)).is_ok() && !ignored.matches(path));
    found.sort();
    if found.is_empty() {
        return Err(format!("{text} fits nothing in the context that .dockerignore lets in"));
    }
    found.into_iter().map(|path| source(context, path)).collect()
}

fn source(context: &Path, named: PathBuf) -> Result<Source, String> {
    let path = follow_links(context, &named)?;
    match fs::symlink_metadata(context.join(&path)) {
        Ok(_) => Ok(Source { named, path }),
        Err(e) => Err(format!("could not read {} in the context: {e}", path.display())),
    }
}

/// Links lead through the context as if it were the root: no path leads out of it.
fn follow_links(context: &Path, path: &Path) -> Result<PathBuf, String> {
    follow(path, |at| fs::read_link(context.join(at)).ok())
}

/// A path without `.` and leading slashes; `..` is refused.
pub(super) fn inside(path: impl AsRef<Path>) -> Result<PathBuf, String> {
    let mut inside = PathBuf::new();
    for component in path.as_ref().components() {
        match component {
            Component::Normal(part) => inside.push(part),
            Component::ParentDir => {
                return Err(format!("{} has a `..`: name the path without it", path.as_ref().display()));
            }
            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
        }
    }
    Ok(inside)
}

/// The patterns of `.dockerignore`; the last that fits decides.
#[derive(Default)]
pub(super) struct Ignored(Vec<(bool, Vec<String>)>);

impl Ignored {
    pub(super) fn parse(text: &str) -> Self {
        let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
        Self(lines.map(|line| (!line.starts_with('!'), parts(line.trim_start_matches('!')))).collect())
    }

    pub(super) fn matches(&self, path: &Path) -> bool {
        let path = parts(&path.to_string_lossy());
        // A pattern that fits a directory fits all below it.
        let fits = |pattern: &[String]| (1..=path.len()).any(|n| fits_parts(pattern, &path[..n]));
        self.0.iter().rev().find(|(_, pattern)| fits(pattern)).is_some_and(|(out, _)| *out)
    }
}

fn parts(path: &str) -> Vec<String> {
    path.split('/').filter(|part| !matches!(*part, "" | ".")).map(str::to_owned).collect()
}

fn fits_parts(pattern: &[String], path: &[String]) -> bool {
    match (pattern.split_first(), path.split_first()) {
        (None, None) => true,
        (Some((first, rest)), _) if first == "**" => (0..=path.len()).any(|n| fits_parts(rest, &path[n..])),
        (Some((first, rest)), Some((part, below))) => fits_name(first, part) && fits_parts(rest, below),
        _ => false,
    }
}

fn is_pattern(text: &str) -> bool {
    text.contains(['*', '?', '['])
}

/// The patterns of Go's path.Match, for one component.
fn fits_name(pattern: &str, name: &str) -> bool {
    fn fits(pattern: &[char], name: &[char]) -> bool {
        match (pattern.split_first(), name.split_first()) {
            (None, None) => true,
            (Some(('*', rest)), _) => (0..=name.len()).any(|n| fits(rest, &name[n..])),
            (Some(('?', rest)), Some((_, below))) => fits(rest, below),
            (Some(('[', rest)), Some((c, below))) => {
                class(rest, *c).is_some_and(|(found, rest)| found && fits(rest, below))
            }
            (Some(('\\', [literal, rest @ ..])), Some((c, below))) => literal == c && fits(rest, below),
            (Some((a, rest)), Some((b, below))) => a == b && fits(rest, below),
            _ => false,
        }
    }
    fits(&pattern.chars().collect::<Vec<_>>(), &name.chars().collect::<Vec<_>>())
}

/// Whether a character is in the class that the pattern goes on with, and what follows; `None` if it does not end.
fn class(pattern: &[char], c: char) -> Option<(bool, &[char])> {
    let negated = pattern.first() == Some(&'^');
    let mut rest = if negated { &pattern[1..] } else { pattern };
    let mut found = false;
    loop {
        rest = match rest {
            [']', after @ ..] => return Some((found != negated, after)),
            [low, '-', high, after @ ..] if *high != ']' => {
                found |= (*low..=*high).contains(&c);
                after
            }
            [one, after @ ..] => {
                found |= *one == c;
                after
            }
            [] => return None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_pattern_that_fits_decides() {
        let ignored = Ignored::parse("# c\n*.log\n**/tmp\nkeep\n!keep/this\n");
        for (path, out) in [
            ("a.log", true),
            ("d/a.log", false),
            ("x/y/tmp/z", true),
            ("keep/it", true),
            ("keep/this", false),
        ] {
            assert_eq!(ignored.matches(Path::new(path)), out, "{path}");
        }
    }

    #[test]
    fn classes_and_escapes_are_those_of_go() {
        for (pattern, name, fits) in [
            ("[a-c]x", "bx", true),
            ("[^a-c]x", "bx", false),
            ("[^a-c]x", "dx", true),
            ("[a", "a", false),
            ("\\*", "*", true),
            ("\\*", "x", false),
            ("?", "ä", true),
            ("a*c*", "abbc", true),
        ] {
            assert_eq!(fits_name(pattern, name), fits, "{pattern} {name}");
        }
    }
}
