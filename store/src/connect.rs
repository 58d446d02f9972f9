//! From an address to a client, with credentials from the environment.

use std::{env, sync::Arc, time::Duration};

use object_store::{
    BackoffConfig, ClientOptions, ObjectStore, RetryConfig, aws::AmazonS3Builder,
    azure::MicrosoftAzureBuilder, gcp::GoogleCloudStorageBuilder,
};
use reqwest::Url;
use tokio_rustls::rustls::crypto::ring;

use crate::{
    StoreError,
    address::{Address, Provider},
    error,
};

/// How long a store that answers badly, or not at all, is asked again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Patience {
    /// Somebody waits for an answer: some seconds.
    Short,
    /// Work goes on meanwhile: a minute for each request.
    Long,
}

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const FIRST_BACKOFF: Duration = Duration::from_millis(100);
const MAX_BACKOFF: Duration = Duration::from_secs(5);
/// Each pause is drawn from the first up to so many times the one before. At 2, object_store's own, they shrink more
/// often than they grow, and a store in trouble is asked several times a second.
const GROWTH: f64 = 3.0;

/// Variables of the environment, with their values.
pub type Variables = Vec<(String, String)>;

/// This process's, those that are text.
pub fn environment() -> Variables {
    env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
        .collect()
}

pub(crate) fn connect(
    address: &Address,
    variables: &Variables,
    patience: Patience,
) -> Result<Arc<dyn ObjectStore>, StoreError> {
    if let Some((variable, _)) = endpoints(address.provider, variables).find(|(_, url)| !is_address(url)) {
        return Err(StoreError::Endpoint { url: address.url().into(), variable: variable.into() });
    }
    // The process's default; where another was installed before, that one serves as well.
    let _ = ring::default_provider().install_default();
    // The time to an answer, which is also what the sending of a part may take.
    let silence = time(patience);
    let retry = retries(patience);
    let options = ClientOptions::new()
        .with_connect_timeout(CONNECT_TIMEOUT)
        .with_timeout_disabled()
        .with_read_timeout(silence)
        .with_allow_http(speaks_plainly(address.provider, variables));
    let url = format!("{}{}", address.provider.scheme(), address.bucket);
    macro_rules! build {
        ($builder:ty, $prefix:literal) => {{
            // As the builder's own `from_env` does, which knows no environment but the process's.
            let named = variables.iter().filter(|(name, _)| name.starts_with($prefix));
            let known =
                named.filter_map(|(name, value)| Some((name.to_ascii_lowercase().parse().ok()?, value)));
            let builder =
                known.fold(<$builder>::new(), |builder, (key, value)| builder.with_config(key, value));
            let built = builder.with_url(url).with_client_options(options).with_retry(retry).build();
            built.map(|store| Arc::new(store) as Arc<dyn ObjectStore>)
        }};
    }
    let built = match address.provider {
        Provider::S3 => build!(AmazonS3Builder, "AWS_"),
        Provider::Google => build!(GoogleCloudStorageBuilder, "GOOGLE_"),
        Provider::Azure => build!(MicrosoftAzureBuilder, "AZURE_"),
    };
    built.map_err(|error| error::tell(address, error::CONNECT, "", &error))
}

fn time(patience: Patience) -> Duration {
    match patience {
        Patience::Short => Duration::from_secs(10),
        Patience::Long => Duration::from_secs(60),
    }
}

fn retries(patience: Patience) -> RetryConfig {
    let backoff = BackoffConfig { init_backoff: FIRST_BACKOFF, max_backoff: MAX_BACKOFF, base: GROWTH };
    let max_retries = match patience {
        Patience::Short => 4,
        // So many that the time decides: a server that refuses connections uses up a small count in seconds.
        Patience::Long => (time(patience).as_millis() / FIRST_BACKOFF.as_millis()) as usize,
    };
    RetryConfig { backoff, max_retries, retry_timeout: time(patience) }
}

/// Whether the environment names an endpoint of one's own without TLS.
fn speaks_plainly(provider: Provider, variables: &Variables) -> bool {
    let emulated = |name: &str| provider == Provider::Azure && name == "AZURE_STORAGE_USE_EMULATOR";
    variables.iter().any(|(name, _)| emulated(name))
        || endpoints(provider, variables).any(|(_, url)| url.starts_with("http://"))
}

/// What the environment names as the server's address, and in which variable.
fn endpoints(provider: Provider, variables: &Variables) -> impl Iterator<Item = (&str, &str)> {
    let known: &[&str] = match provider {
        Provider::S3 => &["AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"],
        Provider::Google => &["GOOGLE_BASE_URL"],
        Provider::Azure => &["AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT"],
    };
    let pairs = variables.iter().map(|(name, value)| (name.as_str(), value.as_str()));
    pairs.filter(move |(name, _)| known.contains(name))
}

/// Whether requests can be sent there; object_store panics where one can't be written.
fn is_address(endpoint: &str) -> bool {
    let web = Url::parse(endpoint).is_ok_and(|url| matches!(url.scheme(), "http" | "https"));
    web && endpoint.bytes().all(|byte| byte.is_ascii_graphic() && !b"\"<>\\^`{|}".contains(&byte))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn work_that_goes_on_meanwhile_is_patient_by_time_and_not_by_count() {
        let RetryConfig { backoff, max_retries, retry_timeout } = retries(Patience::Long);
        let shortest = backoff.init_backoff.as_secs_f64() * max_retries as f64;
        assert!(shortest >= retry_timeout.as_secs_f64(), "{shortest} s at the shortest pauses");
    }

    #[test]
    fn an_address_that_is_none_is_refused_by_the_name_of_its_variable() {
        let cases = [
            ("s3://pets/a", "AWS_ENDPOINT_URL"),
            ("gs://pets/a", "GOOGLE_BASE_URL"),
            ("az://pets/a", "AZURE_STORAGE_ENDPOINT"),
        ];
        for (url, variable) in cases {
            let open = |endpoint: &str| {
                let enough = [
                    ("AWS_REGION", "here"),
                    ("AZURE_STORAGE_ACCOUNT_NAME", "devstoreaccount1"),
                    (variable, endpoint),
                ];
                let variables = enough.map(|(name, value)| (name.to_owned(), value.to_owned())).to_vec();
                connect(&Address::parse(url).unwrap(), &variables, Patience::Short)
            };
            for endpoint in [
                "",
                "127.0.0.1:9000",
                "not an address",
                "http://",
                "ftp://host",
                "http://h:99999",
                "http://h/a b",
            ] {
                let said = open(endpoint).unwrap_err().to_string();
                assert!(
                    said.contains(&format!("{variable} holds no server's address")),
                    "{endpoint}: {said}"
                );
            }
            open("http://127.0.0.1:9000/devstoreaccount1").unwrap();
        }
    }
}
