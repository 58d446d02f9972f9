//! Object stores, `s3://`, `gs://` and `az://`, for threads that block.
//!
//! Owns how a store is reached: its URL, credentials from the environment, retries with backoff, uploads in
//! pieces, writes under a condition, and one sentence for whatever goes wrong. Knows nothing of what is kept
//! there. Requests run on threads of this crate's own, so it works with and without an async runtime around
//! it; callers on one keep it off their async threads.

mod address;
mod connect;
mod error;
mod reader;
mod runtime;
mod upload;

use std::{fmt, ops::Range, sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::{StreamExt, TryStreamExt};
use object_store::{
    Error, ObjectMeta, ObjectStore, ObjectStoreExt, PutMode, PutOptions, PutPayload, UpdateVersion,
    path::Path,
};

pub use address::is_url;
pub use connect::{Patience, Variables, environment};
pub use error::StoreError;
pub use reader::Reader;
pub use upload::Upload;

use address::Address;
use runtime::wait;

/// How often the outcome of a conditional write is looked for, when its response was lost.
const ATTEMPTS: u32 = 3;
const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// Objects deleted at once.
const DELETIONS: usize = 16;

/// A place in an object store: a bucket, and the prefix of all keys here.
///
/// Keys are relative to the prefix, with `/` between their parts.
#[derive(Clone)]
pub struct Store {
    inner: Arc<dyn ObjectStore>,
    address: Arc<Address>,
}

/// An object that is there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    pub key: String,
    pub bytes: u64,
    pub version: Version,
}

/// One state of an object: a write that changes it changes this.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Version {
    e_tag: Option<String>,
    number: Option<String>,
}

/// What must hold for a write to take effect.
#[derive(Clone, Copy, Debug)]
pub enum Condition<'a> {
    /// There is no object of that key.
    Absent,
    /// It is still the one that was seen.
    Unchanged(&'a Version),
}

impl Store {
    /// Takes the credentials from `variables`, which are [`environment`]'s or a test's. Asks nothing of the
    /// store; [`Store::check`] does.
    pub fn open(url: &str, variables: &Variables, patience: Patience) -> Result<Self, StoreError> {
        let address = Address::parse(url)?;
        let inner = connect::connect(&address, variables, patience)?;
        Ok(Self { inner, address: Arc::new(address) })
    }

    /// Whether it can be reached, the bucket is there, and the credentials let us see it.
    pub fn check(&self) -> Result<(), StoreError> {
        let (inner, prefix) = (self.inner.clone(), self.path(""));
        let first = wait(async move {
            let mut objects = inner.list(Some(&prefix?));
            objects.next().await.transpose().map_err(Failed::from)
        });
        first.map(drop).map_err(|failed| self.error("list", "", failed))
    }

    /// The URL, which never holds a secret.
    pub fn url(&self) -> &str {
        self.address.url()
    }

    /// `key` as people write it.
    pub fn url_of(&self, key: &str) -> String {
        self.address.url_of(key)
    }

    /// A whole object; `None` if it is not there.
    pub fn get(&self, key: &str) -> Result<Option<(Bytes, Version)>, StoreError> {
        let (inner, path) = (self.inner.clone(), self.path(key));
        let got = wait(async move { absent_is_none(get(&*inner, &path?).await) });
        got.map_err(|failed| self.error("read", key, failed))
    }

    /// The bytes `range` of an object. A range that ends past the object's end is cut short.
    pub fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes, StoreError> {
        let (inner, path) = (self.inner.clone(), self.path(key));
        let got = wait(async move { Ok(inner.get_range(&path?, range).await?) });
        got.map_err(|failed| self.error("read", key, failed))
    }

    /// Reads an object from its first byte to its last, without holding it.
    pub fn reader(&self, key: &str) -> Result<Reader, StoreError> {
        let (inner, path) = (self.inner.clone(), self.path(key));
        let got = wait(async move { Ok(inner.get(&path?).await?) });
        got.map(Reader::new).map_err(|failed| self.error("read", key, failed))
    }

    /// What is known of an object without reading it; `None` if it is not there.
    pub fn head(&self, key: &str) -> Result<Option<Entry>, StoreError> {
        let (inner, path) = (self.inner.clone(), self.path(key));
        let got = wait(async move { absent_is_none(inner.head(&path?).await.map_err(Failed::from)) });
        match got {
            Ok(meta) => Ok(meta.map(|meta| self.entry(meta))),
            Err(failed) => Err(self.error("look at", key, failed)),
        }
    }

    /// Writes a whole object, in the place of the one there was.
    pub fn put(&self, key: &str, bytes: impl Into<Bytes>) -> Result<Version, StoreError> {
        let (inner, path, bytes) = (self.inner.clone(), self.path(key), bytes.into());
        let put = wait(async move { Ok(inner.put(&path?, bytes.into()).await?) });
        put.map(|put| Version { e_tag: put.e_tag, number: put.version })
            .map_err(|failed| self.error("write", key, failed))
    }

