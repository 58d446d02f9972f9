//! The end of a process in which libtorch may be at work.

use std::io::Write;

use crate::ffi;

/// Ends this process at once, with that exit code. An orderly end would tear libtorch down under the threads that
/// compute, which crashes now and then, and hides the code.
pub fn exit_at_once(code: u8) -> ! {
    // What nobody reads any more is lost.
    let _ = std::io::stdout().flush();
    let _ = std::io::stderr().flush();
    // SAFETY: ends the process; nothing of it runs afterwards.
    unsafe { ffi::torch_ext_exit(code.into()) }
}
