//! Words for the user. The standard macros panic when nobody reads any more (`a3s-box images | head -1`); here that is
//! no failure.

use std::fmt::Display;
use std::io::Write;

/// Writes to stdout as it is.
pub(crate) fn out(words: impl Display) {
    let mut stdout = std::io::stdout().lock();
    let _ = write!(stdout, "{words}").and_then(|()| stdout.flush());
}

/// Writes to stderr as it is.
pub(crate) fn err(words: impl Display) {
    let _ = write!(std::io::stderr().lock(), "{words}");
}

/// A line for stderr, with our name in front: stderr may carry the command's own words too.
macro_rules! note {
    ($($words:tt)*) => {
        $crate::tell::err(format_args!("a3s-box: {}\n", format_args!($($words)*)))
    };
}
pub(crate) use note;
