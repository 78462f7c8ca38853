//! What a visitor of the shop talks to:
//!
//! - `GET /page/N`: an item with its price (catalog over HTTP/1.1, pricing over gRPC);
//! - `GET /offers`: six prices (gRPC, streaming both ways) and one watched (server streaming);
//! - `POST /orders/N`: buys one (price over gRPC, written down in the ledger over TCP).
//!
//! When one of the others fails, the answer is 502 with a sentence that names it.

use std::sync::{Arc, Mutex};

use anyhow::{Context, bail};
use bytes::Bytes;
use clap::Args;
use futures_util::StreamExt;
use http_body_util::{BodyExt, Full, Limited};
use hyper::{HeaderMap, Method, Request, Response, StatusCode};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tonic::transport::{Channel, Endpoint};

use super::http::HttpClient;
use super::knobs::Knobs;
use super::ledger::Connection;
use super::proto::pricing_client::PricingClient;
use super::proto::{PriceRequest, WatchRequest};
use super::{Common, http as web, terminated};

/// Trace context, forwarded from the request that is being answered to those made for it (W3C
/// Trace Context section 3).
const TRACE_HEADERS: [&str; 2] = ["traceparent", "tracestate"];
/// Bytes of the catalog's answer that are read.
const MAX_ANSWER: usize = 64 * 1024;
/// Connections to the ledger kept for the next order.
const LEDGER_POOL: usize = 8;
/// Orders after which a connection to the ledger is given up, as connection pools of databases do
/// it, so that new connections are made now and then.
const LEDGER_USES: u32 = 100;

#[derive(Debug, Clone, Args)]
pub struct Front {
    #[command(flatten)]
    pub common: Common,
    /// Base URL of the catalog.
    #[arg(long, default_value = "http://catalog")]
    pub catalog: String,
    /// URL of the prices.
    #[arg(long, default_value = "http://pricing:9090")]
    pub pricing: String,
    /// host:port of the ledger.
    #[arg(long, default_value = "ledger:7000")]
    pub ledger: String,
}

struct Shop {
    args: Front,
    knobs: Arc<Knobs>,
    http: HttpClient,
    pricing: PricingClient<Channel>,
    ledger: Mutex<Vec<Connection>>,
}

pub async fn run(args: Front) -> anyhow::Result<()> {
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
    args: Front,
    knobs: Arc<Knobs>,
    stop: impl Future<Output = ()>,
) -> anyhow::Result<()> {
    let pricing = Endpoint::from_shared(args.pricing.clone())
        .with_context(|| format!("'{}' is not a URL", args.pricing))?
        .connect_timeout(std::time::Duration::from_secs(2))
        .connect_lazy();
    let shop = Arc::new(Shop {
        args,
        knobs,
        http: web::client(),
        pricing: PricingClient::new(pricing),
        ledger: Mutex::default(),
    });
    let handler = move |request: Request<_>| {
        let shop = shop.clone();
        async move {
            if let Some(status) = shop.knobs.misbehave().await {
                let status =
                    StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
                return web::text(status, format!("{} is unwell\n", shop.args.common.name));
            }
            shop.answer(request.method(), request.uri().path(), request.headers())
                .await
        }
    };
    web::serve(listener, handler, stop).await
}

impl Shop {
    async fn answer(
        &self,
        method: &Method,
        path: &str,
        headers: &HeaderMap,
    ) -> Response<Full<Bytes>> {
        let number = |prefix: &str| -> Option<u32> { path.strip_prefix(prefix)?.parse().ok() };
        let result = if path == "/healthz" {
            return web::text(StatusCode::OK, "well\n");
        } else if path == "/offers" {
            self.offers(headers).await
        } else if let Some(item) = number("/page/") {
            self.page(item, headers).await
        } else if let Some(item) = number("/orders/") {
            if method != Method::POST {
                return web::text(StatusCode::METHOD_NOT_ALLOWED, "an order is a POST\n");
            }
            self.order(item, headers).await
        } else {
            return web::text(
                StatusCode::NOT_FOUND,
                "there are /page/N, /offers and POST /orders/N\n",
            );
        };
        match result {
            Ok(body) => web::json(StatusCode::OK, &body),
            Err(e) => web::text(StatusCode::BAD_GATEWAY, format!("{e:#}\n")),
        }
    }

