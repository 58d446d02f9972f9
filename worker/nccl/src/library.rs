//! NCCL itself, opened at run time.
//!
//! Types and layouts are cudarc's. Its own loader is not used: it does not know the name `libnccl.so.2`, panics where
//! the library or a function is missing, and reads results into a Rust enum, for which a newer library's codes would
//! be undefined behaviour.

use std::{
    error::Error,
    ffi::{CStr, c_char, c_int, c_uint, c_void},
    mem, ptr,
    ptr::NonNull,
};

use cudarc::nccl::sys::{ncclConfig_t, ncclUniqueId};
use libloading::os::unix::Library;

use crate::{
    CallError, ExchangeError,
    api::{Buffer, Comm, Element, Nccl, Status, Stream, UniqueId},
    version::Version,
};

/// The name in NVIDIA's wheels and packages first.
const NAMES: [&str; 2] = ["libnccl.so.2", "libnccl.so"];

const SUCCESS: c_int = 0;
const IN_PROGRESS: c_int = 7;
const SUM: c_uint = 0;
const REVOKE_DEFAULT: c_int = 0;

type CommPtr = *mut c_void;

/// The functions, as nccl.h declares them but for results as integers.
pub(crate) struct NcclLibrary {
    get_version: unsafe extern "C" fn(*mut c_int) -> c_int,
    get_unique_id: unsafe extern "C" fn(*mut ncclUniqueId) -> c_int,
    init_rank: unsafe extern "C" fn(*mut CommPtr, c_int, ncclUniqueId, c_int, *mut ncclConfig_t) -> c_int,
    get_async_error: unsafe extern "C" fn(CommPtr, *mut c_int) -> c_int,
    all_reduce: unsafe extern "C" fn(
        *const c_void,
        *mut c_void,
        usize,
        c_uint,
        c_uint,
        CommPtr,
        *mut c_void,
    ) -> c_int,
    broadcast:
        unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_uint, c_int, CommPtr, *mut c_void) -> c_int,
    revoke: Option<unsafe extern "C" fn(CommPtr, c_int) -> c_int>,
    abort: unsafe extern "C" fn(CommPtr) -> c_int,
    finalize: unsafe extern "C" fn(CommPtr) -> c_int,
    destroy: unsafe extern "C" fn(CommPtr) -> c_int,
    get_last_error: unsafe extern "C" fn(CommPtr) -> *const c_char,
}

impl NcclLibrary {
    /// Opens the library under one of its usual names and checks its version. Once libtorch's CUDA part is open,
    /// this is the very NCCL that it brought.
    pub fn open() -> Result<Self, ExchangeError> {
        let mut reasons = Vec::new();
        for name in NAMES {
            match Self::open_named(name) {
                Ok(library) => {
                    let version = library.version().map_err(|error| missing(error.to_string()))?;
                    return version.check().map(|()| library);
                }
                // The system's own words are the cause.
                Err(error) => {
                    reasons.push(error.source().map_or_else(|| error.to_string(), ToString::to_string))
                }
            }
        }
        Err(missing(reasons.join("; ")))
    }

    /// Of any version.
    pub fn open_named(name: &str) -> Result<Self, libloading::Error> {
        // SAFETY: NCCL's initialisers ask nothing of the caller; it is never unloaded, see below.
        let library = unsafe { Library::new(name)? };
        // SAFETY: each type is the function's in nccl.h, with its enums as integers of their size.
        let functions = unsafe {
            Self {
                get_version: *library.get(b"ncclGetVersion\0")?,
                get_unique_id: *library.get(b"ncclGetUniqueId\0")?,
                init_rank: *library.get(b"ncclCommInitRankConfig\0")?,
                get_async_error: *library.get(b"ncclCommGetAsyncError\0")?,
                all_reduce: *library.get(b"ncclAllReduce\0")?,
                broadcast: *library.get(b"ncclBroadcast\0")?,
                revoke: library.get(b"ncclCommRevoke\0").ok().map(|function| *function),
                abort: *library.get(b"ncclCommAbort\0")?,
                finalize: *library.get(b"ncclCommFinalize\0")?,
                destroy: *library.get(b"ncclCommDestroy\0")?,
                get_last_error: *library.get(b"ncclGetLastError\0")?,
            }
        };
        // Its threads may outlive any owner of the handle, and so must the functions.
        mem::forget(library);
        Ok(functions)
    }

