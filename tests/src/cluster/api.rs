//! The REST interface: what a request asks for, and the answers and refusals of an API server.

use std::{collections::HashMap, convert::Infallible, sync::Arc};

use axum::{
    body::{Body, Bytes, to_bytes},
    extract::Request,
    http::{HeaderMap, Method, StatusCode, Uri, header},
    response::{IntoResponse, Response},
};
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use super::{
    Shared, TOKEN,
    fields::{self, Path},
    forward,
    objects::{Key, Kind, Objects},
};

/// An answer that says no.
#[derive(Debug)]
pub(super) struct Refusal {
    code: StatusCode,
    body: String,
    is_status: bool,
}

impl Refusal {
    fn status(code: StatusCode, reason: &str, message: String, details: Value) -> Self {
        let body = json!({
            "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
            "message": message, "reason": reason, "details": details, "code": code.as_u16(),
        });
        Self { code, body: body.to_string(), is_status: true }
    }

    fn not_found(kind: Kind, name: &str) -> Self {
        let (group, _, plural, _) = kind;
        let qualified = if group.is_empty() { plural.to_owned() } else { format!("{plural}.{group}") };
        let details = json!({"name": name, "group": group, "kind": plural});
        Self::status(StatusCode::NOT_FOUND, "NotFound", format!("{qualified} \"{name}\" not found"), details)
    }

    fn bad(message: &str) -> Self {
        Self::status(StatusCode::BAD_REQUEST, "BadRequest", message.to_owned(), json!({}))
    }

    pub fn into_response(self) -> Response<Body> {
        let kind = if self.is_status { "application/json" } else { "text/plain" };
        (self.code, [(header::CONTENT_TYPE, kind)], self.body).into_response()
    }
}

/// What a path names.
struct Target {
    kind: Kind,
    namespace: String,
    name: Option<String>,
    part: Option<String>,
}

impl Target {
    fn key(&self) -> Option<Key> {
        Some((self.kind.2.to_owned(), self.namespace.clone(), self.name.clone()?))
    }
}

pub(super) async fn answer(shared: &Arc<Shared>, request: Request) -> Result<Response<Body>, Refusal> {
    let (mut parts, body) = request.into_parts();
    let upgrade = parts.extensions.remove::<hyper::upgrade::OnUpgrade>();
    let body = to_bytes(body, 4 << 20).await.map_err(|_| Refusal::bad("the body is too large"))?;
    let query: HashMap<String, String> = query(&parts.uri);
    let shown = parts.headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
    if shown != Some(&format!("Bearer {TOKEN}")) {
        return Err(Refusal::status(
            StatusCode::UNAUTHORIZED,
            "Unauthorized",
            "Unauthorized".into(),
            json!({}),
        ));
    }
    let target = {
        let mut objects = shared.objects();
        objects.control();
        let target = parse(&objects, parts.uri.path())?;
        admit(&mut objects, &parts.method, &target)?;
        target
    };
    match (parts.method.clone(), target.part.as_deref()) {
        (Method::GET, Some("log")) => log(shared, &target, &query),
        (Method::GET, Some("portforward")) => {
            let ports = query.get("ports").and_then(|port| port.parse().ok());
            let port: u16 = ports.ok_or_else(|| Refusal::bad("ports is missing"))?;
            let key = (target.name.clone().unwrap_or_default(), port);
            let to = shared.objects().ports.get(&key).copied();
            forward::begin(&parts.headers, upgrade, port, to).ok_or_else(|| Refusal::bad("no websocket"))
        }
        (_, Some(_)) => Err(Refusal::bad("there is no such part here")),
        (Method::GET, None) => read(&shared.objects(), &target, &query, &parts.headers),
        (Method::PATCH, None) => patch(&mut shared.objects(), &target, &query, &parts.headers, &body),
        (Method::DELETE, None) => delete(&mut shared.objects(), &target, &body),
        _ => Err(Refusal::bad("this method is not known here")),
    }
}

