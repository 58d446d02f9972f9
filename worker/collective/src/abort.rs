//! Breaking an exchange off from another thread: a flag, an eventfd that wakes the thread inside
//! it, and a shutdown of its sockets that lets the neighbours know.

use std::{
    fmt,
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
    hooks: Mutex<Hooks>,
}

/// What else an abort breaks off; each is called once.
#[derive(Default)]
struct Hooks(Vec<Box<dyn FnOnce() + Send>>);

impl fmt::Debug for Hooks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} hooks", self.0.len())
    }
}

impl Aborter {
    pub fn new() -> Result<Self, CollectiveError> {
        let signal = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|e| CollectiveError::io("create an eventfd", e))?;
        let (raised, links, hooks) = (AtomicBool::new(false), Mutex::default(), Mutex::default());
        Ok(Self(Arc::new(State { raised, signal, links, hooks })))
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
        self.call_hooks();
    }

    /// Calls `hook` when this is aborted, once, on the thread that aborts; now if it is aborted already. It must
    /// return at once.
    pub fn on_abort(&self, hook: impl FnOnce() + Send + 'static) {
        self.0.hooks.lock().unwrap_or_else(PoisonError::into_inner).0.push(Box::new(hook));
        if self.is_aborted() {
            self.call_hooks();
        }
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

    fn call_hooks(&self) {
        let hooks = std::mem::take(&mut *self.0.hooks.lock().unwrap_or_else(PoisonError::into_inner));
        hooks.0.into_iter().for_each(|hook| hook());
    }

    fn shut_links(&self) {
        let links = self.0.links.lock().unwrap_or_else(PoisonError::into_inner);
        for link in links.iter().filter_map(Weak::upgrade) {
            // It fails only where the peer was quicker.
            let _ = link.shutdown(Shutdown::Both);
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;

    #[test]
    fn a_hook_is_called_once_whenever_it_came() {
        let (aborter, (sender, called)) = (Aborter::new().unwrap(), channel());
        let early = sender.clone();
        aborter.on_abort(move || early.send("early").unwrap());
        assert!(called.try_recv().is_err());
        aborter.clone().abort();
        aborter.on_abort(move || sender.send("late").unwrap());
        aborter.abort();
        assert_eq!(called.iter().collect::<Vec<_>>(), ["early", "late"]);
    }
}