    fn status(&self, call: &'static str, code: c_int) -> Result<Status, CallError> {
        match code {
            SUCCESS => Ok(Status::Done),
            IN_PROGRESS => Ok(Status::InProgress),
            code => Err(CallError { call, code, last_error: self.last_error() }),
        }
    }

    fn done(&self, call: &'static str, code: c_int) -> Result<(), CallError> {
        self.status(call, code).map(|_| ())
    }

    fn last_error(&self) -> String {
        // SAFETY: the argument is not used by the library; the answer is null or a C string of its own, which stays.
        let text = unsafe { (self.get_last_error)(ptr::null_mut()) };
        if text.is_null() {
            return String::new();
        }
        // SAFETY: not null, so a C string; NCCL may write over it meanwhile, within its bounds.
        let text = unsafe { CStr::from_ptr(text) };
        text.to_string_lossy().split_whitespace().collect::<Vec<_>>().join(" ")
    }
}

impl Nccl for NcclLibrary {
    fn version(&self) -> Result<Version, CallError> {
        let mut version = 0;
        // SAFETY: writes one integer.
        let code = unsafe { (self.get_version)(&mut version) };
        self.done("ncclGetVersion", code).map(|()| Version(version))
    }

    fn unique_id(&self) -> Result<UniqueId, CallError> {
        let mut id = ncclUniqueId { internal: [0; UniqueId::BYTES] };
        // SAFETY: writes the id.
        let code = unsafe { (self.get_unique_id)(&mut id) };
        self.done("ncclGetUniqueId", code).map(|()| UniqueId(id.internal.map(|byte| byte as u8)))
    }

    fn init_rank(&self, id: &UniqueId, rank: u32, world: u32) -> Result<Comm, CallError> {
        let id = ncclUniqueId { internal: id.0.map(|byte| byte as c_char) };
        let (mut comm, mut config) = (ptr::null_mut(), non_blocking());
        // SAFETY: writes the handle at once; reads id and config during the call only.
        let code = unsafe { (self.init_rank)(&mut comm, world as c_int, id, rank as c_int, &mut config) };
        self.status("ncclCommInitRankConfig", code)?;
        let null = || CallError {
            call: "ncclCommInitRankConfig",
            code,
            last_error: "it gave no communicator".into(),
        };
        NonNull::new(comm).map(Comm).ok_or_else(null)
    }

    unsafe fn async_error(&self, comm: Comm) -> Result<Status, CallError> {
        let mut state = SUCCESS;
        // SAFETY: the caller's handle; writes one integer.
        let code = unsafe { (self.get_async_error)(comm.0.as_ptr(), &mut state) };
        self.done("ncclCommGetAsyncError", code)?;
        self.status("ncclCommGetAsyncError", state)
    }

    unsafe fn all_reduce(&self, comm: Comm, buffer: Buffer, stream: Stream) -> Result<Status, CallError> {
        let Buffer { address, elements, element } = buffer;
        // SAFETY: the caller's handle, memory and stream.
        let code = unsafe {
            (self.all_reduce)(address, address, elements, data_type(element), SUM, comm.0.as_ptr(), stream.0)
        };
        self.status("ncclAllReduce", code)
    }

    unsafe fn broadcast(
        &self,
        comm: Comm,
        buffer: Buffer,
        root: u32,
        stream: Stream,
    ) -> Result<Status, CallError> {
        let Buffer { address, elements, element } = buffer;
        let (data_type, root) = (data_type(element), root as c_int);
        // SAFETY: the caller's handle, memory and stream.
        let code = unsafe {
            (self.broadcast)(address, address, elements, data_type, root, comm.0.as_ptr(), stream.0)
        };
        self.status("ncclBroadcast", code)
    }

