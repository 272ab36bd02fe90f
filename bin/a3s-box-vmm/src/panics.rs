//! A thread that panics must not leave a process behind that neither works nor ends.

/// The exit code of a process one of whose threads panicked.
const PANICKED: i32 = 73;

/// From now on a panic in any thread ends the process, after it was printed.
#[allow(unsafe_code)]
pub(crate) fn end_the_process() {
    let print = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        print(panic);
        // SAFETY: the process ends here; nothing is unwound or flushed, and nothing needs to be.
        unsafe { libc::_exit(PANICKED) }
    }));
}
