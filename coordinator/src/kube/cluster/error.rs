//! Why a cluster did not do what it was asked, as a sentence that says what to do.

use std::error::Error;

use ::kube::core::Status;
use musher_proto::causes::causes;
use thiserror::Error;

#[derive(Debug, Error)]
pub enum ClusterError {
    #[error("the log of Pod {pod} broke off ({source}): ask for it again")]
    LogBroke { pod: String, source: std::io::Error },
    #[error(
        "no cluster is configured ({0}): name a file with --kubeconfig or KUBECONFIG, or put one at ~/.kube/config"
    )]
    NoConfig(String),
    #[error("the kubeconfig can't be used: {0}")]
    Config(String),
    #[error("the kubeconfig has no context \"{context}\"; it has {}", listed(known))]
    NoContext { context: String, known: Vec<String> },
    #[error("no API server answers at {server} ({cause}): is the cluster up, and the context the right one?")]
    Unreachable { server: String, cause: String },
    #[error(
        "the API server at {server} does not know who asks ({message}): log in again, or see the context's user"
    )]
    Unauthorized { server: String, message: String },
    #[error(
        "not allowed to {verb} {what} in the namespace {namespace}: ask for a role that may, or give another \
         --context or --namespace ({message})"
    )]
    Forbidden { verb: &'static str, what: String, namespace: String, message: String },
    #[error(
        "there is no namespace {namespace} at {server}: make it with `kubectl create namespace {namespace}`, or \
         give another one with --namespace"
    )]
    NoNamespace { namespace: String, server: String },
    #[error("there is no run \"{name}\" in the namespace {namespace}; there {}", there_are(known))]
    NoRun { name: String, namespace: String, known: Vec<String> },
    #[error("{what} is not there, in the namespace {namespace}")]
    Gone { what: String, namespace: String },
    #[error(
        "the API server does not know the kind of {what}: is what brings it (JobSet) installed in the cluster?"
    )]
    UnknownKind { what: String },
    #[error("others set fields of {what}, to other values: --force-conflicts takes them over ({message})")]
    Conflict { what: String, message: String },
    #[error(
        "{what} is there with other pods, which Kubernetes never changes: for another number of nodes use `musher \
         kube scale`; else `musher kube delete` ends the run, which saves first and keeps its claim, and the same \
         `apply` goes on with it"
    )]
    Immutable { what: String },
    #[error("the API server did not {verb} {what}: {message}")]
    Refused { verb: &'static str, what: String, message: String },
    #[error("the page of Pod {pod} can't be asked: {why}")]
    Pod { pod: String, why: String },
}

/// What was asked, of whom.
pub(super) struct Doing<'a> {
    pub verb: &'static str,
    pub what: &'a str,
    pub namespace: &'a str,
    pub server: &'a str,
}

impl Doing<'_> {
    pub fn failed(&self, error: ::kube::Error) -> ClusterError {
        match error {
            ::kube::Error::Api(status) => self.answered(&status),
            ::kube::Error::Service(_) | ::kube::Error::HyperError(_) => {
                ClusterError::Unreachable { server: self.server.to_owned(), cause: root_cause(&error) }
            }
            ::kube::Error::Auth(why) => {
                ClusterError::Unauthorized { server: self.server.to_owned(), message: causes(&why) }
            }
            other => self.refused(causes(&other)),
        }
    }

    fn answered(&self, status: &Status) -> ClusterError {
        let (what, message) = (self.what.to_owned(), status.message.trim().to_owned());
        let (namespace, server) = (self.namespace.to_owned(), self.server.to_owned());
        let kind = status.details.as_ref().map_or("", |details| details.kind.as_str());
        match status.code {
            401 => ClusterError::Unauthorized { server, message },
            403 => ClusterError::Forbidden { verb: self.verb, what, namespace, message },
            404 if kind == "namespaces" => ClusterError::NoNamespace { namespace, server },
            404 if status.reason == "NotFound" && !kind.is_empty() => ClusterError::Gone { what, namespace },
            404 => ClusterError::UnknownKind { what },
            409 if self.verb == "apply" => ClusterError::Conflict { what, message },
            422 if message.contains("field is immutable") => ClusterError::Immutable { what },
            _ => self.refused(message),
        }
    }

    fn refused(&self, message: String) -> ClusterError {
        ClusterError::Refused { verb: self.verb, what: self.what.to_owned(), message }
    }
}

fn root_cause(error: &(dyn Error + 'static)) -> String {
    let mut deepest = error;
    while let Some(cause) = deepest.source() {
        deepest = cause;
    }
    deepest.to_string()
}

fn listed(names: &[String]) -> String {
    match names {
        [] => "none".into(),
        names => names.join(", "),
    }
}

fn there_are(runs: &[String]) -> String {
    match runs {
        [] => "is none at all".into(),
        [one] => format!("is {one}"),
        runs => format!("are {}", runs.join(", ")),
    }
}