    async fn page(&self, item: u32, headers: &HeaderMap) -> anyhow::Result<Value> {
        let (found, price) =
            tokio::try_join!(self.catalog(item, headers), self.price(item, headers))?;
        let mut page = found;
        page["price"] = price;
        Ok(page)
    }

    async fn catalog(&self, item: u32, headers: &HeaderMap) -> anyhow::Result<Value> {
        let mut request = Request::get(format!("{}/items/{item}", self.args.catalog));
        for name in TRACE_HEADERS {
            if let Some(value) = headers.get(name) {
                request = request.header(name, value);
            }
        }
        let response = self
            .http
            .request(request.body(Full::default())?)
            .await
            .context("the catalog could not be asked")?;
        let status = response.status();
        let body = Limited::new(response.into_body(), MAX_ANSWER)
            .collect()
            .await
            .map_err(|e| anyhow::anyhow!("the catalog's answer broke off: {e}"))?
            .to_bytes();
        if !status.is_success() {
            let said = String::from_utf8_lossy(&body);
            bail!("the catalog answered {status}: {}", said.trim());
        }
        serde_json::from_slice(&body).context("the catalog's answer is not JSON")
    }

    async fn price(&self, item: u32, headers: &HeaderMap) -> anyhow::Result<Value> {
        let reply = self
            .pricing
            .clone()
            .price(traced(PriceRequest { item }, headers))
            .await
            .map_err(said_no)?
            .into_inner();
        Ok(json!({"cents": reply.amount, "servedBy": reply.served_by}))
    }

    async fn offers(&self, headers: &HeaderMap) -> anyhow::Result<Value> {
        let asked = futures_util::stream::iter((1..=6).map(|item| PriceRequest { item }));
        let mut haggled = self
            .pricing
            .clone()
            .haggle(traced(asked, headers))
            .await
            .map_err(said_no)?
            .into_inner();
        let mut offers = Vec::new();
        while let Some(reply) = haggled.next().await {
            offers.push(reply.map_err(said_no)?.amount);
        }
        let watch = WatchRequest {
            item: 1,
            count: 3,
            interval_ms: 1,
        };
        let mut watched = self
            .pricing
            .clone()
            .watch(traced(watch, headers))
            .await
            .map_err(said_no)?
            .into_inner();
        let mut seen = 0;
        while let Some(reply) = watched.next().await {
            reply.map_err(said_no)?;
            seen += 1;
        }
        Ok(json!({"offers": offers, "watched": seen}))
    }

    async fn order(&self, item: u32, headers: &HeaderMap) -> anyhow::Result<Value> {
        let price = self.price(item, headers).await?;
        let cents = price["cents"].as_u64().unwrap_or_default();
        let mut connection = match self.idle_ledger() {
            Some(connection) => connection,
            None => Connection::open(&self.args.ledger)
                .await
                .context("the ledger could not be opened")?,
        };
        let entry = connection
            .record(item, cents)
            .await
            .context("the order could not be written down")?;
        if connection.uses >= LEDGER_USES {
            connection.quit().await;
        } else if let Ok(mut pool) = self.ledger.lock()
            && pool.len() < LEDGER_POOL
        {
            pool.push(connection);
        }
        Ok(json!({"entry": entry, "price": price}))
    }

    /// A kept connection that the ledger has not closed meanwhile.
    fn idle_ledger(&self) -> Option<Connection> {
        let mut pool = self.ledger.lock().ok()?;
        while let Some(connection) = pool.pop() {
            if connection.is_open() {
                return Some(connection);
            }
        }
        None
    }
}

/// A gRPC request that carries the trace context of the request being answered.
fn traced<T>(message: T, headers: &HeaderMap) -> tonic::Request<T> {
    let mut request = tonic::Request::new(message);
    for name in TRACE_HEADERS {
        let value = headers.get(name).and_then(|v| v.to_str().ok());
        if let Some(Ok(value)) = value.map(str::parse) {
            request.metadata_mut().insert(name, value);
        }
    }
    request
}

fn said_no(status: tonic::Status) -> anyhow::Error {
    anyhow::anyhow!("pricing answered {:?}: {}", status.code(), status.message())
}
