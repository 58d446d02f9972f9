//! Checkpoints in an object store: a folder each, visible once the index names it.
//!
//! A checkpoint's parts come first, then its manifest, then the index, by a write that is conditional on the
//! version this process wrote or saw last. Folders are never used twice.

use std::sync::{
    Arc, Mutex, MutexGuard,
    atomic::{AtomicU64, Ordering},
};

use musher_proto::ids::CheckpointId;
use musher_store::{Condition, Store, StoreError as RemoteError, Version};
use tracing::{info, warn};

use super::index::{self, Committed, INDEX, Index, Owner};
use super::{MANIFEST, Manifest, Source, StoreError, manifest};

#[derive(Debug, Clone)]
pub(super) struct Objects {
    store: Store,
    /// The index as this process wrote it last; `None` while it only looks.
    held: Arc<Mutex<Option<Held>>>,
    attempts: Arc<AtomicU64>,
}

#[derive(Debug)]
struct Held {
    index: Index,
    version: Version,
}

impl Objects {
    pub fn new(store: Store) -> Self {
        Self { store, held: Arc::default(), attempts: Arc::default() }
    }

    pub fn url(&self) -> &str {
        self.store.url()
    }

    pub fn store(&self) -> &Store {
        &self.store
    }

    pub fn owner(&self) -> Result<Option<Owner>, StoreError> {
        Ok(self.read_index()?.map(|held| held.index.owner))
    }

    pub fn take_over(&self, owner: Owner) -> Result<(), StoreError> {
        let former = self.read_index()?;
        let checkpoints = former.as_ref().map(|former| former.index.checkpoints.clone()).unwrap_or_default();
        if let Some(former) = &former {
            let Owner { run, term, .. } = &former.index.owner;
            info!(
                store = self.url(),
                run,
                former_term = term.0,
                term = owner.term.0,
                "taking the store over"
            );
        }
        let index = Index::new(owner, random(), checkpoints);
        let condition =
            former.as_ref().map_or(Condition::Absent, |former| Condition::Unchanged(&former.version));
        let text = index.to_bytes(random());
        let version = self.store.put_if(INDEX, text.clone(), condition)?;
        self.check_conditions(text)?;
        let folders: Vec<_> = index.checkpoints.iter().map(|committed| committed.folder.clone()).collect();
        *self.lock() = Some(Held { index, version });
        self.clear(&folders)
    }

    /// A server that ignores conditions would let two coordinators overwrite each other.
    fn check_conditions(&self, index: Vec<u8>) -> Result<(), StoreError> {
        let mut other = index;
        other.push(b'\n'); // not the same bytes, and the same index
        match self.store.put_if(INDEX, other, Condition::Absent) {
            Err(RemoteError::Condition { .. }) => Ok(()),
            Ok(_) => Err(StoreError::Unconditional { url: self.url().into() }),
            Err(error) => Err(error.into()),
        }
    }

    /// Removes folders that no checkpoint is in: those of processes that died, or were fenced.
    fn clear(&self, folders: &[String]) -> Result<(), StoreError> {
        let keys = self.store.list("")?.into_iter().map(|entry| entry.key);
        let lost: Vec<_> = keys
            .filter(|key| {
                let folder = key.split_once('/').map_or("", |(folder, _)| folder);
                index::is_folder(folder) && !folders.iter().any(|known| known == folder)
            })
            .collect();
        Ok(self.store.delete_all(&lost)?)
    }

    pub fn ids(&self) -> Result<Vec<CheckpointId>, StoreError> {
        Ok(self
            .index()?
            .map(|index| index.checkpoints.into_iter().map(|it| it.id).collect())
            .unwrap_or_default())
    }

    pub fn manifest(&self, id: &CheckpointId) -> Result<Manifest, StoreError> {
        let key = format!("{}/{MANIFEST}", self.folder_of(id)?);
        let url = self.store.url_of(&key);
        let (text, _) = self.store.get(&key)?.ok_or(RemoteError::Absent { url: url.clone() })?;
        manifest::parse(&text, id, url.as_ref())
    }

    pub fn source(&self, id: &CheckpointId, file: &str) -> Result<Source, StoreError> {
        let reader = self.store.reader(&format!("{}/{file}", self.folder_of(id)?))?;
        Ok(Source { bytes: reader.bytes(), reader: Box::new(reader) })
    }

    /// A folder that nothing was ever put into.
    pub fn new_folder(&self, id: &CheckpointId) -> Result<String, StoreError> {
        let attempt = self.attempts.fetch_add(1, Ordering::Relaxed);
        let held = self.lock();
        let held = held.as_ref().ok_or_else(|| StoreError::ReadOnly { url: self.url().into() })?;
        Ok(index::folder(id, held.index.owner.term, attempt))
    }

