//! What befalls a request between a client and the server.

use std::{
    collections::VecDeque,
    fs, io,
    path::PathBuf,
    sync::{Mutex, MutexGuard},
    time::Duration,
};

use bytes::Bytes;
use http_body_util::{BodyExt, Full, StreamBody, combinators::UnsyncBoxBody};
use hyper::{
    Response,
    body::{Frame, Incoming},
};
use s3s::service::S3Service;

/// One request's fate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// `GET`, `PUT` and so on.
    pub method: &'static str,
    /// What the path and query of the request have in them.
    pub target: String,
    pub effect: Effect,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// The server answers with this status, and does nothing.
    Status(u16),
    /// The request reaches the server so much later.
    Late(Duration),
    /// The connection is cut after so many bytes of the request's body; the server does nothing.
    CutRequest(usize),
    /// The connection is cut after so many bytes of the response's body.
    CutResponse(usize),
    /// The server does what was asked, and the connection is cut before it says so.
    LoseResponse,
    /// The server does what was asked, and says that it failed.
    DenyResponse(u16),
    /// The server overwrites the object, whatever the condition, as servers do that know of none.
    IgnoreCondition,
}

/// A request that came.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    pub method: String,
    /// Path and query.
    pub target: String,
}

type Body = UnsyncBoxBody<Bytes, Box<dyn std::error::Error + Send + Sync>>;

#[derive(Debug)]
pub(crate) struct Front {
    /// Of all buckets.
    files: PathBuf,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    ordered: VecDeque<Fault>,
    seen: Vec<Request>,
}

impl Front {
    pub fn new(files: PathBuf) -> Self {
        Self { files, state: Mutex::default() }
    }

    pub fn order(&self, fault: Fault) {
        self.lock().ordered.push_back(fault);
    }

    pub fn left(&self) -> usize {
        self.lock().ordered.len()
    }

    pub fn seen(&self) -> Vec<Request> {
        self.lock().seen.clone()
    }

    /// An error cuts the connection.
    pub async fn answer(
        &self,
        request: hyper::Request<Incoming>,
        service: &S3Service,
    ) -> io::Result<Response<Body>> {
        let effect = self.take_note(&request);
        let (head, mut body) = request.into_parts();
        let mut received = Vec::new();
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(io::Error::other)?;
            received.extend_from_slice(frame.data_ref().unwrap_or(&Bytes::new()));
            if let Some(Effect::CutRequest(after)) = effect
                && received.len() >= after
            {
                return Err(cut());
            }
        }
        match effect {
            Some(Effect::CutRequest(_)) => return Err(cut()),
            Some(Effect::Status(status)) => return Ok(refusal(status)),
            Some(Effect::Late(delay)) => tokio::time::sleep(delay).await,
            // Headers are signed, so the object goes instead of the condition that there be none.
            Some(Effect::IgnoreCondition) => {
                fs::remove_file(self.files.join(head.uri.path().trim_start_matches('/')))?;
            }
            _ => {}
        }
        let request = hyper::Request::from_parts(head, s3s::Body::from(Bytes::from(received)));
        let response = service.call(request).await.map_err(|error| io::Error::other(format!("{error:?}")))?;
        match effect {
            Some(Effect::LoseResponse) => Err(cut()),
            Some(Effect::DenyResponse(status)) => Ok(refusal(status)),
            Some(Effect::CutResponse(after)) => cut_short(response, after).await,
            _ => Ok(response.map(|body| body.map_err(Into::into).boxed_unsync())),
        }
    }

    fn take_note(&self, request: &hyper::Request<Incoming>) -> Option<Effect> {
        let method = request.method().as_str().to_owned();
        let target = request.uri().path_and_query().map_or(String::new(), ToString::to_string);
        let mut state = self.lock();
        let at =
            state.ordered.iter().position(|fault| fault.method == method && target.contains(&fault.target));
        state.seen.push(Request { method, target });
        at.and_then(|at| state.ordered.remove(at)).map(|fault| fault.effect)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no holder of this lock panics")
    }
}

fn cut() -> io::Error {
    io::ErrorKind::ConnectionAborted.into()
}

fn refusal(status: u16) -> Response<Body> {
    let mut response = Response::new(Full::from("as ordered").map_err(|never| match never {}).boxed_unsync());
    *response.status_mut() = status.try_into().expect("tests order statuses that there are");
    response
}

/// The response with all its headers, and with the first bytes of its body.
async fn cut_short(response: Response<s3s::Body>, after: usize) -> io::Result<Response<Body>> {
    let (head, body) = response.into_parts();
    let whole = body.collect().await.map_err(io::Error::other)?.to_bytes();
    let first = whole.slice(..after.min(whole.len()));
    let body = StreamBody::new(tokio_stream::iter([Ok(Frame::data(first)), Err(cut().into())]));
    Ok(Response::from_parts(head, body.boxed_unsync()))
}
