//! What can go wrong with a store, each as a sentence that says what to do.

use std::error::Error as StdError;

use object_store::{
    Error,
    client::{HttpError, HttpErrorKind},
};

use crate::address::{Address, Provider};

/// Longest part of a server's own words that is repeated.
const WORDS: usize = 160;
/// What is done before anything is asked of the store; it fails for want of what the environment should have.
pub(crate) const CONNECT: &str = "use";
/// What object_store says before a response's status.
const STATUS: &str = "status code: ";

#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error(
        "\"{url}\" names no place in an object store: {reason}; write it as s3://BUCKET/PREFIX, gs:// or az://"
    )]
    Url { url: String, reason: &'static str },
    #[error(
        "cannot use {url}: {variable} holds no server's address; write it as https://HOST or http://HOST:PORT"
    )]
    Endpoint { url: String, variable: String },
    #[error("cannot {action} {url}: it cannot be reached ({cause}); check the network and {variables}")]
    Unreachable { action: &'static str, url: String, cause: String, variables: &'static str },
    #[error("cannot {action} {url}: there is no {kind} \"{bucket}\"; create it, or correct the URL")]
    NoBucket { action: &'static str, url: String, kind: &'static str, bucket: String },
    #[error(
        "cannot {action} {url}: the credentials are refused ({cause}); check {variables}, and what they allow"
    )]
    Denied { action: &'static str, url: String, cause: String, variables: &'static str },
    #[error("cannot {action} {url}: no usable credentials were found ({cause}); set {variables}")]
    NoCredentials { action: &'static str, url: String, cause: String, variables: &'static str },
    #[error("there is no {url}")]
    Absent { url: String },
    #[error("{url} is not what it was: another process has written it")]
    Condition { url: String },
    #[error("cannot {action} {url}: the server answers {cause}")]
    Answered { action: &'static str, url: String, status: u16, cause: String },
    #[error("cannot {action} {url}: {cause}")]
    Other { action: &'static str, url: String, cause: String },
}

impl StoreError {
    /// Whether it may be otherwise in a while, without anybody's doing.
    pub fn may_pass(&self) -> bool {
        match self {
            Self::Unreachable { .. } => true,
            Self::Answered { status, .. } => matches!(status, 408 | 429 | 500..),
            _ => false,
        }
    }
}

/// The sentence for `error`, which came of what was done with `key`.
pub(crate) fn tell(address: &Address, action: &'static str, key: &str, error: &Error) -> StoreError {
    let (url, cause) = (address.url_of(key), cause(error));
    match (error, status(error)) {
        // Before its status is looked at: what such a machine answers says nothing of the store.
        _ if action == CONNECT || asks_the_machine(error) => {
            StoreError::NoCredentials { action, url, cause, variables: credentials(address.provider) }
        }
        // In a bucket that is there, a list can be empty and a write makes what it needs.
        (Error::NotFound { .. }, _) if action == "read" && !says_no_bucket(error) => {
            StoreError::Absent { url }
        }
        (Error::NotFound { .. }, _) | (_, Some(404)) => no_bucket(address, action, url),
        _ if says_no_bucket(error) => no_bucket(address, action, url),
        _ if is_unmet(error) => StoreError::Condition { url },
        (_, Some(401 | 403)) => {
            StoreError::Denied { action, url, cause, variables: credentials(address.provider) }
        }
        _ if lacks_credentials(error) => {
            StoreError::NoCredentials { action, url, cause, variables: credentials(address.provider) }
        }
        _ if is_unreachable(error) => {
            StoreError::Unreachable { action, url, cause, variables: endpoint(address.provider) }
        }
        (_, Some(status)) => StoreError::Answered { action, url, status, cause },
        (_, None) => StoreError::Other { action, url, cause },
    }
}

fn no_bucket(address: &Address, action: &'static str, url: String) -> StoreError {
    let kind = match address.provider {
        Provider::S3 | Provider::Google => "bucket",
        Provider::Azure => "container",
    };
    StoreError::NoBucket { action, url, kind, bucket: address.bucket.clone() }
}

pub(crate) fn is_absent(error: &Error) -> bool {
    matches!(error, Error::NotFound { .. }) && !says_no_bucket(error)
}

/// Whether the condition of a write did not hold.
pub(crate) fn is_unmet(error: &Error) -> bool {
    matches!(error, Error::AlreadyExists { .. } | Error::Precondition { .. } | Error::NotModified { .. })
}

/// Whether the server may have done what was asked, though it was not heard to say so.
pub(crate) fn may_have_taken_effect(error: &Error) -> bool {
    matches!(error, Error::Generic { .. } | Error::JoinError { .. })
}

/// The innermost reason in one line, without addresses that might be signed.
pub(crate) fn cause(error: &Error) -> String {
    let innermost = chain(error).last().map(ToString::to_string).unwrap_or_default();
    let innermost = innermost.split_once(STATUS).map_or(innermost.as_str(), |(_, said)| said).to_owned();
    match between(&innermost, "<Code>", "</Code>") {
        Some(code) => code.to_owned(),
        None => innermost.lines().next().unwrap_or_default().chars().take(WORDS).collect(),
    }
}

/// Of the response; the type that knows it is object_store's own, so it is read from what that says.
fn status(error: &Error) -> Option<u16> {
    let said = chain(error).last()?.to_string();
    said.split_once(STATUS)?.1.get(..3)?.parse().ok()
}

fn chain(error: &Error) -> impl Iterator<Item = &(dyn StdError + 'static)> {
    std::iter::successors(Some(error as &(dyn StdError + 'static)), |error| (*error).source())
}

fn is_unreachable(error: &Error) -> bool {
    let transport = chain(error).find_map(|error| error.downcast_ref::<HttpError>());
    transport.is_some_and(|error| !matches!(error.kind(), HttpErrorKind::Decode))
}

fn says_no_bucket(error: &Error) -> bool {
    let code = cause(error);
    // The last two: one of such a name can't be.
    ["NoSuchBucket", "ContainerNotFound", "InvalidBucketName", "InvalidResourceName"]
        .iter()
        .any(|known| code.contains(known))
}

/// Whether credentials were looked for where only machines of a cloud have them.
fn asks_the_machine(error: &Error) -> bool {
    let told = error.to_string();
    told.contains("://169.254.") || told.contains("://metadata.google.internal")
}

fn lacks_credentials(error: &Error) -> bool {
    error.to_string().contains("credential")
}

fn between<'a>(text: &'a str, start: &str, end: &str) -> Option<&'a str> {
    text.split_once(start)?.1.split_once(end).map(|(inside, _)| inside)
}

fn credentials(provider: Provider) -> &'static str {
    match provider {
        Provider::S3 => "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_REGION",
        Provider::Google => "GOOGLE_APPLICATION_CREDENTIALS",
        Provider::Azure => {
            "AZURE_STORAGE_ACCOUNT_NAME, and AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_TOKEN"
        }
    }
}

fn endpoint(provider: Provider) -> &'static str {
    match provider {
        Provider::S3 => "AWS_ENDPOINT_URL",
        Provider::Google => "GOOGLE_BASE_URL",
        Provider::Azure => "AZURE_STORAGE_ENDPOINT",
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn told(url: &str, action: &'static str, said: &str) -> String {
        let error = Error::Generic { store: "a store", source: said.into() };
        tell(&Address::parse(url).unwrap(), action, "", &error).to_string()
    }

    /// object_store's own words, seen of a machine of no cloud, of one without a role, and of Azurite.
    #[test]
    fn what_a_machine_answers_that_has_no_credentials_says_nothing_of_the_store() {
        for (address, status) in [
            ("http://169.254.169.254/metadata/identity/oauth2/token", "400 Bad Request"),
            ("http://metadata.google.internal/computeMetadata/v1/token", "404 Not Found"),
            ("http://169.254.169.254/latest/meta-data/iam", "403 Forbidden"),
        ] {
            let said = format!(
                "Error performing GET {address} in 1s - Server returned non-2xx status code: {status}: "
            );
            let told = told("gs://pets/a", "list", &said);
            assert!(
                told.contains("no usable credentials were found") && told.contains("set GOOGLE_"),
                "{told}"
            );
        }
    }

    /// A scheduler tries again what may pass, and nothing else.
    #[test]
    fn what_a_server_is_at_fault_for_may_pass() {
        let answers = |status: &str| {
            let source = format!("Server returned non-2xx status code: {status}: ").into();
            let error = Error::Generic { store: "a store", source };
            tell(&Address::parse("s3://pets/a").unwrap(), "list", "", &error).may_pass()
        };
        for status in ["500 Internal Server Error", "503 Slow Down", "429 Too Many Requests"] {
            assert!(answers(status), "{status}");
        }
        for status in ["400 Bad Request", "403 Forbidden", "404 Not Found"] {
            assert!(!answers(status), "{status}");
        }
    }

    #[test]
    fn a_container_is_named_as_its_provider_names_it() {
        let answered = |code: &str| {
            let status = "Server returned non-2xx status code: 400 Bad Request";
            format!("{status}: <Error><Code>{code}</Code></Error>")
        };
        let told_of = |url: &str, code: &str| told(url, "list", &answered(code));
        assert!(
            told_of("az://No_Where/a", "InvalidResourceName").contains("there is no container \"No_Where\"")
        );
        assert!(told_of("s3://No_Where/a", "InvalidBucketName").contains("there is no bucket \"No_Where\""));
        assert_eq!(told_of("az://pets/a", "Odd"), "cannot list az://pets/a: the server answers Odd");
    }
}
