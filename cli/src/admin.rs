//! Requests to the admin ports of proxies and control planes.

use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::{Method, Request, StatusCode, Uri};
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use tokio::net::TcpStream;

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

/// An admin port.
#[derive(Debug, Clone)]
pub struct Admin {
    /// "host:port".
    authority: String,
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
        Ok(Self {
            authority: authority.to_string(),
        })
    }

    /// The document at `path`.
    pub async fn json<T: DeserializeOwned>(&self, path: &str) -> Result<T, Error> {
        let body = self.request(Method::GET, path).await?;
        serde_json::from_slice(&body).map_err(|source| Error::Content {
            url: self.url(path),
            source,
        })
    }

    /// The text at `path`.
    pub async fn text(&self, path: &str) -> Result<String, Error> {
        let body = self.request(Method::GET, path).await?;
        Ok(String::from_utf8_lossy(&body).into_owned())
    }

    /// Orders something.
    pub async fn post(&self, path: &str) -> Result<String, Error> {
        let body = self.request(Method::POST, path).await?;
        Ok(String::from_utf8_lossy(&body).into_owned())
    }

    fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.authority)
    }

    async fn request(&self, method: Method, path: &str) -> Result<Bytes, Error> {
        let url = self.url(path);
        tokio::time::timeout(DEADLINE, self.exchange(method, path))
            .await
            .unwrap_or(Err(Error::Deadline(url)))
    }

    async fn exchange(&self, method: Method, path: &str) -> Result<Bytes, Error> {
        let url = self.url(path);
        let protocol = |e: &dyn std::fmt::Display| Error::Protocol {
            url: url.clone(),
            reason: e.to_string(),
        };
        let stream = TcpStream::connect(&self.authority)
            .await
            .map_err(|source| Error::Unreachable {
                url: url.clone(),
                source,
            })?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|e| protocol(&e))?;
        let connection = tokio::spawn(connection);
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", &self.authority)
            .header("connection", "close")
            .body(Full::<Bytes>::default())
            .map_err(|e| protocol(&e))?;
        let response = sender
            .send_request(request)
            .await
            .map_err(|e| protocol(&e))?;
        let status = response.status();
        let body = Limited::new(response.into_body(), MAX_BODY)
            .collect()
            .await
            .map_err(|e| protocol(&e))?
            .to_bytes();
        connection.abort();
        if !status.is_success() {
            let said = String::from_utf8_lossy(&body).trim().to_owned();
            return Err(Error::Status { url, status, said });
        }
        Ok(body)
    }
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
