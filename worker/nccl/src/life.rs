//! The life of one communicator: which calls may be made when. Pure; it makes none, and knows no clock.
//!
//! ```text
//!   Connecting ──► Ready ──► Finalizing ──► Freed
//!        │           │            │
//!        └───────────┴── Broken ──┤          Broken: NCCL said so; nothing but an abort is left
//!                                 ▼
//!                             Aborting ────► Freed
//!                                 └────────► Stuck        past the deadline: the process must end
//! ```
//!
//! One thread owns the communicator and is *inside* during each of its calls. Another may abort at any time: from
//! then on nobody gets inside, and once the owner is out, the communicator is freed, by whoever holds
//! the [`Permit`].

/// What the owner is about to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Intent {
    /// Ask how the communicator is.
    Poll,
    /// Enqueue an exchange.
    Launch,
    /// Let go of the peers.
    Finalize,
    /// Free what is finalized.
    Destroy,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    Connecting,
    Ready,
    Finalizing,
    Broken,
    Aborting,
    Freed,
    Stuck,
}

/// Why the owner may not get inside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// Not in this phase: a bug of the caller's, which would be undefined behaviour in NCCL.
    OutOfOrder(Phase),
    /// No more calls.
    Over,
}

/// To free the communicator by an abort: there is one in its life.
#[derive(Debug)]
#[must_use = "the communicator is to be aborted by whoever holds this"]
pub(crate) struct Permit {
    /// There may be something in flight, and NCCL is in a state to be told to stop it.
    pub revocable: bool,
}

#[derive(Debug)]
pub(crate) struct Life {
    phase: Phase,
    inside: Option<Intent>,
    revocable: bool,
}

impl Life {
    /// From the moment that the ranks begin to connect.
    pub fn begin() -> Self {
        Self { phase: Phase::Connecting, inside: None, revocable: false }
    }

    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// The owner is about to call. It must [`leave`](Self::leave) if this is granted.
    pub fn enter(&mut self, intent: Intent) -> Result<(), Refusal> {
        use Phase::*;
        match (self.phase, intent) {
            (Broken | Aborting | Freed | Stuck, _) => return Err(Refusal::Over),
            (Connecting | Ready | Finalizing, Intent::Poll)
            | (Ready, Intent::Launch | Intent::Finalize)
            | (Finalizing, Intent::Destroy) => {}
            (phase, _) => return Err(Refusal::OutOfOrder(phase)),
        }
        debug_assert_eq!(self.inside, None, "one owner, one call at a time");
        self.inside = Some(intent);
        Ok(())
    }

    /// The call has returned. What was destroyed is gone, even if an abort came meanwhile.
    pub fn leave(&mut self) {
        if self.inside.take() == Some(Intent::Destroy) {
            self.phase = Phase::Freed;
        }
    }

    /// The ranks are connected.
    pub fn connected(&mut self) {
        if self.go(Phase::Connecting, Phase::Ready) {
            self.revocable = true;
        }
    }

    /// The peers are being let go of.
    pub fn finalizing(&mut self) {
        if self.go(Phase::Ready, Phase::Finalizing) {
            self.revocable = false;
        }
    }

    /// NCCL reported an error.
    pub fn broke(&mut self) {
        if matches!(self.phase, Phase::Connecting | Phase::Ready | Phase::Finalizing) {
            self.phase = Phase::Broken;
        }
    }

    /// No more calls. The first one to ask gets the permit; there is none if the communicator is gone.
    pub fn abort(&mut self) -> Option<Permit> {
        if matches!(self.phase, Phase::Aborting | Phase::Freed | Phase::Stuck) {
            return None;
        }
        self.phase = Phase::Aborting;
        Some(Permit { revocable: self.revocable })
    }

    /// Nobody is inside, and nobody will be.
    pub fn is_vacated(&self) -> bool {
        self.phase == Phase::Aborting && self.inside.is_none()
    }

    /// The communicator is gone.
    pub fn freed(&mut self) {
        self.phase = Phase::Freed;
    }

    /// The abort's deadline has passed. What it may still come to is of no interest.
    pub fn stuck(&mut self) {
        if self.phase == Phase::Aborting {
            self.phase = Phase::Stuck;
        }
    }

    /// An abort that came in between wins.
    fn go(&mut self, from: Phase, to: Phase) -> bool {
        let is_due = self.phase == from;
        if is_due {
            self.phase = to;
        }
        is_due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(phase: Phase) -> Life {
        Life { phase, inside: None, revocable: phase == Phase::Ready }
    }

    #[test]
    fn what_may_be_called_when() {
        use Intent::*;
        let allowed = [
            (Phase::Connecting, &[Poll][..]),
            (Phase::Ready, &[Poll, Launch, Finalize]),
            (Phase::Finalizing, &[Poll, Destroy]),
            (Phase::Broken, &[]),
            (Phase::Aborting, &[]),
            (Phase::Freed, &[]),
            (Phase::Stuck, &[]),
        ];
        for (phase, intents) in allowed {
            for intent in [Poll, Launch, Finalize, Destroy] {
                assert_eq!(
                    at(phase).enter(intent).is_ok(),
                    intents.contains(&intent),
                    "{intent:?} in {phase:?}"
                );
            }
        }
        assert_eq!(at(Phase::Connecting).enter(Launch), Err(Refusal::OutOfOrder(Phase::Connecting)));
        assert_eq!(at(Phase::Aborting).enter(Launch), Err(Refusal::Over));
    }

    #[test]
    fn one_abort_in_a_life_and_only_once_the_owner_is_out() {
        let mut life = at(Phase::Ready);
        assert!(life.enter(Intent::Launch).is_ok());
        assert!(life.abort().is_some_and(|permit| permit.revocable));
        assert!(life.abort().is_none(), "a second one has nothing to do");
        assert!(!life.is_vacated());
        life.leave();
        assert!(life.is_vacated());
        life.freed();
        assert!(!life.is_vacated() && life.abort().is_none());
    }

    #[test]
    fn an_abort_is_never_overtaken() {
        let mut life = Life::begin();
        assert!(life.abort().is_some_and(|permit| !permit.revocable));
        life.connected();
        life.broke();
        life.finalizing();
        assert_eq!(life.phase(), Phase::Aborting);
        life.stuck();
        assert_eq!(life.phase(), Phase::Stuck);
    }

    #[test]
    fn what_was_destroyed_is_not_aborted_too() {
        let mut life = at(Phase::Finalizing);
        assert!(life.enter(Intent::Destroy).is_ok());
        assert!(life.abort().is_some_and(|permit| !permit.revocable));
        life.leave();
        assert_eq!((life.phase(), life.is_vacated()), (Phase::Freed, false));
    }

    #[test]
    fn what_is_broken_can_only_be_aborted() {
        for phase in [Phase::Connecting, Phase::Ready, Phase::Finalizing] {
            let mut life = at(phase);
            life.broke();
            assert_eq!(life.enter(Intent::Poll), Err(Refusal::Over));
            assert!(life.abort().is_some());
        }
    }
}
