//! Who may look, where others than this machine's users could: those who know one of the run's tokens, as a bearer
//! or, in a browser, as a password.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use axum::{
    extract::{Request, State},
    http::{HeaderMap, StatusCode, header},
    middleware::Next,
    response::{IntoResponse, Response},
};
use base64::{Engine, prelude::BASE64_STANDARD};
use musher_security::{Known, TlsServer, Token};

use super::metrics::Metrics;
use crate::service::Refusal;

/// By default nothing is asked.
#[derive(Clone, Debug, Default)]
pub struct Guard {
    pub tls: Option<TlsServer>,
    /// Any of them will do; none: nobody is asked.
    pub viewers: Vec<Token>,
    /// Where those who are turned away are counted.
    pub metrics: Option<Arc<Metrics>>,
}

impl Guard {
    pub fn url(&self, address: SocketAddr) -> String {
        format!("{}://{address}", if self.tls.is_some() { "https" } else { "http" })
    }

    fn judge(&self, headers: &HeaderMap) -> Result<(), Refusal> {
        if self.viewers.is_empty() {
            return Ok(());
        }
        let shown = shown(headers).ok_or(Refusal::NoToken)?;
        if self.viewers.iter().any(|token| token.is(&shown)) { Ok(()) } else { Err(Refusal::WrongToken) }
    }
}

pub(super) async fn admit(State(guard): State<Arc<Guard>>, request: Request, next: Next) -> Response {
    let Err(refusal) = guard.judge(request.headers()) else {
        if let Some(known) = request.extensions().get::<Known>() {
            known.is_welcome();
        }
        return next.run(request).await;
    };
    if let Some(metrics) = &guard.metrics {
        metrics.turned_away(refusal.cause());
    }
    let challenge = [(header::WWW_AUTHENTICATE, r#"Basic realm="musher""#)];
    (StatusCode::UNAUTHORIZED, challenge, "this run asks for a token: show it as a bearer or a password\n")
        .into_response()
}

/// Keeps pages of elsewhere out, whose names were made to lead to this machine (DNS rebinding): a browser here is
/// asked for nothing where only this machine's users can be.
pub(super) async fn by_local_name(request: Request, next: Next) -> Response {
    let host = request.headers().get(header::HOST).map(|host| host.to_str().unwrap_or_default());
    if host.is_none_or(is_local) {
        return next.run(request).await;
    }
    let text = "this page is for this machine: ask for it as localhost or by an address; a proxy must, too\n";
    (StatusCode::MISDIRECTED_REQUEST, text).into_response()
}

/// `localhost` or an address, which no name server had a say in.
fn is_local(host: &str) -> bool {
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|digit| digit.is_ascii_digit()) => name,
        _ => host,
    };
    let bare = name.strip_prefix('[').and_then(|name| name.strip_suffix(']')).unwrap_or(name);
    name.eq_ignore_ascii_case("localhost") || bare.parse::<IpAddr>().is_ok()
}

fn shown(headers: &HeaderMap) -> Option<String> {
    let value = headers.get(header::AUTHORIZATION)?.to_str().ok()?;
    if let Some(token) = value.strip_prefix("Bearer ") {
        return Some(token.to_owned());
    }
    let pair = String::from_utf8(BASE64_STANDARD.decode(value.strip_prefix("Basic ")?).ok()?).ok()?;
    Some(pair.split_once(':')?.1.to_owned())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn only_names_that_nobody_gave_are_local() {
        for host in ["localhost", "LOCALHOST:7401", "127.0.0.1:7401", "[::1]:7401", "[::1]", "10.0.0.1"] {
            assert!(is_local(host), "{host}");
        }
        for host in
            ["", "evil.example", "evil.example:7401", "localhost.evil.example", "127.0.0.1.evil", "[x]:1"]
        {
            assert!(!is_local(host), "{host}");
        }
    }

    #[test]
    fn a_token_is_a_bearer_or_a_password() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "0123456789abcdef").unwrap();
        let guard = Guard { viewers: vec![Token::read(file.path()).unwrap()], ..Guard::default() };
        let judge = |value: &str| {
            guard.judge(&HeaderMap::from_iter([(header::AUTHORIZATION, value.parse().unwrap())]))
        };
        assert_eq!(judge("Bearer 0123456789abcdef"), Ok(()));
        let basic = BASE64_STANDARD.encode("anybody:0123456789abcdef");
        assert_eq!(judge(&format!("Basic {basic}")), Ok(()));
        assert_eq!(judge("Bearer 0123456789abcdeX"), Err(Refusal::WrongToken));
        assert_eq!(judge("Basic ///"), Err(Refusal::NoToken));
        assert_eq!(guard.judge(&HeaderMap::new()), Err(Refusal::NoToken));
        assert_eq!(Guard::default().judge(&HeaderMap::new()), Ok(()));
    }
}
