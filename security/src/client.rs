//! How workers and the command line show who they are, and whom they trust.

use std::{error::Error as _, fs, io, path::PathBuf};

use clap::Args;
use thiserror::Error;
use tokio_rustls::rustls;
use tonic::{
    Request, Status,
    metadata::{Ascii, MetadataValue},
    service::{Interceptor, interceptor::InterceptedService},
    transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity},
};

use crate::{Token, TokenError};

/// Flags of every command that reaches a coordinator.
#[derive(Clone, Debug, Default, Args)]
#[command(next_help_heading = "Credentials")]
pub struct CredentialsArgs {
    /// Certificate of the authority that the coordinator's certificate must come from (PEM)
    #[arg(long, value_name = "FILE", env = "MUSHER_TLS_CA")]
    pub tls_ca: Option<PathBuf>,
    /// This side's certificate (PEM)
    #[arg(long, value_name = "FILE", env = "MUSHER_TLS_CERT", requires = "tls_key")]
    pub tls_cert: Option<PathBuf>,
    /// This side's private key (PEM)
    #[arg(long, value_name = "FILE", env = "MUSHER_TLS_KEY", requires = "tls_cert")]
    pub tls_key: Option<PathBuf>,
    /// File with the token to show; MUSHER_TOKEN may hold the token itself
    #[arg(long, value_name = "FILE", env = "MUSHER_TOKEN_FILE")]
    pub token_file: Option<PathBuf>,
}

/// The variable that may hold a token itself.
const TOKEN: &str = "MUSHER_TOKEN";

/// What this side shows. Certificates are read at each connection, so they may change.
#[derive(Clone, Debug, Default)]
pub struct Credentials {
    files: CredentialsArgs,
    token: Option<Token>,
}

#[derive(Debug, Error)]
pub enum CredentialsError {
    #[error("cannot read {}: {source}", path.display())]
    Unreadable { path: PathBuf, source: io::Error },
    #[error("{url} is encrypted, but there is nothing to know the coordinator by: give --tls-ca FILE")]
    NoAuthority { url: String },
    #[error(transparent)]
    Tls(#[from] tonic::transport::Error),
}

/// A channel whose every request shows the token, if there is one.
pub type Link = InterceptedService<Channel, Identified>;

/// Adds the token to each request.
#[derive(Clone, Debug, Default)]
pub struct Identified(Option<MetadataValue<Ascii>>);

impl Interceptor for Identified {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(bearer) = &self.0 {
            request.metadata_mut().insert("authorization", bearer.clone());
        }
        Ok(request)
    }
}

impl CredentialsArgs {
    /// `also` may hold the token too: the variable that the coordinator itself reads.
    pub fn read(self, also: &str) -> Result<Credentials, TokenError> {
        let token = match &self.token_file {
            Some(file) => Some(Token::read(file)?),
            None => Token::from_env(TOKEN)?.map_or_else(|| Token::from_env(also), |token| Ok(Some(token)))?,
        };
        Ok(Credentials { files: self, token })
    }

    /// The same as flags, for a process that is started in our stead. Paths alone; what the environment holds is
    /// inherited.
    pub fn to_flags(&self) -> Vec<std::ffi::OsString> {
        let Self { tls_ca, tls_cert, tls_key, token_file } = self;
        [("--tls-ca", tls_ca), ("--tls-cert", tls_cert), ("--tls-key", tls_key), ("--token-file", token_file)]
            .into_iter()
            .filter_map(|(flag, file)| Some([flag.into(), file.clone()?.into_os_string()]))
            .flatten()
            .collect()
    }
}

impl Credentials {
    /// `https://` of a coordinator where there is an authority to know it by, else `http://`; an address that
    /// names its scheme stays as it is.
    pub fn url(&self, address: &str) -> String {
        match (address.contains("://"), &self.files.tls_ca) {
            (true, _) => address.to_owned(),
            (false, Some(_)) => format!("https://{address}"),
            (false, None) => format!("http://{address}"),
        }
    }

    /// Sets an endpoint's side of TLS up, if its URL asks for it.
    pub fn apply(&self, endpoint: Endpoint) -> Result<Endpoint, CredentialsError> {
        if endpoint.uri().scheme_str() != Some("https") {
            return Ok(endpoint);
        }
        let read = |path: &PathBuf| {
            fs::read(path).map_err(|source| CredentialsError::Unreadable { path: path.clone(), source })
        };
        let Some(ca) = &self.files.tls_ca else {
            return Err(CredentialsError::NoAuthority { url: endpoint.uri().to_string() });
        };
        let mut tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(read(ca)?));
        if let (Some(certificate), Some(key)) = (&self.files.tls_cert, &self.files.tls_key) {
            tls = tls.identity(Identity::from_pem(read(certificate)?, read(key)?));
        }
        Ok(endpoint.tls_config(tls)?)
    }

    pub fn link(&self, channel: Channel) -> Link {
        let bearer = self.token.as_ref().map(|token| {
            let mut value: MetadataValue<Ascii> =
                token.bearer().parse().expect("a token has printable characters alone");
            value.set_sensitive(true);
            value
        });
        InterceptedService::new(channel, Identified(bearer))
    }
}

/// The TLS library's word on why a connection failed, if it was TLS's doing. Another try would fail alike.
pub fn broken_trust(error: &tonic::transport::Error) -> Option<String> {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = cause {
        let inner = error.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
        let found = error
            .downcast_ref::<rustls::Error>()
            .or_else(|| inner.and_then(|inner| inner.downcast_ref::<rustls::Error>()));
        if let Some(found) = found {
            return Some(match found {
                rustls::Error::InvalidCertificate(_) => {
                    format!("the coordinator's certificate is not to be trusted: {found}")
                }
                other => other.to_string(),
            });
        }
        cause = error.source();
    }
    None
}

/// What a failed call says, down to its cause: the message of a broken connection alone says nothing.
pub fn fault(status: &Status) -> String {
    let mut reason = status.message().to_owned();
    let mut cause = status.source();
    while let Some(error) = cause {
        let text = error.to_string();
        if !reason.contains(&text) {
            reason = format!("{reason}: {text}");
        }
        cause = error.source();
    }
    reason
}
