//! One HTTP request through a forwarded port. The page listens on the pod's loopback alone, where nothing else
//! reaches it, and asks for no token.

use std::time::Duration;

use ::kube::api::Portforwarder;
use axum::{
    body::{Body, to_bytes},
    http::{Request, header},
};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use tokio::time;

/// For the whole answer.
const PATIENCE: Duration = Duration::from_secs(10);
/// Bytes. A status of a thousand workers has a tenth of it.
const LARGEST: usize = 4 << 20;

/// # Errors
/// Why not, as a part of a sentence.
pub(super) async fn get(mut forwarder: Portforwarder, port: u16, path: &str) -> Result<Vec<u8>, String> {
    let stream = forwarder.take_stream(port).expect("this port was asked for, and taken by nobody");
    let broken = forwarder.take_error(port).expect("this port was asked for, and taken by nobody");
    let answer = async {
        let (mut sender, connection) =
            http1::handshake(TokioIo::new(stream)).await.map_err(|error| error.to_string())?;
        let connection = tokio::spawn(connection);
        let request = Request::get(path)
            .header(header::HOST, "localhost")
            .body(Body::empty())
            .expect("a path of ours makes a request");
        let answer = sender.send_request(request).await.map_err(|error| error.to_string())?;
        let status = answer.status();
        let body = to_bytes(Body::new(answer.into_body()), LARGEST).await.map_err(|error| error.to_string());
        connection.abort();
        match status.as_u16() {
            200 => body,
            401 => Err("it asks for a token, as it listens on other addresses than loopback".to_owned()),
            code => Err(format!("it answers with {code}")),
        }
    };
    let answer = tokio::select! {
        // A port that is broken closes its stream, too, and knows better why.
        biased;
        Some(why) = broken => Err(why),
        answer = time::timeout(PATIENCE, answer) => answer.unwrap_or_else(|_| Err("no answer".to_owned())),
    };
    forwarder.abort();
    answer.map(Vec::from)
}
