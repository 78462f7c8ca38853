//! A scripted Kubernetes apiserver: lists, watches and writes over HTTP, with what goes wrong at will.
#![allow(dead_code, clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard};

use bytes::Bytes;
use futures_util::StreamExt;
use http::{Request, Response};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::UnboundedReceiverStream;

/// Namespace and name.
type Key = (String, String);

#[derive(Default)]
struct State {
    version: u64,
    /// By plural.
    objects: BTreeMap<String, BTreeMap<Key, Value>>,
    /// Version, plural and event of every change.
    events: Vec<(u64, String, Bytes)>,
    watchers: Vec<(String, mpsc::UnboundedSender<Bytes>)>,
    /// Watches from versions before this are Gone.
    compacted: u64,
    no_streams: bool,
    /// Plurals of CRDs that are not installed.
    missing: BTreeSet<String>,
    /// Plurals that may not be listed.
    forbidden: BTreeSet<String>,
    /// Answers of token reviews, by token.
    reviews: BTreeMap<String, Value>,
    /// Everything is answered 503.
    away: bool,
    /// Writes that will be answered with a conflict, by plural.
    conflicts: BTreeMap<String, usize>,
    /// Requests by plural and what was asked: "list", "watch" (from a version), "stream".
    asked: BTreeMap<(String, &'static str), usize>,
    wanted: BTreeSet<Access>,
    /// Told of every request and of every change.
    news: watch::Sender<()>,
}

/// What a request takes, in the words of RBAC.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Access {
    pub verb: &'static str,
    pub group: String,
    /// Its plural; of a subresource "httproutes/status".
    pub resource: String,
    /// Empty: of the whole cluster.
    pub namespace: String,
    /// Empty: of all, or of one that is only to be made.
    pub name: String,
}

impl Access {
    /// None for what is no object: `/version`.
    fn of(request: &Request<()>) -> Option<Self> {
        use http::Method;
        let path: Vec<&str> = request.uri().path().split('/').skip(1).collect();
        let (group, rest) = match path.as_slice() {
            ["api", _, rest @ ..] => ("", rest),
            ["apis", group, _, rest @ ..] => (*group, rest),
            _ => return None,
        };
        let (namespace, plural, more) = match rest {
            ["namespaces", namespace, plural, more @ ..] => (*namespace, *plural, more),
            [plural, more @ ..] => ("", *plural, more),
            [] => return None,
        };
        let query = request.uri().query().unwrap_or_default();
        // A list or a watch of one object is asked for by its name.
        let selected = query
            .split('&')
            .find_map(|pair| pair.strip_prefix("fieldSelector=metadata.name%3D"));
        let name = more.first().copied().or(selected).unwrap_or_default();
        let verb = match *request.method() {
            Method::POST => "create",
            Method::PUT => "update",
            Method::PATCH => "patch",
            Method::DELETE => "delete",
            _ if !more.is_empty() => "get",
            _ if query.contains("watch=true") => "watch",
            _ => "list",
        };
        Some(Self {
            verb,
            group: group.to_owned(),
            resource: match more.get(1) {
                Some(sub) => format!("{plural}/{sub}"),
                None => plural.to_owned(),
            },
            namespace: namespace.to_owned(),
            name: name.to_owned(),
        })
    }
}

/// Runs until it is dropped.
pub struct ApiServer {
    pub address: SocketAddr,
    state: Arc<Mutex<State>>,
    serving: tokio::task::JoinHandle<()>,
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

fn key(object: &Value) -> Key {
    let text = |field: &str| {
        let value = object["metadata"][field].as_str();
        value.unwrap_or_default().to_owned()
    };
    (text("namespace"), text("name"))
}

fn line(kind: &str, object: &Value) -> Bytes {
    let mut line = serde_json::to_vec(object).unwrap();
    // As the apiserver does: the type comes first.
    let mut event = format!("{{\"type\":\"{kind}\",\"object\":").into_bytes();
    event.append(&mut line);
    event.extend_from_slice(b"}\n");
    event.into()
}

fn status(code: u16, reason: &str, message: &str) -> Value {
    json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
        "code": code, "reason": reason, "message": message})
}

