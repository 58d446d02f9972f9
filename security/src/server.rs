//! The coordinator's side of TLS: its certificate, whose certificates it takes, and both again when their files
//! change.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::SystemTime,
};

use thiserror::Error;
use tokio::{
    io::{AsyncWriteExt, copy as io_copy, sink},
    net::TcpStream,
    time,
};
use tokio_rustls::{
    TlsAcceptor,
    rustls::{
        self, CertificateError, RootCertStore, ServerConfig,
        pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
        server::WebPkiClientVerifier,
    },
    server::TlsStream,
};

/// For one that is refused to read why.
const FAREWELL: std::time::Duration = std::time::Duration::from_secs(1);

/// PEM files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsFiles {
    /// The chain, its own certificate first.
    pub certificate: PathBuf,
    pub key: PathBuf,
    /// Whose certificates are taken.
    pub ca: PathBuf,
}

#[derive(Debug, Error)]
pub enum TlsError {
    #[error("cannot read {}: {reason}; it must be a PEM file with {what}", path.display())]
    Unreadable { path: PathBuf, what: &'static str, reason: String },
    #[error("{} and {} do not make an identity: {reason}", files.certificate.display(), files.key.display())]
    Unfit { files: Box<TlsFiles>, reason: String },
}

/// Why a handshake failed, for the log and for counting.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Unwelcome {
    NoCertificate,
    UnknownAuthority,
    Expired,
    /// Anything else that is wrong with the peer's certificate.
    BadCertificate,
    /// The peer does not take our certificate.
    Distrustful,
    /// It speaks something else.
    NotTls,
}

impl Unwelcome {
    /// For tools.
    pub fn cause(self) -> &'static str {
        match self {
            Unwelcome::NoCertificate => "certificate_missing",
            Unwelcome::UnknownAuthority => "certificate_unknown_ca",
            Unwelcome::Expired => "certificate_expired",
            Unwelcome::BadCertificate => "certificate_bad",
            Unwelcome::Distrustful => "peer_distrusts_us",
            Unwelcome::NotTls => "not_tls",
        }
    }

    fn from_error(error: &io::Error) -> Self {
        let Some(error) = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) else {
            return Unwelcome::NotTls; // it hung up
        };
        match error {
            rustls::Error::NoCertificatesPresented => Unwelcome::NoCertificate,
            rustls::Error::InvalidCertificate(
                CertificateError::UnknownIssuer | CertificateError::BadSignature,
            ) => Unwelcome::UnknownAuthority,
            rustls::Error::InvalidCertificate(
                CertificateError::Expired
                | CertificateError::ExpiredContext { .. }
                | CertificateError::NotValidYet
                | CertificateError::NotValidYetContext { .. },
            ) => Unwelcome::Expired,
            rustls::Error::InvalidCertificate(_) => Unwelcome::BadCertificate,
            rustls::Error::AlertReceived(_) => Unwelcome::Distrustful,
            _ => Unwelcome::NotTls,
        }
    }
}

/// Whether clients must show a certificate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Clients {
    Certified,
    /// Browsers and Prometheus show something else.
    Any,
}

/// Takes TLS connections; clones share what was read.
#[derive(Clone)]
pub struct TlsServer(Arc<Inner>);

struct Inner {
    files: TlsFiles,
    clients: Clients,
    protocols: Vec<Vec<u8>>,
    loaded: Mutex<Loaded>,
}

#[derive(Clone)]
struct Loaded {
    config: Arc<ServerConfig>,
    version: Version,
}

/// When the files were changed last.
type Version = [Option<SystemTime>; 3];

impl TlsServer {
    /// For gRPC: clients show a certificate of the files' authority.
    pub fn mutual(files: TlsFiles) -> Result<Self, TlsError> {
        Self::new(files, Clients::Certified, &[b"h2"])
    }

    /// For HTTP: clients see ours.
    pub fn one_sided(files: TlsFiles) -> Result<Self, TlsError> {
        Self::new(files, Clients::Any, &[b"http/1.1"])
    }

