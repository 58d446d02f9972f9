//! What a peer may do, and how its certificate says so.

use std::fmt;

use tokio_rustls::rustls::pki_types::CertificateDer;

/// An operator may do all that a worker may.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// Join the run, send and take its state.
    Worker,
    /// Look at the run, drain workers, stop it.
    Operator,
}

impl Role {
    /// The URI among a certificate's subject alternative names that gives this role.
    pub fn uri(self) -> &'static str {
        match self {
            Role::Worker => "musher:role:worker",
            Role::Operator => "musher:role:operator",
        }
    }

    /// By a certificate that was verified already. One that names no role is a worker's.
    pub fn of(certificate: &CertificateDer<'_>) -> Self {
        let Ok(certificate) = webpki::EndEntityCert::try_from(certificate) else { return Role::Worker };
        let is_operator = certificate.valid_uri_names().any(|uri| uri == Role::Operator.uri());
        if is_operator { Role::Operator } else { Role::Worker }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Role::Worker => "worker",
            Role::Operator => "operator",
        })
    }
}