impl ApiServer {
    pub async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let state = Arc::new(Mutex::new(State {
            version: 100,
            ..State::default()
        }));
        let shared = state.clone();
        let serving = tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let _ = stream.set_nodelay(true);
                let state = shared.clone();
                tokio::spawn(async move {
                    let answer = service_fn(move |request: Request<Incoming>| {
                        let state = state.clone();
                        async move {
                            let (head, body) = request.into_parts();
                            let body = body.collect().await.unwrap().to_bytes();
                            let request = Request::from_parts(head, ());
                            Ok::<_, Infallible>(answer(&state, &request, &body))
                        }
                    });
                    let _ = hyper::server::conn::http1::Builder::new()
                        .serve_connection(TokioIo::new(stream), answer)
                        .await;
                });
            }
        });
        Self {
            address,
            state,
            serving,
        }
    }

    /// Has changed whenever something was asked or has become different here.
    pub fn news(&self) -> watch::Receiver<()> {
        self.state().news.subscribe()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// What a review of this token says.
    pub fn review(&self, token: &str, status: Value) {
        self.state().reviews.insert(token.to_owned(), status);
    }

    /// Everything is answered 503, or no longer.
    pub fn away(&self, away: bool) {
        self.state().away = away;
    }

    /// The next writes of these objects are answered with a conflict.
    pub fn conflict(&self, plural: &str, times: usize) {
        self.state().conflicts.insert(plural.to_owned(), times);
    }

    /// An object as it is now.
    pub fn get(&self, plural: &str, namespace: &str, name: &str) -> Option<Value> {
        let key = (namespace.to_owned(), name.to_owned());
        self.state().objects.get(plural)?.get(&key).cloned()
    }

    /// A client of it.
    pub fn client(&self) -> kube::Client {
        let uri = format!("http://{}", self.address).parse().unwrap();
        kube::Client::try_from(kube::Config::new(uri)).unwrap()
    }

    /// A kubeconfig for programs.
    pub fn kubeconfig(&self) -> String {
        json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "test",
            "clusters": [{"name": "test", "cluster": {"server": format!("http://{}", self.address)}}],
            "users": [{"name": "test", "user": {}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
        })
        .to_string()
    }

    /// Creates or replaces an object.
    pub fn put(&self, plural: &str, mut object: Value) {
        let mut state = self.state();
        state.version += 1;
        object["metadata"]["resourceVersion"] = state.version.to_string().into();
        let objects = state.objects.entry(plural.to_owned()).or_default();
        let event = match objects.insert(key(&object), object.clone()) {
            Some(_) => line("MODIFIED", &object),
            None => line("ADDED", &object),
        };
        state.tell(plural, event);
    }

    pub fn delete(&self, plural: &str, namespace: &str, name: &str) {
        let mut state = self.state();
        let key = (namespace.to_owned(), name.to_owned());
        let removed = state.objects.get_mut(plural).unwrap().remove(&key);
        let mut object = removed.unwrap();
        state.version += 1;
        object["metadata"]["resourceVersion"] = state.version.to_string().into();
        state.tell(plural, line("DELETED", &object));
    }

    /// Sends a line to those who watch, whatever it is.
    pub fn say(&self, plural: &str, text: &str) {
        let text = Bytes::copy_from_slice(text.as_bytes());
        self.state().send(plural, &text);
    }

    /// Ends every watch of a kind without a word.
    pub fn disconnect(&self, plural: &str) {
        self.state().watchers.retain(|(of, _)| of != plural);
    }

    /// Forgets what has been: who wants to go on from before has to list again.
    pub fn compact(&self) {
        let mut state = self.state();
        state.version += 1;
        state.compacted = state.version;
        state.events.clear();
    }

    /// Lists are not streamed, as by an older apiserver.
    pub fn no_streams(&self) {
        self.state().no_streams = true;
    }

    pub fn set_missing(&self, plural: &str, missing: bool) {
        let missing_now = &mut self.state().missing;
        if missing {
            missing_now.insert(plural.to_owned());
        } else {
            missing_now.remove(plural);
        }
    }

    pub fn set_forbidden(&self, plural: &str, forbidden: bool) {
        let forbidden_now = &mut self.state().forbidden;
        if forbidden {
            forbidden_now.insert(plural.to_owned());
        } else {
            forbidden_now.remove(plural);
        }
    }

    /// All that was asked for, once each.
    pub fn wanted(&self) -> BTreeSet<Access> {
        self.state().wanted.clone()
    }

    /// How often something was asked: "list", "watch" or "stream".
    pub fn asked(&self, plural: &str, what: &'static str) -> usize {
        let asked = &self.state().asked;
        asked
            .get(&(plural.to_owned(), what))
            .copied()
            .unwrap_or_default()
    }
}

impl State {
    fn tell(&mut self, plural: &str, event: Bytes) {
        let version = self.version;
        self.events
            .push((version, plural.to_owned(), event.clone()));
        self.send(plural, &event);
        self.news.send_replace(());
    }

    fn send(&mut self, plural: &str, event: &Bytes) {
        self.watchers
            .retain(|(of, to)| of != plural || to.send(event.clone()).is_ok());
    }
}

