//! HTTP/2 and unary gRPC calls, on h2: so many streams at once on each connection.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Instant;

use anyhow::Context;
use bytes::Bytes;
use h2::client::SendRequest;
use http::{Method, Request, Version};
use tokio::net::TcpStream;

use super::{Edge, Kind, Load, Outcome, Window};

/// A gRPC message of ten bytes with its five-byte prefix.
pub const GRPC_MESSAGE: &[u8] = b"\0\0\0\0\x0a0123456789";

struct Shared {
    outcome: Outcome,
    open: bool,
    over: bool,
}

/// Runs the load; see [`super::run`].
pub fn run(load: &Load, edge: &mut dyn FnMut(Edge)) -> anyhow::Result<Outcome> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let local = tokio::task::LocalSet::new();
    local.block_on(&runtime, drive(load, edge))
}

async fn drive(load: &Load, edge: &mut dyn FnMut(Edge)) -> anyhow::Result<Outcome> {
    let shared = Rc::new(RefCell::new(Shared {
        outcome: Outcome::default(),
        open: false,
        over: false,
    }));
    for _ in 0..load.connections {
        let stream = TcpStream::connect(load.target)
            .await
            .with_context(|| format!("connecting to {}", load.target))?;
        stream.set_nodelay(true)?;
        let (sender, connection) = h2::client::Builder::new()
            .initial_window_size(1 << 20)
            .initial_connection_window_size(1 << 24)
            .handshake::<_, Bytes>(stream)
            .await?;
        tokio::task::spawn_local(async move {
            // A connection that fails shows in the requests on it.
            let _ = connection.await;
        });
        for _ in 0..load.streams {
            let (sender, shared) = (sender.clone(), shared.clone());
            let grpc = load.kind == Kind::Grpc;
            tokio::task::spawn_local(requests(sender, shared, grpc));
        }
    }
    let mut window = Window::new(load, edge);
    tokio::time::sleep(load.warmup).await;
    window.is_open(window.opens);
    shared.borrow_mut().open = true;
    tokio::time::sleep(load.window).await;
    let mut outcome = {
        let mut shared = shared.borrow_mut();
        shared.over = true;
        std::mem::take(&mut shared.outcome)
    };
    window.close(&mut outcome);
    Ok(outcome)
}

async fn requests(mut sender: SendRequest<Bytes>, shared: Rc<RefCell<Shared>>, grpc: bool) {
    loop {
        let start = Instant::now();
        let result;
        (sender, result) = match sender.ready().await {
            Ok(mut ready) => {
                let result = exchange(&mut ready, grpc).await;
                (ready, result)
            }
            Err(error) => {
                shared.borrow_mut().outcome.fail(error);
                return;
            }
        };
        let mut shared = shared.borrow_mut();
        if shared.over {
            return;
        }
        match result {
            Ok(()) if shared.open => shared.outcome.latencies.record(start.elapsed()),
            Ok(()) => {}
            Err(error) => shared.outcome.fail(format!("{error:#}")),
        }
    }
}

async fn exchange(sender: &mut SendRequest<Bytes>, grpc: bool) -> anyhow::Result<()> {
    let mut request = Request::builder()
        .version(Version::HTTP_2)
        .method(if grpc { Method::POST } else { Method::GET })
        .uri(if grpc {
            "http://server.bench/bench.Echo/Unary"
        } else {
            "http://server.bench/"
        })
        .header("user-agent", "weft-bench");
    if grpc {
        request = request
            .header("content-type", "application/grpc")
            .header("te", "trailers");
    }
    let (response, mut body) = sender.send_request(request.body(())?, !grpc)?;
    if grpc {
        body.send_data(Bytes::from_static(GRPC_MESSAGE), true)?;
    }
    let response = response.await?;
    anyhow::ensure!(
        response.status() == 200,
        "answered with {}",
        response.status()
    );
    let mut body = response.into_body();
    while let Some(data) = body.data().await {
        let data = data?;
        body.flow_control().release_capacity(data.len())?;
    }
    if grpc {
        let trailers = body
            .trailers()
            .await?
            .context("an answer without trailers")?;
        anyhow::ensure!(
            trailers.get("grpc-status").is_some_and(|s| s == "0"),
            "a grpc-status other than 0"
        );
    }
    Ok(())
}
