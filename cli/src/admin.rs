//! Requests to the admin ports of proxies and control planes.

use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::{Method, Request, Response, StatusCode, Uri};
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::sync::mpsc;

use crate::kube::forward::PodPort;

/// What an admin port may take to answer.
const DEADLINE: Duration = Duration::from_secs(5);
/// Bytes of an answer that are read.
const MAX_BODY: usize = 64 * 1024 * 1024;

/// Why an admin port gave no answer that can be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("'{0}' is not an address: expected http://HOST:PORT")]
    Url(String),
    #[error("nothing answers at {url}; is it running, and is that its admin port?")]
    Unreachable { url: String, source: std::io::Error },
    #[error("cannot reach {port} through the apiserver: {reason}")]
    Forward {
        port: String,
        reason: std::io::Error,
    },
    #[error("{0} did not answer within five seconds")]
    Deadline(String),
    #[error("{url} does not speak HTTP as expected: {reason}")]
    Protocol { url: String, reason: String },
    #[error("{url} answered {status}: {said}")]
    Status {
        url: String,
        status: StatusCode,
        said: String,
    },
    #[error("{url} answered something that is not what was expected")]
    Content {
        url: String,
        source: serde_json::Error,
    },
}

/// An admin port: at an address, or of a pod through the apiserver.
#[derive(Debug, Clone)]
pub enum Admin {
    /// "host:port".
    Tcp(String),
    Pod(PodPort),
}

/// An answer's body, and when the other end says it is.
#[derive(Debug)]
pub struct Answer {
    pub body: Bytes,
    /// The Date field (RFC 9110 section 6.6.1).
    pub date: Option<String>,
}

impl Admin {
    /// `http://host:port` or `host:port`.
    pub fn new(url: &str) -> Result<Self, Error> {
        let bad = || Error::Url(url.to_owned());
        let given = if url.contains("://") {
            url.to_owned()
        } else {
            format!("http://{url}")
        };
        let uri: Uri = given.parse().map_err(|_| bad())?;
        let authority = uri.authority().ok_or_else(bad)?;
        if uri.scheme_str() != Some("http") || authority.port_u16().is_none() {
            return Err(bad());
        }
        Ok(Self::Tcp(authority.to_string()))
    }

    /// A port of a pod.
    pub fn pod(client: kube::Client, namespace: &str, pod: &str, port: u16) -> Self {
        Self::Pod(PodPort::new(client, namespace, pod, port))
    }

    /// The document at `path`.
    pub async fn json<T: DeserializeOwned>(&self, path: &str) -> Result<T, Error> {
        let answer = self.get(path).await?;
        serde_json::from_slice(&answer.body).map_err(|source| Error::Content {
            url: self.url(path),
            source,
        })
    }

    /// The text at `path`.
    pub async fn text(&self, path: &str) -> Result<String, Error> {
        let answer = self.get(path).await?;
        Ok(String::from_utf8_lossy(&answer.body).into_owned())
    }

    /// Whatever is at `path`.
    pub async fn get(&self, path: &str) -> Result<Answer, Error> {
        self.request(Method::GET, path).await
    }

    /// Orders something.
    pub async fn post(&self, path: &str) -> Result<String, Error> {
        let answer = self.request(Method::POST, path).await?;
        Ok(String::from_utf8_lossy(&answer.body).into_owned())
    }