/// Writes, and reads of one object; none for a list or a watch.
fn one(state: &mut State, request: &Request<()>, body: &Bytes) -> Option<Answer> {
    use http::Method;
    if state.away {
        let text = "the apiserver is away";
        return Some(whole(503, &status(503, "ServiceUnavailable", text)));
    }
    let path: Vec<&str> = request.uri().path().split('/').skip(1).collect();
    let rest = match path.first() {
        Some(&"api") => path.get(2..)?,
        _ => path.get(3..)?,
    };
    let (namespace, plural, name) = match rest {
        ["namespaces", namespace, plural, more @ ..] => (*namespace, *plural, more.first()),
        [plural, more @ ..] => ("", *plural, more.first()),
        [] => return None,
    };
    let verb = match request.method().as_str() {
        "GET" => "get",
        "POST" => "create",
        "PUT" => "update",
        "PATCH" => "patch",
        _ => "delete",
    };
    if verb == "get" && name.is_none() {
        return None;
    }
    *state.asked.entry((plural.to_owned(), verb)).or_default() += 1;
    let given: Value = serde_json::from_slice(body).unwrap_or_default();
    if plural == "tokenreviews" {
        let token = given["spec"]["token"].as_str().unwrap_or_default();
        let mut review = given.clone();
        review["metadata"] = json!({});
        review["status"] = state.reviews.get(token).cloned().unwrap_or(json!({
            "user": {}, "error": "[invalid bearer token]",
        }));
        return Some(whole(201, &review));
    }
    let name = match name {
        Some(name) => (*name).to_owned(),
        None => given["metadata"]["name"].as_str().unwrap().to_owned(),
    };
    let key = (namespace.to_owned(), name.clone());
    let objects = state.objects.entry(plural.to_owned()).or_default();
    let there = objects.get(&key).cloned();
    let missing = || {
        let text = format!("{plural} \"{name}\" not found");
        whole(404, &status(404, "NotFound", &text))
    };
    let conflict = || {
        let text = format!("the object {name} has been modified");
        whole(409, &status(409, "Conflict", &text))
    };
    if verb != "get"
        && let Some(left) = state.conflicts.get_mut(plural)
        && *left > 0
    {
        *left -= 1;
        return Some(conflict());
    }
    let wants = &given["metadata"]["resourceVersion"];
    let stale = there
        .as_ref()
        .is_some_and(|there| !wants.is_null() && *wants != there["metadata"]["resourceVersion"]);
    let content = request.headers().get("content-type");
    let content = content.map_or("", |of| of.to_str().unwrap());
    let applied = content.contains("apply-patch");
    if verb == "patch" && applied && there.is_none() {
        // Applying what is not there makes it, and takes the right to.
        state
            .wanted
            .extend(Access::of(request).map(|access| Access {
                verb: "create",
                name: String::new(),
                ..access
            }));
    }
    let objects = state.objects.entry(plural.to_owned()).or_default();
    let mut object = match (verb, there) {
        ("get", there) => return Some(there.map_or_else(missing, |there| whole(200, &there))),
        ("create", Some(_)) => {
            let text = format!("{plural} \"{name}\" already exists");
            return Some(whole(409, &status(409, "AlreadyExists", &text)));
        }
        ("create", None) => given,
        ("patch", None) if applied => given,
        (_, None) => return Some(missing()),
        (_, Some(_)) if stale => return Some(conflict()),
        ("delete", Some(there)) => {
            objects.remove(&key);
            state.version += 1;
            state.tell(plural, line("DELETED", &there));
            return Some(whole(200, &json!({"kind": "Status", "status": "Success"})));
        }
        ("update", Some(_)) => given,
        (_, Some(mut there)) if content.contains("json-patch") => {
            let operations: json_patch::Patch = serde_json::from_value(given).unwrap();
            if json_patch::patch(&mut there, &operations).is_err() {
                let text = "the server rejected our request due to an error in our request";
                return Some(whole(422, &status(422, "Invalid", text)));
            }
            there
        }
        (_, Some(mut there)) => {
            merge(&mut there, &given);
            there
        }
    };
    let is_new = request.method() == Method::POST;
    state.version += 1;
    object["metadata"]["namespace"] = json!(namespace);
    object["metadata"]["resourceVersion"] = json!(state.version.to_string());
    let objects = state.objects.entry(plural.to_owned()).or_default();
    let before = objects.insert(key, object.clone());
    let kind = if before.is_some() {
        "MODIFIED"
    } else {
        "ADDED"
    };
    state.tell(plural, line(kind, &object));
    Some(whole(if is_new { 201 } else { 200 }, &object))
}