fn query(uri: &Uri) -> HashMap<String, String> {
    let plain = |text: &str| {
        let text = text.replace('+', " ");
        let mut bytes = Vec::new();
        let mut rest = text.as_bytes();
        while let Some((&first, after)) = rest.split_first() {
            let code = after.get(..2).and_then(|hex| std::str::from_utf8(hex).ok());
            match code.and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
                Some(byte) if first == b'%' => {
                    bytes.push(byte);
                    rest = &after[2..];
                }
                _ => {
                    bytes.push(first);
                    rest = after;
                }
            }
        }
        String::from_utf8_lossy(&bytes).into_owned()
    };
    let pairs = uri.query().unwrap_or_default().split('&').filter_map(|pair| pair.split_once('='));
    pairs.map(|(name, value)| (plain(name), plain(value))).collect()
}

fn parse(objects: &Objects, path: &str) -> Result<Target, Refusal> {
    let words: Vec<&str> = path.trim_matches('/').split('/').collect();
    let (group, version, rest) = match words[..] {
        ["api", version, ref rest @ ..] => ("", version, rest),
        ["apis", group, version, ref rest @ ..] => (group, version, rest),
        _ => ("", "", &[][..]),
    };
    let unknown =
        || Refusal { code: StatusCode::NOT_FOUND, body: "404 page not found\n".into(), is_status: false };
    let ["namespaces", namespace, plural, ref rest @ ..] = rest[..] else { return Err(unknown()) };
    let kind = objects.kind(group, version, plural).ok_or_else(unknown)?;
    let nth = |index: usize| rest.get(index).map(|&word| word.to_owned());
    Ok(Target { kind, namespace: namespace.to_owned(), name: nth(0), part: nth(1) })
}

fn admit(objects: &mut Objects, method: &Method, target: &Target) -> Result<(), Refusal> {
    let Target { kind: (group, _, plural, _), namespace, name, part } = target;
    let verb = match (method, name) {
        (&Method::GET, Some(_)) => "get",
        (&Method::GET, None) => "list",
        (&Method::PATCH, _) => "patch",
        (&Method::DELETE, _) => "delete",
        _ => "create",
    };
    let resource = match part {
        Some(part) => format!("{plural}/{part}"),
        None => (*plural).to_owned(),
    };
    if objects.forbidden.iter().any(|&(no, what)| no == verb && what == resource) {
        let name = name.as_deref().unwrap_or_default();
        let message = format!(
            "{plural} \"{name}\" is forbidden: User \"ann\" cannot {verb} resource \"{resource}\" in API group \
             \"{group}\" in the namespace \"{namespace}\""
        );
        return Err(Refusal::status(StatusCode::FORBIDDEN, "Forbidden", message, json!({"kind": plural})));
    }
    objects.requests.push(format!("{verb} {resource}/{}", name.as_deref().unwrap_or_default()));
    if verb != "get" && verb != "list" && !objects.namespaces.contains(namespace) {
        return Err(Refusal::not_found(("", "v1", "namespaces", "Namespace"), namespace));
    }
    Ok(())
}

