//! Identifiers as newtypes: a term is never mistaken for a generation, nor a step for an epoch.
//!
//! Numbers order as they count; strings are for people and are compared only for equality.

use std::fmt;

use serde::{Deserialize, Serialize};

macro_rules! number {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub $inner);

        impl $name {
            /// The one after it; the greatest stays, as peers may claim any number.
            pub const fn next(self) -> Self {
                Self(self.0.saturating_add(1))
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

macro_rules! name {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub String);

        impl $name {
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl From<&str> for $name {
            fn from(text: &str) -> Self {
                Self(text.to_owned())
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&self.0)
            }
        }
    };
}

number! {
    /// One life of the coordinator; grows at every start. Workers refuse lower terms.
    Term(u64)
}
number! {
    /// One fixed membership of the team; grows by one at each change. 0: outside any generation.
    Generation(u64)
}
number! {
    /// A worker's place in its generation, `0..world_size`.
    Rank(u32)
}
number! {
    /// One pass over the training split, counted from 1.
    Epoch(u32)
}
number! {
    /// Optimizer updates since the run began; "applied" counts those that are in the parameters.
    Step(u64)
}
number! {
    /// One connection of one worker. Events of a replaced session are ignored.
    Session(u64)
}

name! {
    /// A worker's stable name, for example `node-3.0`; one process, one device.
    WorkerId
}
name! {
    /// A checkpoint's name, which sorts as its age: `e0003-s00000420`.
    CheckpointId
}

impl CheckpointId {
    /// The checkpoint taken in `epoch` after `applied` steps.
    pub fn of(epoch: Epoch, applied: Step) -> Self {
        Self(format!("e{:04}-s{:08}", epoch.0, applied.0))
    }

    /// The same at the epoch's end, before its validation was judged: another checkpoint than the one
    /// after it, which knows the verdict and may hold the best weights.
    pub fn before_validation(epoch: Epoch, applied: Step) -> Self {
        Self(format!("e{:04}-s{:08}-unvalidated", epoch.0, applied.0))
    }

    /// The epoch that it was taken in, and the steps that were applied; `None` of a name that says neither.
    pub fn position(&self) -> Option<(Epoch, Step)> {
        let mut parts = self.0.split('-');
        let epoch = parts.next()?.strip_prefix('e')?.parse().ok()?;
        let applied = parts.next()?.strip_prefix('s')?.parse().ok()?;
        Some((Epoch(epoch), Step(applied)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_checkpoints_name_says_where_it_was_taken() {
        let at = (Epoch(12), Step(123_456_789));
        for id in [CheckpointId::of(at.0, at.1), CheckpointId::before_validation(at.0, at.1)] {
            assert_eq!(id.position(), Some(at), "{id}");
        }
        for foreign in ["", "best", "e1", "e1-x2", "s1-e2"] {
            assert_eq!(CheckpointId::from(foreign).position(), None, "{foreign:?}");
        }
    }
}