/// RFC 7396.
fn merge(into: &mut Value, patch: &Value) {
    let Value::Object(fields) = patch else {
        *into = patch.clone();
        return;
    };
    if !into.is_object() {
        *into = json!({});
    }
    let into = into.as_object_mut().unwrap();
    for (name, value) in fields {
        if value.is_null() {
            into.remove(name);
        } else {
            merge(into.entry(name.clone()).or_insert(Value::Null), value);
        }
    }
}

type Answer = Response<UnsyncBoxBody<Bytes, Infallible>>;

fn whole(code: u16, value: &Value) -> Answer {
    let body = Full::new(Bytes::from(serde_json::to_vec(value).unwrap()));
    Response::builder()
        .status(code)
        .header("content-type", "application/json")
        .body(body.boxed_unsync())
        .unwrap()
}

fn answer(state: &Mutex<State>, request: &Request<()>, body: &Bytes) -> Answer {
    let mut state = state.lock().unwrap();
    state.wanted.extend(Access::of(request));
    let answer = one(&mut state, request, body);
    let answer = answer.unwrap_or_else(|| all(&mut state, request));
    state.news.send_replace(());
    answer
}

/// Lists and watches.
fn all(state: &mut State, request: &Request<()>) -> Answer {
    let plural = request.uri().path().rsplit('/').next().unwrap().to_owned();
    let query: BTreeMap<String, String> = request
        .uri()
        .query()
        .unwrap_or_default()
        .split('&')
        .filter_map(|pair| pair.split_once('='))
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .collect();
    if state.missing.contains(&plural) {
        let text = "the server could not find the requested resource";
        return whole(404, &status(404, "NotFound", text));
    }
    if state.forbidden.contains(&plural) {
        let text = format!("{plural} is forbidden: User \"weft\" cannot list resource");
        return whole(403, &status(403, "Forbidden", &text));
    }
    if query.get("watch").is_none_or(|watch| watch != "true") {
        *state.asked.entry((plural.clone(), "list")).or_default() += 1;
        return list(state, &plural, &query);
    }
    let stream = query.get("sendInitialEvents").is_some_and(|v| v == "true");
    let what = if stream { "stream" } else { "watch" };
    *state.asked.entry((plural.clone(), what)).or_default() += 1;
    if stream && state.no_streams {
        let text = "sendInitialEvents: Forbidden: sendInitialEvents is forbidden for watch unless the WatchList feature gate is enabled";
        return whole(422, &status(422, "Invalid", text));
    }
    watch(state, plural, stream, &query)
}

fn list(state: &mut State, plural: &str, query: &BTreeMap<String, String>) -> Answer {
    let all: Vec<Value> = state
        .objects
        .get(plural)
        .into_iter()
        .flat_map(|objects| objects.values().cloned())
        .collect();
    let from: usize = query
        .get("continue")
        .map_or(0, |token| token.parse().unwrap());
    let limit: usize = query
        .get("limit")
        .map_or(all.len(), |limit| limit.parse().unwrap());
    let to = all.len().min(from + limit);
    let next = if to < all.len() {
        to.to_string()
    } else {
        String::new()
    };
    let version = state.version.to_string();
    whole(
        200,
        &json!({"kind": "List", "apiVersion": "v1",
            "metadata": {"resourceVersion": version, "continue": next},
            "items": all[from..to]}),
    )
}

fn watch(
    state: &mut State,
    plural: String,
    stream: bool,
    query: &BTreeMap<String, String>,
) -> Answer {
    let (sender, receiver) = mpsc::unbounded_channel();
    if stream {
        for object in state
            .objects
            .get(&plural)
            .into_iter()
            .flat_map(BTreeMap::values)
        {
            sender.send(line("ADDED", object)).unwrap();
        }
        let bookmark = json!({"kind": "Bookmark", "apiVersion": "v1", "metadata": {
            "resourceVersion": state.version.to_string(),
            "annotations": {"k8s.io/initial-events-end": "true"}}});
        sender.send(line("BOOKMARK", &bookmark)).unwrap();
    } else {
        let version: u64 = query["resourceVersion"].parse().unwrap();
        if version < state.compacted {
            let gone = status(410, "Expired", "too old resource version");
            sender.send(line("ERROR", &gone)).unwrap();
            return streaming(receiver);
        }
        for (_, _, event) in state
            .events
            .iter()
            .filter(|(at, of, _)| *at > version && *of == plural)
        {
            sender.send(event.clone()).unwrap();
        }
    }
    state.watchers.push((plural, sender));
    streaming(receiver)
}

fn streaming(receiver: mpsc::UnboundedReceiver<Bytes>) -> Answer {
    let frames = UnboundedReceiverStream::new(receiver).map(|bytes| Ok(Frame::data(bytes)));
    Response::builder()
        .header("content-type", "application/json")
        .body(StreamBody::new(frames).boxed_unsync())
        .unwrap()
}
