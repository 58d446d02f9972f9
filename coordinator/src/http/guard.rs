//! Who may look, where others than this machine's users could: those who know one of the run's tokens, as a bearer
//! or, in a browser, as a password.

use std::{net::SocketAddr, sync::Arc};

use axum::{
    extract::{Request, State},
    http::{HeaderMap, StatusCode, header},
    middleware::Next,
    response::{IntoResponse, Response},
};
use base64::{Engine, prelude::BASE64_STANDARD};
use musher_security::{TlsServer, Token};

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
    let Err(refusal) = guard.judge(request.headers()) else { return next.run(request).await };
    if let Some(metrics) = &guard.metrics {
        metrics.turned_away(refusal.cause());
    }
    let challenge = [(header::WWW_AUTHENTICATE, r#"Basic realm="musher""#)];
    (StatusCode::UNAUTHORIZED, challenge, "this run asks for a token: show it as a bearer or a password\n")
        .into_response()
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
