//! Prices over gRPC: unary, server streaming, and streaming both ways.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use futures_util::{Stream, StreamExt};
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status, Streaming};

use super::knobs::Knobs;
use super::proto::pricing_server::{Pricing as Service, PricingServer};
use super::proto::{PriceReply, PriceRequest, WatchRequest};
use super::{Common, terminated};

/// Replies a watch may ask for.
const MAX_WATCH: u32 = 10_000;

#[derive(Debug, Clone, Args)]
pub struct Pricing {
    #[command(flatten)]
    pub common: Common,
}

#[derive(Debug, Clone)]
struct Prices {
    name: Arc<str>,
    knobs: Arc<Knobs>,
}

impl Prices {
    fn reply(&self, item: u32) -> PriceReply {
        PriceReply {
            item,
            amount: price(item),
            served_by: self.name.to_string(),
        }
    }

    async fn misbehave(&self) -> Result<(), Status> {
        match self.knobs.misbehave().await {
            None => Ok(()),
            Some(503) => Err(Status::unavailable(format!("{} is unwell", self.name))),
            Some(_) => Err(Status::internal(format!("{} is unwell", self.name))),
        }
    }
}

/// Cents; the same for the same item everywhere.
pub fn price(item: u32) -> u64 {
    499 + u64::from(item % 97) * 100
}

type Replies = Pin<Box<dyn Stream<Item = Result<PriceReply, Status>> + Send>>;

#[tonic::async_trait]
impl Service for Prices {
    async fn price(&self, request: Request<PriceRequest>) -> Result<Response<PriceReply>, Status> {
        self.misbehave().await?;
        Ok(Response::new(self.reply(request.into_inner().item)))
    }

    type WatchStream = Replies;

    async fn watch(&self, request: Request<WatchRequest>) -> Result<Response<Replies>, Status> {
        self.misbehave().await?;
        let WatchRequest {
            item,
            count,
            interval_ms,
        } = request.into_inner();
        if count > MAX_WATCH {
            return Err(Status::invalid_argument(format!(
                "at most {MAX_WATCH} replies can be asked for"
            )));
        }
        let this = self.clone();
        let interval = Duration::from_millis(interval_ms.into());
        let replies = futures_util::stream::iter(0..count).then(move |n| {
            let this = this.clone();
            async move {
                if n > 0 {
                    tokio::time::sleep(interval).await;
                }
                Ok(this.reply(item))
            }
        });
        Ok(Response::new(Box::pin(replies)))
    }

    type HaggleStream = Replies;

    async fn haggle(
        &self,
        request: Request<Streaming<PriceRequest>>,
    ) -> Result<Response<Replies>, Status> {
        self.misbehave().await?;
        let this = self.clone();
        let replies = request
            .into_inner()
            .map(move |asked| asked.map(|asked| this.reply(asked.item)));
        Ok(Response::new(Box::pin(replies)))
    }
}

pub async fn run(args: Pricing) -> anyhow::Result<()> {
    let listener = TcpListener::bind(args.common.listen).await?;
    let knobs = Arc::new(Knobs::default());
    if let Some(path) = &args.common.control {
        knobs.listen(path)?;
    }
    serve(listener, args.common.name, knobs, terminated()).await
}

/// Serves on `listener` until `stop` ends.
pub async fn serve(
    listener: TcpListener,
    name: String,
    knobs: Arc<Knobs>,
    stop: impl Future<Output = ()>,
) -> anyhow::Result<()> {
    let prices = Prices {
        name: name.into(),
        knobs,
    };
    tonic::transport::Server::builder()
        .tcp_nodelay(true)
        .add_service(PricingServer::new(prices))
        .serve_with_incoming_shutdown(TcpListenerStream::new(listener), stop)
        .await?;
    Ok(())
}