    /// Makes the checkpoint in `folder` visible, in the place of a damaged one of that name.
    pub fn commit(&self, id: &CheckpointId, folder: String) -> Result<(), StoreError> {
        let damaged = self.index()?.and_then(|index| index.folder_of(id).map(str::to_owned));
        self.change(|checkpoints| {
            checkpoints.retain(|committed| committed.id != *id);
            checkpoints.push(Committed { id: id.clone(), folder: folder.clone() });
        })?;
        if let Some(folder) = damaged {
            self.discard_later(folder);
        }
        Ok(())
    }

    /// The index first: what is half-removed is not seen any more.
    pub fn remove(&self, doomed: &[CheckpointId]) -> Result<(), StoreError> {
        if doomed.is_empty() {
            return Ok(());
        }
        let Some(index) = self.index()? else { return Ok(()) };
        let folders: Vec<_> = doomed.iter().filter_map(|id| index.folder_of(id).map(str::to_owned)).collect();
        self.change(|checkpoints| checkpoints.retain(|committed| !doomed.contains(&committed.id)))?;
        folders.iter().try_for_each(|folder| self.discard(folder))
    }

    /// Removes what is in a folder.
    pub fn discard(&self, folder: &str) -> Result<(), StoreError> {
        let keys: Vec<_> = self.store.list(folder)?.into_iter().map(|entry| entry.key).collect();
        Ok(self.store.delete_all(&keys)?)
    }

    /// Removes what is in a folder, some time soon; what can't be removed goes when the store is taken over.
    pub fn discard_later(&self, folder: String) {
        let objects = self.clone();
        std::thread::spawn(move || {
            if let Err(error) = objects.discard(&folder) {
                warn!(folder, %error, "what is left of a checkpoint could not be removed");
            }
        });
    }

    /// Writes the index anew. Who only looks may do so too, in the name of the one whose store it is: that
    /// one reads it again, and goes on.
    fn change(&self, edit: impl Fn(&mut Vec<Committed>)) -> Result<(), StoreError> {
        let mut held = self.lock();
        let looks = held.is_none();
        let absent = || RemoteError::Absent { url: self.store.url_of(INDEX) };
        let Held { mut index, mut version } = match held.take() {
            Some(held) => held,
            None => self.read_index()?.ok_or_else(absent)?,
        };
        let (writer, term) = (index.writer.clone(), index.owner.term);
        let changed = loop {
            let mut edited = index.clone();
            edit(&mut edited.checkpoints);
            match self.store.put_if(INDEX, edited.to_bytes(random()), Condition::Unchanged(&version)) {
                Ok(version) => break Ok(Held { index: edited, version }),
                Err(RemoteError::Condition { .. }) => match self.read_index() {
                    Ok(Some(now)) if now.index.writer == writer => {
                        (index, version) = (now.index, now.version);
                    }
                    Ok(now) => {
                        let by = now.map(|now| now.index.owner.term.0);
                        break Err(StoreError::Fenced { url: self.url().into(), term: term.0, by });
                    }
                    Err(error) => break Err(error),
                },
                Err(error) => break Err(error.into()),
            }
        };
        match changed {
            Ok(now) => {
                *held = Some(now).filter(|_| !looks);
                Ok(())
            }
            Err(error) => {
                // The old version: if the write took effect after all, the next one finds out.
                *held = Some(Held { index, version }).filter(|_| !looks);
                Err(error)
            }
        }
    }

    fn folder_of(&self, id: &CheckpointId) -> Result<String, StoreError> {
        let index = self.index()?;
        let folder = index.as_ref().and_then(|index| index.folder_of(id));
        let absent = || RemoteError::Absent { url: self.store.url_of(id.as_str()) };
        folder.map(str::to_owned).ok_or_else(|| absent().into())
    }

    /// As this process wrote it last, if it writes.
    fn index(&self) -> Result<Option<Index>, StoreError> {
        if let Some(held) = &*self.lock() {
            return Ok(Some(held.index.clone()));
        }
        Ok(self.read_index()?.map(|held| held.index))
    }

    fn read_index(&self) -> Result<Option<Held>, StoreError> {
        let Some((text, version)) = self.store.get(INDEX)? else { return Ok(None) };
        let index = Index::parse(&text, &self.store.url_of(INDEX))?;
        Ok(Some(Held { index, version }))
    }

    fn lock(&self) -> MutexGuard<'_, Option<Held>> {
        self.held.lock().expect("no holder of this lock panics")
    }
}

fn random() -> String {
    hex::encode(rand::random::<[u8; 8]>())
}