fn read(
    objects: &Objects,
    target: &Target,
    query: &HashMap<String, String>,
    headers: &HeaderMap,
) -> Result<Response<Body>, Refusal> {
    let (group, version, plural, kind) = target.kind;
    let Some(key) = target.key() else {
        let selector = query.get("labelSelector").map_or("", String::as_str);
        let is_meant = |object: &&Value| {
            selector
                .split(',')
                .filter_map(|pair| pair.split_once('='))
                .all(|(name, value)| object["metadata"]["labels"][name] == *value)
        };
        let here = objects.all.iter().filter(|(key, _)| key.0 == plural && key.1 == target.namespace);
        let items: Vec<_> = here.map(|(_, object)| object).filter(is_meant).collect();
        let of = if group.is_empty() { version.to_owned() } else { format!("{group}/{version}") };
        return Ok(json_of(&json!({
            "apiVersion": of, "kind": format!("{kind}List"), "metadata": {"resourceVersion": "1"}, "items": items,
        })));
    };
    let object = objects.all.get(&key).ok_or_else(|| Refusal::not_found(target.kind, &key.2))?;
    let accept = headers.get(header::ACCEPT).and_then(|value| value.to_str().ok()).unwrap_or_default();
    Ok(match accept.contains("as=PartialObjectMetadata") {
        true => json_of(&json!({
            "apiVersion": "meta.k8s.io/v1", "kind": "PartialObjectMetadata", "metadata": object["metadata"],
        })),
        false => json_of(object),
    })
}

fn json_of(value: &Value) -> Response<Body> {
    ([(header::CONTENT_TYPE, "application/json")], value.to_string()).into_response()
}

fn patch(
    objects: &mut Objects,
    target: &Target,
    query: &HashMap<String, String>,
    headers: &HeaderMap,
    body: &Bytes,
) -> Result<Response<Body>, Refusal> {
    let key = target.key().ok_or_else(|| Refusal::bad("a patch needs a name"))?;
    let given: Value = serde_json::from_slice(body).map_err(|error| Refusal::bad(&error.to_string()))?;
    let former = objects.all.get(&key).cloned();
    let manager = query.get("fieldManager").cloned().unwrap_or_default();
    let mut owners = objects.owners.get(&key).cloned().unwrap_or_default();
    let kind = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let mut object = former.clone().unwrap_or_else(|| json!({}));
    match kind {
        "application/apply-patch+yaml" => {
            if manager.is_empty() {
                return Err(Refusal::bad("fieldManager is required for apply patch"));
            }
            if given["kind"] != target.kind.3 || given["metadata"]["name"] != *key.2 {
                return Err(Refusal::bad("the object is not the one that the path names"));
            }
            apply(
                &mut object,
                &mut owners,
                &given,
                &manager,
                query.get("force").is_some_and(|it| it == "true"),
            )?;
            object["apiVersion"] = given["apiVersion"].clone();
            object["kind"] = given["kind"].clone();
            object["metadata"]["name"] = key.2.as_str().into();
            object["metadata"]["namespace"] = key.1.as_str().into();
        }
        "application/merge-patch+json" => {
            if former.is_none() {
                return Err(Refusal::not_found(target.kind, &key.2));
            }
            fields::merge(&mut object, &given);
            let set: Vec<_> = fields::leaves(&given).into_keys().collect();
            for others in owners.values_mut() {
                others.retain(|path| !set.contains(path));
            }
            owners.entry(format!("{manager} update")).or_default().extend(set);
        }
        other => return Err(Refusal::bad(&format!("patches of the type {other} are not known here"))),
    }
    if let Some(former) = &former
        && target.kind.3 == "Job"
    {
        for field in ["template", "completions", "selector"] {
            if former["spec"][field] != object["spec"][field] {
                return Err(Refusal::status(
                    StatusCode::UNPROCESSABLE_ENTITY,
                    "Invalid",
                    format!(
                        "Job.batch \"{}\" is invalid: spec.{field}: Invalid value: field is immutable",
                        key.2
                    ),
                    json!({"name": key.2, "group": "batch", "kind": "Job"}),
                ));
            }
        }
    }
    if query.get("dryRun").is_some_and(|run| run == "All") {
        return Ok(json_of(&object));
    }
    objects.owners.insert(key.clone(), owners);
    Ok(json_of(&objects.put(key, object)))
}

