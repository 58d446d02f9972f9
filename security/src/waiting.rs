//! A place for those who have not shown yet that they may be here.

use std::{
    collections::BTreeMap,
    future::{Future, poll_fn},
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
};

use tokio::{
    sync::oneshot,
    time::{self, Duration, Instant},
};

/// Nobody loses a place before, however many come: time enough for who means well to say who it is.
const STAY: Duration = Duration::from_millis(50);

/// So many connections of strangers at once: whoever comes when it is full takes the place of the one that has waited
/// longest. So nobody who is slow, or comes in numbers, keeps those out who say at once who they are.
#[derive(Debug)]
pub struct WaitingRoom {
    places: usize,
    guests: Mutex<Guests>,
}

#[derive(Debug, Default)]
struct Guests {
    next: u64,
    /// By age.
    waiting: BTreeMap<u64, Guest>,
}

#[derive(Debug)]
struct Guest {
    since: Instant,
    /// Who loses its place hears of it.
    lose: oneshot::Sender<()>,
}

/// One connection's place. Dropped, it is free.
#[derive(Debug)]
pub struct WaitingPlace {
    room: Arc<WaitingRoom>,
    number: u64,
    lost: oneshot::Receiver<()>,
    is_lost: bool,
}

/// Of one connection: whether a request of it was let through, after which nobody puts it out. Clones are one.
#[derive(Clone, Debug, Default)]
pub struct Known(Arc<AtomicBool>);

impl Known {
    /// A request of it was let through.
    pub fn is_welcome(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    pub fn is_known(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

impl WaitingRoom {
    pub fn new(places: usize) -> Arc<Self> {
        Arc::new(Self { places: places.max(1), guests: Mutex::default() })
    }

    /// A place, at once or as soon as the one that has waited longest has had its time.
    pub async fn enter(self: &Arc<Self>) -> WaitingPlace {
        while let Some(wait) = self.make_room(Instant::now()) {
            time::sleep(wait).await;
        }
        let (lose, lost) = oneshot::channel();
        let mut guests = self.guests();
        let number = guests.next;
        guests.next += 1;
        guests.waiting.insert(number, Guest { since: Instant::now(), lose });
        WaitingPlace { room: self.clone(), number, lost, is_lost: false }
    }

    /// How long there will be none, if there is none.
    fn make_room(&self, now: Instant) -> Option<Duration> {
        let mut guests = self.guests();
        while guests.waiting.len() >= self.places
            && let Some(oldest) = guests.waiting.first_entry()
        {
            let stayed = now.saturating_duration_since(oldest.get().since);
            if stayed < STAY {
                return Some(STAY - stayed);
            }
            let _ = oldest.remove().lose.send(()); // or it is leaving just now
        }
        None
    }

    fn guests(&self) -> MutexGuard<'_, Guests> {
        self.guests.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl WaitingPlace {
    /// Ready once another has the place.
    pub fn poll_lost(&mut self, context: &mut Context<'_>) -> Poll<()> {
        // Whoever asks after that is told again.
        self.is_lost = self.is_lost || Pin::new(&mut self.lost).poll(context).is_ready();
        if self.is_lost { Poll::Ready(()) } else { Poll::Pending }
    }

    /// Returns once another has the place.
    pub async fn lost(&mut self) {
        poll_fn(|context| self.poll_lost(context)).await
    }
}

impl Drop for WaitingPlace {
    fn drop(&mut self) {
        self.room.guests().waiting.remove(&self.number);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::task::Waker;

    use super::*;

    fn is_lost(place: &mut WaitingPlace) -> bool {
        place.poll_lost(&mut Context::from_waker(Waker::noop())).is_ready()
    }

    #[tokio::test(start_paused = true)]
    async fn who_has_waited_longest_makes_room() {
        let room = WaitingRoom::new(2);
        let [mut first, mut second] = [room.enter().await, room.enter().await];
        assert!(!is_lost(&mut first));
        let came = Instant::now();
        let mut third = room.enter().await;
        assert!(came.elapsed() >= STAY, "nobody is put out at once");
        assert!(is_lost(&mut first) && is_lost(&mut first) && !is_lost(&mut second) && !is_lost(&mut third));
        drop(second); // it is known by now
        let came = Instant::now();
        let mut fourth = room.enter().await;
        assert!(came.elapsed() < STAY && !is_lost(&mut third) && !is_lost(&mut fourth));
        drop(first);
        assert_eq!(room.guests().waiting.len(), 2);
    }
}
