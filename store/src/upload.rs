//! An object that is written piece by piece: small ones at once, larger ones in parts.

use std::{collections::VecDeque, fmt, mem};

use object_store::{MultipartUpload, ObjectStoreExt, PutPayload, path::Path};
use tokio::task::JoinHandle;

use crate::{
    Entry, Failed, Store, StoreError, Version, error,
    runtime::{runtime, wait},
};

/// Bytes of a part. Stores take at least 5 MiB, some want all parts equal, and 10,000 parts must do.
const PART: usize = 8 << 20;
/// Parts on their way at once: one is sent while the next is gathered. It bounds the memory of an upload.
const IN_FLIGHT: usize = 2;

/// Takes an object's bytes in order. Dropping it before it is finished leaves nothing visible.
pub struct Upload {
    store: Store,
    key: String,
    path: Path,
    bytes: u64,
    buffer: Vec<u8>,
    parts: Option<Box<dyn MultipartUpload>>,
    in_flight: VecDeque<JoinHandle<object_store::Result<()>>>,
}

impl Upload {
    pub(crate) fn new(store: Store, key: String, path: Path) -> Self {
        Self { store, key, path, bytes: 0, buffer: Vec::new(), parts: None, in_flight: VecDeque::new() }
    }

    /// Takes the next bytes. Blocks while parts before them are on their way.
    pub fn write(&mut self, mut bytes: &[u8]) -> Result<(), StoreError> {
        self.bytes += bytes.len() as u64;
        while !bytes.is_empty() {
            let (now, rest) = bytes.split_at(bytes.len().min(PART - self.buffer.len()));
            self.buffer.extend_from_slice(now);
            bytes = rest;
            if self.buffer.len() == PART {
                self.send().map_err(|failed| self.error(failed))?;
            }
        }
        Ok(())
    }

    /// Makes the object visible, whole.
    pub fn finish(mut self) -> Result<Entry, StoreError> {
        self.complete().map_err(|failed| self.error(failed))
    }

    fn complete(&mut self) -> Result<Entry, Failed> {
        if self.parts.is_none() {
            let (inner, path) = (self.store.inner.clone(), self.path.clone());
            let payload = PutPayload::from(mem::take(&mut self.buffer));
            let put = wait(async move { inner.put(&path, payload).await })?;
            return Ok(self.entry(Version { e_tag: put.e_tag, number: put.version }));
        }
        if !self.buffer.is_empty() {
            self.send()?;
        }
        while !self.in_flight.is_empty() {
            self.await_oldest()?;
        }
        let mut parts = self.parts.take().expect("there are parts, or it had returned");
        let (inner, path, bytes) = (self.store.inner.clone(), self.path.clone(), self.bytes);
        let version = wait(async move {
            let completed = match parts.complete().await {
                Ok(put) => return Ok(Version { e_tag: put.e_tag, number: put.version }),
                Err(error) => error,
            };
            // If the response was lost, the object may be there, and the upload unknown now.
            match inner.head(&path).await {
                Ok(meta) if meta.size == bytes => Ok(Version { e_tag: meta.e_tag, number: meta.version }),
                _ => {
                    let _ = parts.abort().await; // the error that matters is the first
                    Err(Failed(completed))
                }
            }
        })?;
        Ok(self.entry(version))
    }

    /// Puts the buffer on its way as the next part.
    fn send(&mut self) -> Result<(), Failed> {
        if self.in_flight.len() == IN_FLIGHT {
            self.await_oldest()?;
        }
        if self.parts.is_none() {
            let (inner, path) = (self.store.inner.clone(), self.path.clone());
            self.parts = Some(wait(async move { inner.put_multipart(&path).await })?);
        }
        let parts = self.parts.as_mut().expect("it was just begun");
        let full = mem::replace(&mut self.buffer, Vec::with_capacity(PART));
        self.in_flight.push_back(runtime().spawn(parts.put_part(full.into())));
        Ok(())
    }

    fn await_oldest(&mut self) -> Result<(), Failed> {
        let Some(oldest) = self.in_flight.pop_front() else { return Ok(()) };
        wait(oldest).map_err(object_store::Error::from)??;
        Ok(())
    }

    fn entry(&self, version: Version) -> Entry {
        Entry { key: self.key.clone(), bytes: self.bytes, version }
    }

    fn error(&self, Failed(error): Failed) -> StoreError {
        error::tell(&self.store.address, "write", &self.key, &error)
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        self.in_flight.drain(..).for_each(|part| part.abort());
        if let Some(mut parts) = self.parts.take() {
            // What a crash leaves in this way is invisible, and the bucket's life-cycle rules remove it.
            runtime().spawn(async move {
                let _ = parts.abort().await;
            });
        }
    }
}

impl fmt::Debug for Upload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Upload").field("key", &self.key).field("bytes", &self.bytes).finish()
    }
}