/// Server-side apply: what a manager no longer says goes, unless others said it, too; what others said otherwise
/// is a conflict.
fn apply(
    object: &mut Value,
    owners: &mut fields::Owners,
    given: &Value,
    manager: &str,
    force: bool,
) -> Result<(), Refusal> {
    let me = format!("{manager} apply");
    let wanted = fields::leaves(given);
    let mut conflicts = Vec::new();
    for (other, theirs) in owners.iter().filter(|(other, _)| **other != me) {
        let differs = |path: &&Path| {
            wanted.get(*path).is_some_and(|value| fields::get(object, path).is_some_and(|is| is != value))
        };
        let name = other.split(' ').next().unwrap_or_default();
        conflicts
            .extend(theirs.iter().filter(differs).map(|path| format!("\"{name}\": .{}", path.join("."))));
    }
    if !conflicts.is_empty() && !force {
        let (count, list) = (conflicts.len(), conflicts.join(", "));
        return Err(Refusal::status(
            StatusCode::CONFLICT,
            "Conflict",
            format!("Apply failed with {count} conflict: conflict with {list}"),
            json!({}),
        ));
    }
    let former = owners.remove(&me).unwrap_or_default();
    for path in former.iter().filter(|path| !wanted.contains_key(*path)) {
        if !owners.values().any(|theirs| theirs.contains(path)) {
            fields::remove(object, path);
        }
    }
    for (path, value) in &wanted {
        if fields::get(object, path).is_some_and(|is| is != value) {
            for theirs in owners.values_mut() {
                theirs.remove(path);
            }
        }
        fields::set(object, path, value.clone());
    }
    owners.insert(me, wanted.into_keys().collect());
    Ok(())
}

fn delete(objects: &mut Objects, target: &Target, body: &Bytes) -> Result<Response<Body>, Refusal> {
    let key = target.key().ok_or_else(|| Refusal::bad("collections are not deleted here"))?;
    let object = objects.all.get(&key).cloned().ok_or_else(|| Refusal::not_found(target.kind, &key.2))?;
    let options: Value = serde_json::from_slice(body).unwrap_or_default();
    objects.delete(&key, options["propagationPolicy"].as_str().unwrap_or("Background"));
    Ok(json_of(&object))
}

fn log(
    shared: &Arc<Shared>,
    target: &Target,
    query: &HashMap<String, String>,
) -> Result<Response<Body>, Refusal> {
    let pod = target.name.clone().unwrap_or_default();
    let objects = shared.objects();
    let found = target.key().and_then(|key| objects.all.get(&key).cloned());
    let found = found.ok_or_else(|| Refusal::not_found(target.kind, &pod))?;
    if found["status"]["phase"] == "Pending" {
        return Err(Refusal::bad(&format!(
            "container \"worker\" in pod \"{pod}\" is waiting to start: ContainerCreating"
        )));
    }
    let there = objects.logs.get(&pod).map_or(0, |log| log.lines.len());
    let skipped = match query.get("tailLines").and_then(|lines| lines.parse::<usize>().ok()) {
        Some(lines) => there.saturating_sub(lines),
        None => 0,
    };
    drop(objects);
    let follow = query.get("follow").is_some_and(|follow| follow == "true");
    // A reader that is slow makes the log wait.
    let (send, pieces) = mpsc::channel(4);
    let (shared, mut read) = (shared.clone(), skipped);
    tokio::spawn(async move {
        let mut news = shared.news.subscribe();
        loop {
            let (text, is_over) = {
                let objects = shared.objects();
                let log = objects.logs.get(&pod);
                let fresh = log.map_or(&[][..], |log| &log.lines[read.min(log.lines.len())..]);
                read += fresh.len();
                let text: String = fresh.iter().map(|line| format!("{line}\n")).collect();
                (text, !follow || log.is_some_and(|log| log.is_over))
            };
            let is_read = send.send(Ok::<_, Infallible>(text)).await.is_ok();
            if is_over || !is_read || news.changed().await.is_err() {
                return;
            }
        }
    });
    Ok(Response::new(Body::from_stream(ReceiverStream::new(pieces))))
}