    /// Sends on the lines at `path` as they come, without those that are empty, until the other end
    /// or the receiver has had enough.
    pub async fn lines<T>(
        &self,
        path: &str,
        send: mpsc::Sender<T>,
        make: impl Fn(&str) -> T,
    ) -> Result<(), Error> {
        let url = self.url(path);
        let begun = tokio::time::timeout(DEADLINE, self.exchange(Method::GET, path));
        let response = begun.await.unwrap_or(Err(Error::Deadline(url.clone())))?;
        let mut body = response.into_body();
        let mut text = Vec::new();
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|e| Error::Protocol {
                url: url.clone(),
                reason: e.to_string(),
            })?;
            text.extend_from_slice(frame.data_ref().map_or(&[][..], |data| data));
            while let Some(end) = text.iter().position(|byte| *byte == b'\n') {
                let line = String::from_utf8_lossy(&text[..end]).into_owned();
                text.drain(..=end);
                if !line.is_empty() && send.send(make(&line)).await.is_err() {
                    return Ok(());
                }
            }
            if text.len() > MAX_BODY {
                return Err(Error::Protocol {
                    url,
                    reason: "a line without an end".to_owned(),
                });
            }
        }
        Ok(())
    }

    fn url(&self, path: &str) -> String {
        match self {
            Self::Tcp(authority) => format!("http://{authority}{path}"),
            Self::Pod(port) => format!("{port}{path}"),
        }
    }

    async fn request(&self, method: Method, path: &str) -> Result<Answer, Error> {
        let url = self.url(path);
        let asking = async {
            let response = self.exchange(method, path).await?;
            let date = response.headers().get("date");
            let date = date.and_then(|date| date.to_str().ok()).map(str::to_owned);
            let body = read(response.into_body()).await;
            let body = body.map_err(|reason| Error::Protocol {
                url: url.clone(),
                reason,
            })?;
            Ok(Answer { body, date })
        };
        tokio::time::timeout(DEADLINE, asking)
            .await
            .unwrap_or(Err(Error::Deadline(url.clone())))
    }

    /// Until the head of the response; one that is no success is an error.
    async fn exchange(&self, method: Method, path: &str) -> Result<Response<Incoming>, Error> {
        let url = self.url(path);
        let unreachable = |source| Error::Unreachable {
            url: url.clone(),
            source,
        };
        match self {
            Self::Tcp(authority) => {
                let stream = TcpStream::connect(authority).await.map_err(unreachable)?;
                speak(stream, authority, method, path, &url).await
            }
            Self::Pod(port) => {
                let stream = port.open().await.map_err(|reason| Error::Forward {
                    port: port.to_string(),
                    reason,
                })?;
                // hyper wants a host; the admin ports do not look at it.
                speak(stream, "localhost", method, path, &url).await
            }
        }
    }
}

/// Percent-encodes a query's value (RFC 3986 section 2.1).
pub fn encode(value: &str) -> String {
    let mut out = String::with_capacity(value.len());
    for byte in value.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' | b'/' | b':' => {
                out.push(char::from(byte));
            }
            _ => out.push_str(&format!("%{byte:02X}")),
        }
    }
    out
}

async fn speak(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    authority: &str,
    method: Method,
    path: &str,
    url: &str,
) -> Result<Response<Incoming>, Error> {
    let protocol = |e: &dyn std::fmt::Display| Error::Protocol {
        url: url.to_owned(),
        reason: e.to_string(),
    };
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .map_err(|e| protocol(&e))?;
    // Ends with the response's body: nothing follows it.
    tokio::spawn(connection);
    let request = Request::builder()
        .method(method)
        .uri(path)
        .header("host", authority)
        .header("connection", "close")
        .body(Full::<Bytes>::default())
        .map_err(|e| protocol(&e))?;
    let response = sender
        .send_request(request)
        .await
        .map_err(|e| protocol(&e))?;
    let status = response.status();
    if status.is_success() {
        return Ok(response);
    }
    let said = read(response.into_body()).await.unwrap_or_default();
    Err(Error::Status {
        url: url.to_owned(),
        status,
        said: String::from_utf8_lossy(&said).trim().to_owned(),
    })
}

async fn read(body: Incoming) -> Result<Bytes, String> {
    let body = Limited::new(body, MAX_BODY).collect().await;
    body.map(|body| body.to_bytes()).map_err(|e| e.to_string())
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    #[test]
    fn addresses() {
        for good in ["http://127.0.0.1:15014", "localhost:15014", "[::1]:15014"] {
            assert!(Admin::new(good).is_ok(), "{good}");
        }
        for bad in [
            "",
            "https://127.0.0.1:15014",
            "localhost",
            "http://",
            "a b:1",
        ] {
            assert!(Admin::new(bad).is_err(), "{bad}");
        }
    }

    #[tokio::test]
    async fn answers_and_their_absence() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move {
            for answer in [
                "HTTP/1.1 200 OK\r\ncontent-length: 7\r\n\r\n[1,2,3]",
                "HTTP/1.1 503 No\r\ncontent-length: 9\r\n\r\nnot ready",
                "220 smtp\r\n",
            ] {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut head = vec![0; 1024];
                let _ = stream.read(&mut head).await.unwrap();
                stream.write_all(answer.as_bytes()).await.unwrap();
            }
        });
        let admin = Admin::new(&address.to_string()).unwrap();
        assert_eq!(admin.json::<Vec<u8>>("/x").await.unwrap(), [1, 2, 3]);
        let error = admin.text("/readyz").await.unwrap_err().to_string();
        assert!(
            error.ends_with("/readyz answered 503 Service Unavailable: not ready"),
            "{error}"
        );
        assert!(matches!(admin.text("/").await, Err(Error::Protocol { .. })));
        assert!(matches!(
            admin.text("/").await,
            Err(Error::Unreachable { .. })
        ));
    }
}
