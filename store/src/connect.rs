//! From an address to a client, with credentials from the environment.

use std::{env, sync::Arc, time::Duration};

use object_store::{
    BackoffConfig, ClientOptions, ObjectStore, RetryConfig, aws::AmazonS3Builder,
    azure::MicrosoftAzureBuilder, gcp::GoogleCloudStorageBuilder,
};
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
/// It begins at a tenth of a second.
const MAX_BACKOFF: Duration = Duration::from_secs(5);

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
    // The process's default; where another was installed before, that one serves as well.
    let _ = ring::default_provider().install_default();
    // The first is the time to an answer, which is also what the sending of a part may take.
    let (silence, retry) = match patience {
        Patience::Short => (Duration::from_secs(10), retries(4, Duration::from_secs(10))),
        Patience::Long => (Duration::from_secs(60), retries(10, Duration::from_secs(60))),
    };
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

fn retries(max_retries: usize, retry_timeout: Duration) -> RetryConfig {
    let backoff = BackoffConfig { max_backoff: MAX_BACKOFF, ..BackoffConfig::default() };
    RetryConfig { backoff, max_retries, retry_timeout }
}

/// Whether the environment names an endpoint of one's own without TLS.
fn speaks_plainly(provider: Provider, variables: &Variables) -> bool {
    let endpoints: &[&str] = match provider {
        Provider::S3 => &["AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"],
        Provider::Google => &["GOOGLE_BASE_URL"],
        Provider::Azure => &["AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT"],
    };
    let emulated = |name: &str| provider == Provider::Azure && name == "AZURE_STORAGE_USE_EMULATOR";
    let plain = |name: &str, value: &str| endpoints.contains(&name) && value.starts_with("http://");
    variables.iter().any(|(name, value)| emulated(name) || plain(name, value))
}
