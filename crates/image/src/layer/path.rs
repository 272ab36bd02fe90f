//! Names out of tars, as components inside our own tree.

use crate::erofs::NAME_MAX;

use super::convert::ConvertError;

/// Longer paths cannot be named by any system call (PATH_MAX, less its NUL).
const PATH_MAX: usize = 4095;

/// The components of a path of an entry or hard link. A leading slash means our root; `.` and
/// empty components vanish; `..` takes the name before it away, as in the text and not by following links: so all
/// other readers have it. One with nothing before it is refused.
pub(super) fn components(path: &[u8]) -> Result<Vec<Box<[u8]>>, ConvertError> {
    if path.len() > PATH_MAX {
        let longest = path.split(|b| *b == b'/').map(<[u8]>::len).max().unwrap_or(0);
        if longest > NAME_MAX {
            return Err(ConvertError::NameTooLong { name: shown(path), length: longest });
        }
        return Err(ConvertError::PathTooLong { path: shown(path), length: path.len() });
    }
    let mut components: Vec<Box<[u8]>> = Vec::new();
    for component in path.split(|b| *b == b'/') {
        match component {
            b"" | b"." => {}
            b".." if components.pop().is_some() => {}
            b".." => return Err(ConvertError::Climbs { path: shown(path) }),
            _ if component.len() > NAME_MAX => {
                return Err(ConvertError::NameTooLong { name: shown(path), length: component.len() });
            }
            _ if component.contains(&0) => return Err(ConvertError::NulInName { path: shown(path) }),
            _ => components.push(component.into()),
        }
    }
    Ok(components)
}

/// The components of a symlink's target, `..` kept: they are followed inside our own tree only.
pub(super) fn target_components(target: &[u8]) -> impl DoubleEndedIterator<Item = Box<[u8]>> {
    target.split(|b| *b == b'/').filter(|c| !matches!(*c, b"" | b".")).map(Box::from)
}

/// A path for a message: readable, and not longer than a line.
pub(super) fn shown(path: &[u8]) -> String {
    let text = String::from_utf8_lossy(&path[..path.len().min(120)]).into_owned();
    if path.len() > 120 { format!("{text}…") } else { text }
}
