//! Port-forwarding: a websocket whose even channels carry a port's bytes, and whose odd ones say what is wrong.
//! Each begins with a frame that names its port.

use std::net::SocketAddr;

use axum::{
    body::Body,
    http::{HeaderMap, StatusCode, header},
    response::{IntoResponse, Response},
};
use futures::{SinkExt, StreamExt};
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{Message, handshake::derive_accept_key, protocol::Role},
};

const DATA: u8 = 0;
const ERROR: u8 = 1;
const PROTOCOL: &str = "v4.channel.k8s.io";

/// Switches protocols, and forwards to what is at the port, if anything.
pub(super) fn begin(
    headers: &HeaderMap,
    upgrade: Option<OnUpgrade>,
    port: u16,
    to: Option<SocketAddr>,
) -> Option<Response<Body>> {
    let key = headers.get(header::SEC_WEBSOCKET_KEY)?;
    let offered = headers.get(header::SEC_WEBSOCKET_PROTOCOL)?.to_str().ok()?;
    if !offered.split(", ").any(|it| it == PROTOCOL) {
        return None;
    }
    let upgrade = upgrade?;
    tokio::spawn(async move {
        let Ok(upgraded) = upgrade.await else { return };
        let socket = WebSocketStream::from_raw_socket(TokioIo::new(upgraded), Role::Server, None).await;
        // An error means that the client is gone.
        let _ = forward(socket, port, to).await;
    });
    let accept = derive_accept_key(key.as_bytes());
    let headers = [
        (header::CONNECTION, "Upgrade"),
        (header::UPGRADE, "websocket"),
        (header::SEC_WEBSOCKET_ACCEPT, &accept),
        (header::SEC_WEBSOCKET_PROTOCOL, PROTOCOL),
    ];
    Some((StatusCode::SWITCHING_PROTOCOLS, headers).into_response())
}

async fn forward<S>(socket: WebSocketStream<S>, port: u16, to: Option<SocketAddr>) -> anyhow::Result<()>
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin,
{
    let (mut send, mut receive) = socket.split();
    let frame = |channel: u8, bytes: &[u8]| Message::binary([&[channel], bytes].concat());
    for channel in [DATA, ERROR] {
        send.send(frame(channel, &port.to_le_bytes())).await?;
    }
    let connected = match to {
        Some(address) => TcpStream::connect(address).await.map_err(|error| error.to_string()),
        None => Err("connection refused".to_owned()),
    };
    let stream = match connected {
        Ok(stream) => stream,
        Err(why) => {
            let said = format!("error forwarding port {port} to pod: {why}");
            send.send(frame(ERROR, said.as_bytes())).await?;
            // It is the client that hangs up.
            while receive.next().await.transpose()?.is_some() {}
            return Ok(());
        }
    };
    let (mut from_pod, mut to_pod) = stream.into_split();
    let mut buffer = vec![0; 16 << 10];
    loop {
        tokio::select! {
            read = from_pod.read(&mut buffer) => {
                let read = read?;
                if read == 0 {
                    send.close().await?;
                    return Ok(());
                }
                send.send(frame(DATA, &buffer[..read])).await?;
            }
            message = receive.next() => match message.transpose()? {
                Some(Message::Binary(bytes)) if bytes.first() == Some(&DATA) => to_pod.write_all(&bytes[1..]).await?,
                Some(Message::Close(_)) | None => return Ok(()),
                Some(_) => {}
            },
        }
    }
}
