//! A store's URL: which provider, which bucket, which prefix.

use crate::StoreError;

/// Whether `place` names an object store, and not a directory.
pub fn is_url(place: &str) -> bool {
    Provider::of(place).is_some()
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Provider {
    S3,
    Google,
    Azure,
}

impl Provider {
    const ALL: [Self; 3] = [Self::S3, Self::Google, Self::Azure];

    pub fn scheme(self) -> &'static str {
        match self {
            Self::S3 => "s3://",
            Self::Google => "gs://",
            Self::Azure => "az://",
        }
    }

    fn of(place: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|provider| place.starts_with(provider.scheme()))
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Address {
    pub provider: Provider,
    pub bucket: String,
    /// Without slashes at its ends; may be empty.
    prefix: String,
    url: String,
}

impl Address {
    pub fn parse(url: &str) -> Result<Self, StoreError> {
        let refused = |reason| StoreError::Url { url: without_secrets(url), reason };
        let provider =
            Provider::of(url).ok_or_else(|| refused("it begins with none of s3://, gs://, az://"))?;
        let rest = &url[provider.scheme().len()..];
        if rest.contains('@') {
            return Err(refused("credentials come from the environment, never from a URL"));
        }
        if rest.contains(['?', '#', '%', ' ', '\\']) {
            return Err(refused("a bucket and a prefix are all that it may have, in plain letters"));
        }
        let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
        let prefix = prefix.trim_end_matches('/');
        if bucket.is_empty() {
            return Err(refused("it names no bucket"));
        }
        if prefix.split('/').any(|part| matches!(part, "." | ".."))
            || prefix.contains("//")
            || prefix.starts_with('/')
        {
            return Err(refused("its prefix has an empty part, or one of dots"));
        }
        let url =
            format!("{}{bucket}{}{prefix}", provider.scheme(), if prefix.is_empty() { "" } else { "/" });
        Ok(Self { provider, bucket: bucket.into(), prefix: prefix.into(), url })
    }

    pub fn url(&self) -> &str {
        &self.url
    }

    pub fn url_of(&self, key: &str) -> String {
        if key.is_empty() { self.url.clone() } else { format!("{}/{key}", self.url) }
    }

    /// From the bucket's root.
    pub fn path_of(&self, key: &str) -> String {
        match (self.prefix.is_empty(), key.is_empty()) {
            (true, _) => key.into(),
            (false, true) => self.prefix.clone(),
            (false, false) => format!("{}/{key}", self.prefix),
        }
    }

    pub fn key_of(&self, path: &str) -> String {
        let key = path.strip_prefix(&self.prefix).unwrap_or(path);
        key.trim_start_matches('/').to_owned()
    }
}

/// What of a URL that is refused may be repeated.
fn without_secrets(url: &str) -> String {
    let Some((_, after)) = url.rsplit_once('@') else {
        return url.split('?').next().unwrap_or_default().into();
    };
    let scheme = url.split_once("://").map_or("", |(scheme, _)| scheme);
    format!("{scheme}://...@{}", after.split('?').next().unwrap_or_default())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_below_the_prefix() {
        let at = |url: &str| Address::parse(url).unwrap();
        assert_eq!(at("s3://b/runs/pets/").url(), "s3://b/runs/pets");
        assert_eq!(at("s3://b/runs/pets").path_of("a/b"), "runs/pets/a/b");
        assert_eq!(at("s3://b/runs/pets").key_of("runs/pets/a/b"), "a/b");
        assert_eq!(at("gs://b").path_of("a"), "a");
        assert_eq!(at("gs://b/").key_of("a/b"), "a/b");
        assert_eq!(at("az://b").path_of(""), "");
        assert_eq!(at("az://c/p").url_of("k"), "az://c/p/k");
    }

    #[test]
    fn what_is_no_plain_place_is_refused_without_repeating_a_secret() {
        for url in
            ["s3://", "gs:///x", "s3://b//x", "s3://b/../x", "s3://b/x?sig=hush", "ftp://b", "s3://b/a b"]
        {
            let said = Address::parse(url).unwrap_err().to_string();
            assert!(!said.contains("hush"), "{said}");
        }
        let said = Address::parse("s3://key:hush@bucket/x").unwrap_err().to_string();
        assert!(said.contains("from the environment") && said.contains("s3://...@bucket/x"), "{said}");
        assert!(!said.contains("hush"), "{said}");
        assert!(is_url("s3://b") && !is_url("/data") && !is_url("file:///data") && !is_url("s3:/b"));
    }
}
