//! The proxy's way to the control plane. Its namespace knows only the bridge, and the control
//! plane may well listen on this machine's loopback: connections to a port of the bridge's address
//! are passed on by this process. They are TLS from end to end.

use std::net::{Ipv4Addr, SocketAddr};

use anyhow::Context;
use tokio::net::{TcpListener, TcpStream};

/// Listens at `address` and passes every connection on to `to` ("host:port").
pub async fn listen(address: Ipv4Addr, to: String) -> anyhow::Result<SocketAddr> {
    let listener = TcpListener::bind((address, 0))
        .await
        .context("no port for the control plane can be had on the bridge")?;
    let local = listener.local_addr()?;
    tokio::spawn(async move {
        loop {
            match listener.accept().await {
                Ok((near, _)) => {
                    tokio::spawn(pass(near, to.clone()));
                }
                // Out of descriptors, mostly: the proxy tries again, and so do we.
                Err(_) => tokio::time::sleep(std::time::Duration::from_millis(100)).await,
            }
        }
    });
    Ok(local)
}

async fn pass(mut near: TcpStream, to: String) {
    match TcpStream::connect(&to).await {
        Ok(mut far) => {
            let _ = near.set_nodelay(true);
            let _ = far.set_nodelay(true);
            let _ = tokio::io::copy_bidirectional(&mut near, &mut far).await;
        }
        // The proxy sees the connection closed, says so in its log and tries again.
        Err(e) => tracing::debug!("the control plane at {to} cannot be reached: {e}"),
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    #[tokio::test]
    async fn bytes_pass_both_ways_and_ends_too() {
        let server = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let to = server.local_addr().unwrap().to_string();
        let at = listen(Ipv4Addr::LOCALHOST, to).await.unwrap();
        tokio::spawn(async move {
            let (mut stream, _) = server.accept().await.unwrap();
            let mut asked = String::new();
            stream.read_to_string(&mut asked).await.unwrap();
            stream
                .write_all(asked.to_uppercase().as_bytes())
                .await
                .unwrap();
        });
        let mut stream = TcpStream::connect(at).await.unwrap();
        stream.write_all(b"hello").await.unwrap();
        stream.shutdown().await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        assert_eq!(answer, "HELLO");
    }

    #[tokio::test]
    async fn an_absent_control_plane_closes_the_connection() {
        let gone = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let to = gone.local_addr().unwrap().to_string();
        drop(gone);
        let at = listen(Ipv4Addr::LOCALHOST, to).await.unwrap();
        let mut stream = TcpStream::connect(at).await.unwrap();
        let mut nothing = Vec::new();
        assert_eq!(stream.read_to_end(&mut nothing).await.unwrap(), 0);
    }
}
