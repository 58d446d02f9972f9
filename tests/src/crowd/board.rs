//! What the crowd's workers have come to, and when the last of them came to it.

use std::{
    collections::BTreeMap,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use anyhow::bail;
use musher_proto::{
    ids::{Epoch, Generation},
    message::ReplicaLabel,
};
use tokio::{sync::Notify, time};

/// For the slowest of what is waited for.
const PATIENCE: Duration = Duration::from_secs(120);

#[derive(Debug, Default)]
pub(super) struct Board {
    /// How many train, and since when the last of them does.
    training: Mutex<BTreeMap<(Generation, Epoch), (usize, Instant)>>,
    changed: Notify,
    newest: Mutex<Option<ReplicaLabel>>,
}

impl Board {
    /// A worker begins to.
    pub fn trains(&self, generation: Generation, epoch: Epoch) {
        let mut training = self.training.lock().unwrap_or_else(PoisonError::into_inner);
        let (count, last) = training.entry((generation, epoch)).or_insert((0, Instant::now()));
        (*count, *last) = (*count + 1, Instant::now());
        self.changed.notify_one();
    }

    /// Waits until `count` workers train in that epoch, in one generation after `former`. Returns the generation, and
    /// when the last of them began.
    pub async fn training(
        &self,
        count: usize,
        epoch: Epoch,
        former: Generation,
    ) -> anyhow::Result<(Generation, Instant)> {
        let waiting = async {
            loop {
                if let Some(found) = self.found(count, epoch, former) {
                    return found;
                }
                self.changed.notified().await;
            }
        };
        match time::timeout(PATIENCE, waiting).await {
            Ok(found) => Ok(found),
            Err(_) => bail!("{count} workers do not train in epoch {epoch} after {PATIENCE:?}: {self:?}"),
        }
    }

    fn found(&self, count: usize, epoch: Epoch, former: Generation) -> Option<(Generation, Instant)> {
        let training = self.training.lock().unwrap_or_else(PoisonError::into_inner);
        training.iter().find_map(|(&(generation, at), &(came, last))| {
            (at == epoch && generation > former && came == count).then_some((generation, last))
        })
    }

    pub fn advance(&self, held: ReplicaLabel) {
        let mut newest = self.newest.lock().unwrap_or_else(PoisonError::into_inner);
        if newest.is_none_or(|newest| held.applied > newest.applied) {
            *newest = Some(held);
        }
    }

    /// The most advanced of what anybody holds.
    pub fn newest(&self) -> Option<ReplicaLabel> {
        *self.newest.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