    unsafe fn revoke(&self, comm: Comm) -> Option<Result<Status, CallError>> {
        // SAFETY: the caller's handle.
        let code = unsafe { (self.revoke?)(comm.0.as_ptr(), REVOKE_DEFAULT) };
        Some(self.status("ncclCommRevoke", code))
    }

    unsafe fn abort(&self, comm: Comm) -> Result<(), CallError> {
        // SAFETY: the caller's handle, which is not used again.
        let code = unsafe { (self.abort)(comm.0.as_ptr()) };
        self.done("ncclCommAbort", code)
    }

    unsafe fn finalize(&self, comm: Comm) -> Result<Status, CallError> {
        // SAFETY: the caller's handle.
        let code = unsafe { (self.finalize)(comm.0.as_ptr()) };
        self.status("ncclCommFinalize", code)
    }

    unsafe fn destroy(&self, comm: Comm) -> Result<(), CallError> {
        // SAFETY: the caller's handle, which is not used again.
        let code = unsafe { (self.destroy)(comm.0.as_ptr()) };
        self.done("ncclCommDestroy", code)
    }
}

fn data_type(element: Element) -> c_uint {
    use cudarc::nccl::sys::ncclDataType_t::*;
    (match element {
        Element::U8 => ncclUint8,
        Element::F32 => ncclFloat32,
        Element::F64 => ncclFloat64,
        Element::Bf16 => ncclBfloat16,
    }) as c_uint
}

/// `NCCL_CONFIG_INITIALIZER` of the header that cudarc has, but for `blocking`. The library reads what it knows of
/// it, by size and version.
fn non_blocking() -> ncclConfig_t {
    const MAGIC: c_uint = 0xcafe_beef;
    const HEADER: c_uint = 2_28_03;
    const UNDEFINED: c_int = c_int::MIN;
    ncclConfig_t {
        size: size_of::<ncclConfig_t>(),
        magic: MAGIC,
        version: HEADER,
        blocking: 0,
        cgaClusterSize: UNDEFINED,
        minCTAs: UNDEFINED,
        maxCTAs: UNDEFINED,
        netName: ptr::null(),
        splitShare: UNDEFINED,
        trafficClass: UNDEFINED,
        commName: ptr::null(),
        collnetEnable: UNDEFINED,
        CTAPolicy: UNDEFINED,
        shrinkShare: UNDEFINED,
        nvlsCTAs: UNDEFINED,
        nChannelsPerNetPeer: UNDEFINED,
        nvlinkCentricSched: UNDEFINED,
    }
}

fn missing(reason: String) -> ExchangeError {
    ExchangeError::Missing { reason }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// The wheel's library needs no GPU to say its version and to make an id.
    #[test]
    fn the_library_answers_where_it_is_installed() {
        let name = std::env::var("MUSHER_NCCL").unwrap_or_else(|_| NAMES[0].into());
        let library = match NcclLibrary::open_named(&name) {
            Ok(library) => library,
            Err(error) => return println!("skipped: {error}; set MUSHER_NCCL to a libnccl.so.2"),
        };
        let version = library.version().unwrap();
        version.check().unwrap();
        assert_eq!(library.revoke.is_some(), version >= Version(2_28_07), "{version}");
        let ids = [library.unique_id(), library.unique_id()].map(Result::unwrap);
        assert_ne!(ids[0], ids[1], "each generation has its own");
        println!("NCCL {version}");
    }

    #[test]
    fn a_machine_without_nccl_is_told_what_is_missing() {
        if NAMES.iter().any(|name| NcclLibrary::open_named(name).is_ok()) {
            return println!("skipped: NCCL is here");
        }
        let message = NcclLibrary::open().map(drop).unwrap_err().to_string();
        assert!(message.contains("libnccl.so.2") && message.contains("CUDA build of libtorch"), "{message}");
        assert!(!message.contains('\n'), "{message}");
    }
}
