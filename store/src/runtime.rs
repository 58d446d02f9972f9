//! The threads that requests run on, one set a process.

use std::sync::{OnceLock, mpsc};

use tokio::runtime::{Builder, Runtime};

/// Requests wait for the network; two threads serve many at once.
const THREADS: usize = 2;

pub(crate) fn runtime() -> &'static Runtime {
    static RUNTIME: OnceLock<Runtime> = OnceLock::new();
    RUNTIME.get_or_init(|| {
        let mut builder = Builder::new_multi_thread();
        builder.worker_threads(THREADS).thread_name("store").enable_all();
        builder.build().expect("a process that runs can start two threads more")
    })
}

/// Blocks until `future` is done.
pub(crate) fn wait<T: Send + 'static>(future: impl Future<Output = T> + Send + 'static) -> T {
    // One answer, and somebody who waits for it.
    let (sender, answer) = mpsc::sync_channel(1);
    runtime().spawn(async move {
        let _ = sender.send(future.await);
    });
    answer.recv().expect("the future does not panic")
}
