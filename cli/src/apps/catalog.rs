//! `GET /items/N`: the list of items. Version v2 also describes them.

use std::sync::Arc;

use bytes::Bytes;
use clap::Args;
use http_body_util::Full;
use hyper::{Method, Request, Response, StatusCode};
use serde_json::json;
use tokio::net::TcpListener;

use super::knobs::Knobs;
use super::{Common, http as web, terminated};

const ITEMS: [(&str, &str); 6] = [
    ("warp yarn", "the threads that are stretched on the loom"),
    ("weft yarn", "the threads that are drawn through"),
    ("shuttle", "carries the weft from side to side"),
    ("reed", "keeps the warp apart and beats the weft in"),
    ("heddle", "lifts every other thread"),
    ("bobbin", "holds the yarn in the shuttle"),
];

#[derive(Debug, Clone, Args)]
pub struct Catalog {
    #[command(flatten)]
    pub common: Common,
    /// Version: v2 describes its items.
    #[arg(long, default_value = "v1")]
    pub version: String,
}

pub async fn run(args: Catalog) -> anyhow::Result<()> {
    let listener = TcpListener::bind(args.common.listen).await?;
    let knobs = Arc::new(Knobs::default());
    if let Some(path) = &args.common.control {
        knobs.listen(path)?;
    }
    serve(listener, args, knobs, terminated()).await
}

/// Serves on `listener` until `stop` ends.
pub async fn serve(
    listener: TcpListener,
    args: Catalog,
    knobs: Arc<Knobs>,
    stop: impl Future<Output = ()>,
) -> anyhow::Result<()> {
    let args = Arc::new(args);
    let handler = move |request: Request<_>| {
        let (args, knobs) = (args.clone(), knobs.clone());
        async move { handle(&args, &knobs, request.method(), request.uri().path()).await }
    };
    web::serve(listener, handler, stop).await
}

async fn handle(
    args: &Catalog,
    knobs: &Knobs,
    method: &Method,
    path: &str,
) -> Response<Full<Bytes>> {
    if let Some(status) = knobs.misbehave().await {
        let status = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        return web::text(status, format!("{} is unwell\n", args.common.name));
    }
    let Some(item) = path.strip_prefix("/items/") else {
        return web::text(StatusCode::NOT_FOUND, "there is only /items/N\n");
    };
    if method != Method::GET {
        return web::text(
            StatusCode::METHOD_NOT_ALLOWED,
            "items can only be looked at\n",
        );
    }
    let Some((id, (name, what))) = item
        .parse::<usize>()
        .ok()
        .map(|id| (id, ITEMS[id % ITEMS.len()]))
    else {
        return web::text(StatusCode::NOT_FOUND, "an item is a number\n");
    };
    let mut body = json!({
        "id": id,
        "name": name,
        "version": args.version,
        "servedBy": args.common.name,
    });
    if args.version != "v1" {
        body["description"] = what.into();
    }
    web::json(StatusCode::OK, &body)
}