    /// Writes an object if `condition` holds at that moment, and else fails with [`StoreError::Condition`].
    ///
    /// A response that is lost on its way back leaves open whether the write took effect. Then the object is
    /// read: if it holds `bytes`, it did. So no two writers may write the same bytes to one key.
    ///
    /// After any other error it may yet take effect: a request can be late.
    pub fn put_if(
        &self,
        key: &str,
        bytes: impl Into<Bytes>,
        condition: Condition<'_>,
    ) -> Result<Version, StoreError> {
        let (inner, path, bytes) = (self.inner.clone(), self.path(key), bytes.into());
        let mode = match condition {
            Condition::Absent => PutMode::Create,
            Condition::Unchanged(Version { e_tag, number }) => {
                PutMode::Update(UpdateVersion { e_tag: e_tag.clone(), version: number.clone() })
            }
        };
        let put = wait(async move { put_if(&*inner, &path?, bytes, mode).await });
        put.map_err(|failed| self.error("write", key, failed))
    }

    /// Begins an object whose bytes come one after the other. It is not there before
    /// [`Upload::finish`].
    pub fn upload(&self, key: &str) -> Result<Upload, StoreError> {
        let path = self.path(key).map_err(|failed| self.error("write", key, failed))?;
        Ok(Upload::new(self.clone(), key.to_owned(), path))
    }

    /// All objects whose key begins with the folder `prefix`, in the order of their keys; an empty prefix
    /// stands for all.
    pub fn list(&self, prefix: &str) -> Result<Vec<Entry>, StoreError> {
        let (inner, path) = (self.inner.clone(), self.path(prefix));
        let listed = wait(async move { Ok(inner.list(Some(&path?)).try_collect::<Vec<_>>().await?) });
        let listed: Vec<_> = listed.map_err(|failed| self.error("list", prefix, failed))?;
        let mut entries: Vec<_> = listed.into_iter().map(|meta| self.entry(meta)).collect();
        entries.sort_by(|a, b| a.key.cmp(&b.key));
        Ok(entries)
    }

    /// Removes an object; one that is not there is none to fail over.
    pub fn delete(&self, key: &str) -> Result<(), StoreError> {
        self.delete_all(&[key.to_owned()])
    }

    /// Removes objects, some at a time.
    pub fn delete_all(&self, keys: &[String]) -> Result<(), StoreError> {
        let paths: Result<Vec<_>, _> = keys.iter().map(|key| self.path(key)).collect();
        let inner = self.inner.clone();
        let deleted = wait(async move {
            let deletions = paths?.into_iter().map(|path| {
                let inner = inner.clone();
                async move { absent_is_none(inner.delete(&path).await.map_err(Failed::from)).map(drop) }
            });
            futures_util::stream::iter(deletions).buffer_unordered(DELETIONS).try_collect::<Vec<()>>().await
        });
        deleted.map(drop).map_err(|failed| self.error("remove from", "", failed))
    }

    fn path(&self, key: &str) -> Result<Path, Failed> {
        Path::parse(self.address.path_of(key)).map_err(|error| Failed(error.into()))
    }

    fn entry(&self, meta: ObjectMeta) -> Entry {
        let key = self.address.key_of(meta.location.as_ref());
        Entry { key, bytes: meta.size, version: Version { e_tag: meta.e_tag, number: meta.version } }
    }

    fn error(&self, action: &'static str, key: &str, Failed(error): Failed) -> StoreError {
        error::tell(&self.address, action, key, &error)
    }
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Store").field(&self.url()).finish()
    }
}

/// An error that has not been told in a sentence yet.
#[derive(Debug)]
pub(crate) struct Failed(pub Error);

impl From<Error> for Failed {
    fn from(error: Error) -> Self {
        Self(error)
    }
}

fn absent_is_none<T>(result: Result<T, Failed>) -> Result<Option<T>, Failed> {
    match result {
        Ok(found) => Ok(Some(found)),
        Err(Failed(error)) if error::is_absent(&error) => Ok(None),
        Err(failed) => Err(failed),
    }
}

async fn get(inner: &dyn ObjectStore, path: &Path) -> Result<(Bytes, Version), Failed> {
    let got = inner.get(path).await?;
    let version = Version { e_tag: got.meta.e_tag.clone(), number: got.meta.version.clone() };
    Ok((got.bytes().await?, version))
}

async fn put_if(
    inner: &dyn ObjectStore,
    path: &Path,
    bytes: Bytes,
    mode: PutMode,
) -> Result<Version, Failed> {
    let mut pause = FIRST_PAUSE;
    for attempt in 1.. {
        let options = PutOptions { mode: mode.clone(), ..PutOptions::default() };
        let error = match inner.put_opts(path, PutPayload::from(bytes.clone()), options).await {
            Ok(put) => return Ok(Version { e_tag: put.e_tag, number: put.version }),
            Err(error) => error,
        };
        if !error::is_unmet(&error) && !error::may_have_taken_effect(&error) {
            return Err(error.into());
        }
        // An earlier attempt's response may have been lost, also where this one says that the condition
        // does not hold: that attempt may be why.
        match absent_is_none(get(inner, path).await) {
            Ok(Some((found, version))) if found == bytes => return Ok(version),
            Ok(Some(_)) if error::is_unmet(&error) => return Err(error.into()),
            // It has been out of reach for as long as a request is tried again.
            Err(_) => return Err(error.into()),
            // A create that is said to collide with nothing met another that is still on its way.
            Ok(None) if error::is_unmet(&error) && mode != PutMode::Create => return Err(error.into()),
            _ if attempt == ATTEMPTS => return Err(error.into()),
            _ => {}
        }
        tokio::time::sleep(pause).await;
        pause *= 2;
    }
    unreachable!("the last attempt returns")
}