    fn new(files: TlsFiles, clients: Clients, protocols: &[&[u8]]) -> Result<Self, TlsError> {
        let protocols: Vec<_> = protocols.iter().map(|protocol| protocol.to_vec()).collect();
        let version = version(&files);
        let config = load(&files, clients, &protocols)?;
        Ok(Self(Arc::new(Inner {
            files,
            clients,
            protocols,
            loaded: Mutex::new(Loaded { config, version }),
        })))
    }

    /// Shakes hands. Files that have changed since the last time are read again; where that fails, what was read
    /// before still holds, and `complain` hears why.
    pub async fn accept(
        &self,
        stream: TcpStream,
        complain: impl FnOnce(TlsError),
    ) -> Result<TlsStream<TcpStream>, Unwelcome> {
        let config = self.current(complain);
        TlsAcceptor::from(config).accept(stream).into_fallible().await.map_err(|(error, stream)| {
            tokio::spawn(see_off(stream));
            Unwelcome::from_error(&error)
        })
    }

    fn current(&self, complain: impl FnOnce(TlsError)) -> Arc<ServerConfig> {
        let Inner { files, clients, protocols, loaded } = &*self.0;
        let mut loaded = loaded.lock().unwrap_or_else(PoisonError::into_inner);
        let version = version(files);
        if version != loaded.version {
            // Also after a failure: it is complained of once, until the next change.
            loaded.version = version;
            match load(files, *clients, protocols) {
                Ok(config) => loaded.config = config,
                Err(error) => complain(error),
            }
        }
        loaded.config.clone()
    }
}

impl std::fmt::Debug for TlsServer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TlsServer").field("files", &self.0.files).finish_non_exhaustive()
    }
}

/// Closes a connection so that its peer reads the alert that was sent: with bytes of its own unread, it would see
/// a reset instead.
async fn see_off(mut stream: TcpStream) {
    let _ = stream.shutdown().await;
    let _ = time::timeout(FAREWELL, io_copy(&mut stream, &mut sink())).await;
}

fn version(files: &TlsFiles) -> Version {
    [&files.certificate, &files.key, &files.ca]
        .map(|file| fs::metadata(file).and_then(|it| it.modified()).ok())
}

fn load(files: &TlsFiles, clients: Clients, protocols: &[Vec<u8>]) -> Result<Arc<ServerConfig>, TlsError> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let unfit = |reason: String| TlsError::Unfit { files: Box::new(files.clone()), reason };
    let builder = ServerConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .map_err(|error| unfit(error.to_string()))?;
    let builder = match clients {
        Clients::Any => builder.with_no_client_auth(),
        Clients::Certified => {
            let what = "an authority's certificate";
            let mut roots = RootCertStore::empty();
            for certificate in certificates(&files.ca, what)? {
                roots.add(certificate).map_err(|error| unreadable(&files.ca, what, &error))?;
            }
            let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider)
                .build()
                .map_err(|error| unreadable(&files.ca, what, &error))?;
            builder.with_client_cert_verifier(verifier)
        }
    };
    let chain = certificates(&files.certificate, "a certificate")?;
    let key = PrivateKeyDer::from_pem_file(&files.key)
        .map_err(|error| unreadable(&files.key, "a private key", &error))?;
    let mut config = builder.with_single_cert(chain, key).map_err(|error| unfit(error.to_string()))?;
    config.alpn_protocols = protocols.to_vec();
    Ok(Arc::new(config))
}

fn certificates(path: &Path, what: &'static str) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let read = CertificateDer::pem_file_iter(path).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    match read {
        Ok(found) if found.is_empty() => Err(unreadable(path, what, &"there is none in it")),
        Ok(found) => Ok(found),
        Err(error) => Err(unreadable(path, what, &error)),
    }
}

fn unreadable(path: &Path, what: &'static str, reason: &dyn std::fmt::Display) -> TlsError {
    TlsError::Unreadable { path: path.into(), what, reason: reason.to_string() }
}
