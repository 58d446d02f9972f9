//! Breaking an exchange off from another thread: a flag, an eventfd that wakes the thread inside
//! it, and a shutdown of its sockets that lets the neighbours know.

use std::{
    net::{Shutdown, TcpStream},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{
        Arc, Mutex, PoisonError, Weak,
        atomic::{AtomicBool, Ordering},
    },
};

use rustix::event::{EventfdFlags, eventfd};

use crate::{CollectiveError, error::Break};

/// Ends the formation and the exchange of one generation. Clones share one state; once aborted it
/// stays so, and the next generation takes a new one.
#[derive(Clone, Debug)]
pub struct Aborter(Arc<State>);

#[derive(Debug)]
struct State {
    raised: AtomicBool,
    /// Readable once `raised`; never read, so it wakes every later wait too.
    signal: OwnedFd,
    /// Weak: an aborter that is kept does not keep a dropped ring's connections open.
    links: Mutex<Vec<Weak<TcpStream>>>,
}

impl Aborter {
    pub fn new() -> Result<Self, CollectiveError> {
        let signal = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|e| CollectiveError::io("create an eventfd", e))?;
        Ok(Self(Arc::new(State { raised: AtomicBool::new(false), signal, links: Mutex::default() })))
    }

    /// Makes the call in progress and every later one fail with [`CollectiveError::Aborted`], and
    /// closes the connections, so that the neighbours' calls fail too. Returns at once, and may be
    /// called repeatedly.
    pub fn abort(&self) {
        // The flag first: a thread that then finds its sockets shut knows why.
        self.0.raised.store(true, Ordering::SeqCst);
        // The one error possible is a full counter, which is readable already.
        let _ = rustix::io::write(&self.0.signal, &1u64.to_ne_bytes());
        self.shut_links();
    }

    pub fn is_aborted(&self) -> bool {
        self.0.raised.load(Ordering::SeqCst)
    }

    pub(crate) fn check(&self) -> Result<(), Break> {
        if self.is_aborted() { Err(Break::Aborted) } else { Ok(()) }
    }

    /// Readable once aborted.
    pub(crate) fn signal(&self) -> BorrowedFd<'_> {
        self.0.signal.as_fd()
    }

    /// Lets [`abort`](Self::abort) close `link` too.
    pub(crate) fn attach(&self, link: &Arc<TcpStream>) {
        self.0.links.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::downgrade(link));
        if self.is_aborted() {
            self.shut_links();
        }
    }

    fn shut_links(&self) {
        let links = self.0.links.lock().unwrap_or_else(PoisonError::into_inner);
        for link in links.iter().filter_map(Weak::upgrade) {
            // It fails only where the peer was quicker.
            let _ = link.shutdown(Shutdown::Both);
        }
    }
}
