//! HTTP/2 and gRPC.

use std::rc::Rc;

use crate::http::flow::Flow;
use crate::transport::Stream;
use crate::worker::Worker;

#[derive(Debug, Default)]
pub struct Pool {}

pub async fn serve(worker: Rc<Worker>, stream: Stream, flow: Rc<Flow>) {
    let _ = (worker, flow);
    stream.io.abort();
}
