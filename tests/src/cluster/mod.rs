//! A cluster to speak with: a server with an API server's REST interface over TLS, for the kinds that runs are
//! made of, and as much of the Job controller as gives Jobs their pods.
//!
//! It keeps what it is given, with the owners of fields that server-side apply asks for, and refuses as an API
//! server does. Pods run nothing. Lists merge as one value, where an API server knows the keys of some; it
//! checks no schema (`tools/manifests.py` does).

mod api;
mod fields;
mod forward;
mod objects;

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use axum::{Router, body::Body, extract::Request, response::Response};
use hyper_util::{rt::TokioIo, service::TowerToHyperService};
use musher_security::{Authority, Leaf, TlsFiles, TlsServer, Validity, write};
use serde_json::Value;
use tokio::{net::TcpListener, runtime::Runtime, sync::watch};

pub use objects::Objects;

/// Who asks, for the API server.
const TOKEN: &str = "the-token-of-ann";

/// Runs until it is dropped.
#[derive(Debug)]
pub struct Cluster {
    shared: Arc<Shared>,
    dir: PathBuf,
    address: SocketAddr,
    _runtime: Runtime,
}

#[derive(Debug)]
struct Shared {
    objects: Mutex<Objects>,
    /// Tells those who follow a log that there is more.
    news: watch::Sender<u64>,
}

impl Shared {
    fn objects(&self) -> MutexGuard<'_, Objects> {
        self.objects.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Cluster {
    /// Keeps certificates and the kubeconfig in `dir`. It has the namespaces `default` and `train`.
    pub fn start(dir: &Path) -> Self {
        std::fs::create_dir_all(dir).expect("the scene's directory is writable");
        let authority = Authority::new().expect("keys can be made");
        let server = Leaf::Coordinator { names: vec!["127.0.0.1".into()] };
        let issued = authority.issue(&server, Validity::Long).expect("certificates can be made");
        issued.write(dir, "server").expect("the directory is writable");
        write(&dir.join("ca.pem"), &authority.pem(), 0o644).expect("the directory is writable");
        let tls = TlsServer::one_sided(TlsFiles {
            certificate: dir.join("server.pem"),
            key: dir.join("server-key.pem"),
            ca: dir.join("ca.pem"),
        })
        .expect("the certificates were written just now");
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .expect("the system has threads");
        let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).expect("loopback has a free port");
        let address = listener.local_addr().expect("it is bound");
        let shared = Arc::new(Shared { objects: Mutex::new(Objects::new()), news: watch::Sender::new(0) });
        runtime.spawn(accept(listener, tls, shared.clone()));
        let cluster = Self { shared, dir: dir.to_owned(), address, _runtime: runtime };
        cluster.kubeconfig("config", TOKEN);
        cluster
    }

    /// Writes a kubeconfig for a user with this token, with two contexts: `here`, the current one, whose
    /// namespace is `train`, and `nowhere`, where no server is.
    pub fn kubeconfig(&self, name: &str, token: &str) -> PathBuf {
        let file = self.dir.join(name);
        let text = format!(
            "apiVersion: v1\nkind: Config\ncurrent-context: here\n\
             clusters:\n\
             - {{name: here, cluster: {{server: \"https://{}\", certificate-authority: ca.pem}}}}\n\
             - {{name: nowhere, cluster: {{server: \"https://127.0.0.1:1\", certificate-authority: ca.pem}}}}\n\
             users:\n- {{name: ann, user: {{token: {token}}}}}\n\
             contexts:\n\
             - {{name: here, context: {{cluster: here, user: ann, namespace: train}}}}\n\
             - {{name: nowhere, context: {{cluster: nowhere, user: ann}}}}\n",
            self.address
        );
        std::fs::write(&file, text).expect("the directory is writable");
        file
    }

    /// What it has, to look at and to change.
    pub fn objects(&self) -> MutexGuard<'_, Objects> {
        self.shared.objects()
    }

    /// The object of that name in `train`.
    #[track_caller]
    pub fn object(&self, plural: &str, name: &str) -> Value {
        let found = self.objects().get(plural, "train", name);
        found.unwrap_or_else(|| panic!("there is no {name} among {plural}"))
    }

    /// A pod writes a line.
    pub fn say(&self, pod: &str, line: &str) {
        self.objects().say(pod, line);
        self.shared.news.send_modify(|news| *news += 1);
    }

    /// A pod will write no more.
    pub fn fall_silent(&self, pod: &str) {
        self.objects().fall_silent(pod);
        self.shared.news.send_modify(|news| *news += 1);
    }
}

async fn accept(listener: TcpListener, tls: TlsServer, shared: Arc<Shared>) {
    let router = Router::new().fallback(move |request: Request| answer(shared.clone(), request));
    while let Ok((stream, _)) = listener.accept().await {
        let (tls, router) = (tls.clone(), router.clone());
        tokio::spawn(async move {
            // One that does not like our certificate goes away.
            let Ok(stream) = tls.accept(stream, |_| {}).await else { return };
            let _ = hyper::server::conn::http1::Builder::new()
                .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router))
                .with_upgrades()
                .await;
        });
    }
}

async fn answer(shared: Arc<Shared>, request: Request) -> Response<Body> {
    api::answer(&shared, request).await.unwrap_or_else(api::Refusal::into_response)
}
