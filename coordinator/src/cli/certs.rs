//! `musher certs`: an authority of one's own and what it issues, to try mutual TLS with.

use std::{fs, path::PathBuf};

use anyhow::{Context, anyhow};
use clap::Args;
use musher_security::{Authority, Leaf, Role, Validity, write};

use super::{Exit, Failure, usage};

#[derive(Debug, Args)]
pub struct Certs {
    /// Where to write them: a directory that is empty or does not exist
    dir: PathBuf,
    /// Names and addresses at which the coordinator is reached, besides localhost
    #[arg(long = "name", value_name = "HOST|IP")]
    names: Vec<String>,
}

impl Certs {
    pub(super) fn run(self) -> Result<Exit, Failure> {
        fs::create_dir_all(&self.dir)
            .with_context(|| format!("cannot make {}", self.dir.display()))
            .map_err(usage)?;
        if fs::read_dir(&self.dir)?.next().is_some() {
            return Err(usage(anyhow!("{} is not empty: name another directory", self.dir.display())));
        }
        let local = ["localhost", "127.0.0.1", "::1"].map(String::from);
        let coordinator = Leaf::Coordinator { names: local.into_iter().chain(self.names).collect() };
        let authority = Authority::new()?;
        write(&self.dir.join("ca.pem"), &authority.pem(), 0o644)?;
        for (name, leaf) in [
            ("coordinator", coordinator),
            ("worker", Leaf::Holder(Role::Worker)),
            ("operator", Leaf::Holder(Role::Operator)),
        ] {
            authority.issue(&leaf, Validity::Long).map_err(usage)?.write(&self.dir, name)?;
        }
        let dir = self.dir.display();
        println!(
            "{dir} holds an authority (its key is not kept) and three identities. In the job:\n\n\
             [server]\n\
             tls_cert = \"{dir}/coordinator.pem\"\n\
             tls_key = \"{dir}/coordinator-key.pem\"\n\
             tls_client_ca = \"{dir}/ca.pem\"\n\n\
             A worker:     musher-worker join HOST:7400 --tls-ca {dir}/ca.pem --tls-cert {dir}/worker.pem --tls-key {dir}/worker-key.pem\n\
             An operator:  musher status HOST:7400 --tls-ca {dir}/ca.pem --tls-cert {dir}/operator.pem --tls-key {dir}/operator-key.pem"
        );
        Ok(Exit::Finished)
    }
}
