//! A private authority for trials, tests and clusters without one of their own, and the certificates that it
//! issues.

use std::{fs, io, os::unix::fs::OpenOptionsExt, path::Path};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, SanType, date_time_ymd,
};
use sha2::{Digest, Sha256};
use thiserror::Error;

use crate::Role;

#[derive(Debug, Error)]
pub enum IssueError {
    #[error("no certificate could be made: {0}")]
    Made(#[from] rcgen::Error),
    #[error("cannot write {path}: {source}")]
    Write { path: String, source: io::Error },
    #[error("{0} is not a name that a certificate can carry")]
    Name(String),
}

/// What a certificate is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Leaf {
    /// Names and addresses that clients reach the coordinator at.
    Coordinator {
        names: Vec<String>,
    },
    Holder(Role),
}

/// Lives as long as the process: its key is not kept.
pub struct Authority {
    certificate: rcgen::Certificate,
    issuer: Issuer<'static, KeyPair>,
}

/// The files of one identity, as PEM.
#[derive(Clone, Debug)]
pub struct Issued {
    pub certificate: String,
    key: String,
}

impl Authority {
    pub fn new() -> Result<Self, IssueError> {
        let key = KeyPair::generate()?;
        // By a name of its own it is told apart from another, which clients then call unknown.
        let print: String =
            Sha256::digest(key.public_key_raw())[..4].iter().map(|b| format!("{b:02x}")).collect();
        let mut params = named(&format!("Musher test authority {print}"));
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let certificate = params.self_signed(&key)?;
        Ok(Self { certificate, issuer: Issuer::new(params, key) })
    }

    pub fn pem(&self) -> String {
        self.certificate.pem()
    }

    pub fn issue(&self, leaf: &Leaf, validity: Validity) -> Result<Issued, IssueError> {
        let mut params = match leaf {
            Leaf::Coordinator { names } => {
                let mut params = named("Musher coordinator");
                params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
                params.subject_alt_names =
                    names.iter().map(|name| alternative(name)).collect::<Result<_, _>>()?;
                params
            }
            Leaf::Holder(role) => {
                let mut params = named(&format!("Musher {role}"));
                params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
                let uri = role.uri().to_owned();
                params.subject_alt_names =
                    vec![SanType::URI(uri.clone().try_into().map_err(|_| IssueError::Name(uri))?)];
                params
            }
        };
        if validity == Validity::Expired {
            (params.not_before, params.not_after) = (date_time_ymd(2001, 1, 1), date_time_ymd(2002, 1, 1));
        }
        let key = KeyPair::generate()?;
        let certificate = params.signed_by(&key, &self.issuer)?;
        Ok(Issued { certificate: certificate.pem(), key: key.serialize_pem() })
    }
}

/// When a certificate holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Validity {
    Long,
    /// For tests of what refuses it.
    Expired,
}

impl Issued {
    /// Writes `NAME.pem` and `NAME-key.pem`, the key for its owner alone.
    pub fn write(&self, dir: &Path, name: &str) -> Result<(), IssueError> {
        write(&dir.join(format!("{name}.pem")), &self.certificate, 0o644)?;
        write(&dir.join(format!("{name}-key.pem")), &self.key, 0o600)
    }
}

/// Whole or not at all, over what is there: somebody may be about to read it.
pub fn write(path: &Path, text: &str, mode: u32) -> Result<(), IssueError> {
    let failed = |source| IssueError::Write { path: path.display().to_string(), source };
    let aside = path.with_extension("new");
    let _ = fs::remove_file(&aside);
    let mut file =
        fs::OpenOptions::new().write(true).create_new(true).mode(mode).open(&aside).map_err(failed)?;
    io::Write::write_all(&mut file, text.as_bytes()).map_err(failed)?;
    fs::rename(&aside, path).map_err(failed)
}

fn named(name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params
}

fn alternative(name: &str) -> Result<SanType, IssueError> {
    match name.parse() {
        Ok(address) => Ok(SanType::IpAddress(address)),
        Err(_) => {
            Ok(SanType::DnsName(name.to_owned().try_into().map_err(|_| IssueError::Name(name.to_owned()))?))
        }
    }
}
