//! An S3-compatible server on loopback, for tests: s3s over a directory, with credentials, conditional
//! writes, and a front that does to requests what networks and servers do to them.

mod faults;

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
};

use hyper::{Request, body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use s3s::{
    auth::SimpleAuth,
    service::{S3Service, S3ServiceBuilder},
};
use s3s_fs::FileSystem;
use tempfile::TempDir;
use tokio::{net::TcpListener, runtime::Runtime};

use faults::Front;
pub use faults::{Effect, Fault, Request as Seen};

pub const ACCESS_KEY: &str = "musher-tests";
pub const SECRET_KEY: &str = "not-much-of-a-secret";
/// The one bucket that is there.
pub const BUCKET: &str = "pets";

/// A server that lives as long as this value.
pub struct S3Server {
    address: SocketAddr,
    files: TempDir,
    front: Arc<Front>,
    _runtime: Runtime,
}

impl S3Server {
    pub fn start() -> Self {
        let files = tempfile::tempdir().expect("there is room for a directory");
        std::fs::create_dir(files.path().join(BUCKET)).expect("the directory is new");
        let file_system = FileSystem::new(files.path()).expect("the directory is there");
        let mut builder = S3ServiceBuilder::new(file_system);
        builder.set_auth(SimpleAuth::from_single(ACCESS_KEY, SECRET_KEY));
        let service = builder.build();
        let runtime = Runtime::new().expect("this machine can start threads");
        let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).expect("loopback has free ports");
        let address = listener.local_addr().expect("a listener has an address");
        let front = Arc::new(Front::new(files.path().to_owned()));
        runtime.spawn(serve(listener, service, front.clone()));
        Self { address, files, front, _runtime: runtime }
    }

    /// For `AWS_ENDPOINT_URL`.
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// What a process needs in its environment to use the server.
    pub fn environment(&self) -> Vec<(String, String)> {
        let endpoint = self.endpoint();
        let variables = [
            ("AWS_ENDPOINT_URL", endpoint.as_str()),
            ("AWS_ACCESS_KEY_ID", ACCESS_KEY),
            ("AWS_SECRET_ACCESS_KEY", SECRET_KEY),
            ("AWS_REGION", "us-east-1"),
        ];
        variables.map(|(name, value)| (name.to_owned(), value.to_owned())).to_vec()
    }

    /// Where the objects of the bucket lie as files.
    pub fn files(&self) -> PathBuf {
        self.files.path().join(BUCKET)
    }

    /// The next request that `fault` is for suffers it; faults come in the order in which they were ordered.
    pub fn order(&self, fault: Fault) {
        self.front.order(fault);
    }

    /// Those that were ordered, and that no request came for yet.
    pub fn faults_left(&self) -> usize {
        self.front.left()
    }

    /// All requests so far.
    pub fn seen(&self) -> Vec<Seen> {
        self.front.seen()
    }

    /// The objects whose key begins with `prefix`.
    pub fn keys(&self, prefix: &str) -> Vec<String> {
        let mut keys = Vec::new();
        collect(&self.files(), &self.files(), &mut keys);
        keys.retain(|key| key.starts_with(prefix));
        keys.sort();
        keys
    }
}

fn collect(root: &Path, dir: &Path, keys: &mut Vec<String>) {
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        let name = entry.file_name().to_string_lossy().into_owned();
        if path.is_dir() {
            collect(root, &path, keys);
        } else if !name.starts_with('.') {
            // The server's own notes begin with a dot.
            let key = path.strip_prefix(root).unwrap_or(&path);
            keys.push(key.to_string_lossy().into_owned());
        }
    }
}

async fn serve(listener: TcpListener, service: S3Service, front: Arc<Front>) {
    while let Ok((socket, _)) = listener.accept().await {
        let (service, front) = (service.clone(), front.clone());
        tokio::spawn(async move {
            let answer = service_fn(move |request: Request<Incoming>| {
                let (service, front) = (service.clone(), front.clone());
                async move { front.answer(request, &service).await }
            });
            // An error is a connection that was cut, by one side or by a fault.
            let _ = http1::Builder::new().serve_connection(TokioIo::new(socket), answer).await;
        });
    }
}
