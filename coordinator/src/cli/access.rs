//! From a job's `[server]` to the door: what is read at start, and what is refused rather than left open.

use std::{net::SocketAddr, path::Path, time::Duration};

use anyhow::anyhow;
use musher_proto::job::{JobConfig, Server};
use musher_security::{TlsFiles, TlsServer, Token, TokenError};
use tracing::warn;

use super::{Failure, files, usage};
use crate::{
    http,
    service::{Access, Door},
};

const JOIN_TOKEN: &str = "MUSHER_JOIN_TOKEN";
const OPERATOR_TOKEN: &str = "MUSHER_OPERATOR_TOKEN";
/// Keepalive makes a living peer speak once in a heartbeat time-out.
const SILENT_HEARTBEATS: u32 = 3;

/// What stands before gRPC.
pub(super) fn door(job: &JobConfig, insecure: bool) -> Result<Door, Failure> {
    let server = &job.server;
    let files = tls_files(server);
    let access = Access {
        certified: files.is_some(),
        join: token(&server.join_token_file, JOIN_TOKEN).map_err(usage)?,
        operator: token(&server.operator_token_file, OPERATOR_TOKEN).map_err(usage)?,
    };
    if access.operator.is_some() && access.join.is_none() && !access.certified {
        return Err(usage(anyhow!(
            "there is an operator's token, but anybody may join: set server.join_token_file or {JOIN_TOKEN} too"
        )));
    }
    if !server.grpc.ip().is_loopback() && access.is_open() {
        exposed("server.grpc", server.grpc, insecure)?;
    }
    let tls = files.map(TlsServer::mutual).transpose().map_err(usage)?;
    let connections = files::allow_for(job);
    let silence = Duration::from_secs_f64(job.cluster.heartbeat_timeout_s) * SILENT_HEARTBEATS;
    Ok(Door::new(tls, access, connections, silence))
}

/// What stands before the page and metrics. On loopback nothing does: who is there may read the run's files.
pub(super) fn guard(server: &Server, door: &Door, insecure: bool) -> Result<http::Guard, Failure> {
    if server.http.ip().is_loopback() {
        return Ok(http::Guard::default());
    }
    let Access { join, operator, .. } = &door.access;
    if join.is_none() && operator.is_none() {
        exposed("server.http", server.http, insecure)?;
    }
    let tls = tls_files(server).map(TlsServer::one_sided).transpose().map_err(usage)?;
    let viewers = [join, operator].into_iter().flatten().cloned().collect();
    Ok(http::Guard { tls, viewers, metrics: Some(door.metrics.clone()) })
}

/// Says what was let pass; the log is open by now.
pub(super) fn caution(job: &JobConfig, door: &Door, guard: &http::Guard) {
    files::caution(job, door.connections);
    let server = &job.server;
    if !server.grpc.ip().is_loopback() && door.tls.is_none() {
        match door.access.is_open() {
            true => {
                warn!(address = %server.grpc, "anybody who reaches this coordinator can join, stop it and take its weights")
            }
            false => warn!(
                "tokens and weights travel unencrypted: set server.tls_cert, server.tls_key and server.tls_client_ca"
            ),
        }
    }
    if !server.http.ip().is_loopback() && guard.viewers.is_empty() {
        warn!(address = %server.http, "anybody who reaches this page can read it");
    }
}

fn exposed(key: &str, address: SocketAddr, insecure: bool) -> Result<(), Failure> {
    if insecure {
        return Ok(());
    }
    Err(usage(anyhow!(
        "{key} = {address} can be reached from other machines, and nothing keeps strangers out: set \
         server.join_token_file (or {JOIN_TOKEN}), best with server.tls_cert, server.tls_key and \
         server.tls_client_ca (`musher certs` makes some to try); or give --insecure on a network that you trust"
    )))
}

fn tls_files(server: &Server) -> Option<TlsFiles> {
    (!server.tls_cert.is_empty()).then(|| TlsFiles {
        certificate: (&server.tls_cert).into(),
        key: (&server.tls_key).into(),
        ca: (&server.tls_client_ca).into(),
    })
}

fn token(file: &str, variable: &str) -> Result<Option<Token>, TokenError> {
    if file.is_empty() { Token::from_env(variable) } else { Token::read(Path::new(file)).map(Some) }
}
