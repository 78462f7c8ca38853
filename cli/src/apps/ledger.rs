//! What was sold: a TCP protocol of lines in which the server speaks first, as MySQL, SMTP and FTP
//! do. A mesh that waits for the client's first bytes would wait for ever.
//!
//!     220 ledger-1 ready
//!                                 RECORD 3 1999
//!     250 1
//!                                 TOTAL
//!     250 1 1999
//!                                 QUIT
//!     221 bye

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use clap::Args;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};

use super::knobs::Knobs;
use super::{Common, terminated};

/// Longest line taken, bytes; the commands are shorter than fifty.
const MAX_LINE: u64 = 1024;

#[derive(Debug, Clone, Args)]
pub struct Ledger {
    #[command(flatten)]
    pub common: Common,
}

#[derive(Debug, Default)]
struct Book {
    entries: AtomicU64,
    cents: AtomicU64,
}

pub async fn run(args: Ledger) -> anyhow::Result<()> {
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
    let book = Arc::new(Book::default());
    let name: Arc<str> = name.into();
    let mut stop = std::pin::pin!(stop);
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => {
                    let (name, book, knobs) = (name.clone(), book.clone(), knobs.clone());
                    tokio::spawn(async move {
                        // A client that goes away in the middle is its own affair.
                        let _ = converse(stream, &name, &book, &knobs).await;
                    });
                }
                Err(e) => {
                    tracing::warn!("accept: {e}");
                    tokio::time::sleep(std::time::Duration::from_millis(50)).await;
                }
            },
            () = &mut stop => return Ok(()),
        }
    }
}

async fn converse(
    mut stream: TcpStream,
    name: &str,
    book: &Book,
    knobs: &Knobs,
) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    stream
        .write_all(format!("220 {name} ready\r\n").as_bytes())
        .await?;
    let (read, mut write) = stream.split();
    let mut read = BufReader::new(read);
    let mut line = String::new();
    loop {
        line.clear();
        let n = (&mut read).take(MAX_LINE).read_line(&mut line).await?;
        if n == 0 || !line.ends_with('\n') {
            return Ok(());
        }
        if knobs.misbehave().await.is_some() {
            return Ok(());
        }
        let words: Vec<&str> = line.split_whitespace().collect();
        let answer = match words[..] {
            ["RECORD", item, cents] => match (item.parse::<u32>(), cents.parse::<u64>()) {
                (Ok(_), Ok(cents)) => {
                    book.cents.fetch_add(cents, Ordering::Relaxed);
                    let entry = book.entries.fetch_add(1, Ordering::Relaxed) + 1;
                    format!("250 {entry}\r\n")
                }
                _ => "501 RECORD takes an item and an amount in cents\r\n".to_owned(),
            },
            ["TOTAL"] => format!(
                "250 {} {}\r\n",
                book.entries.load(Ordering::Relaxed),
                book.cents.load(Ordering::Relaxed)
            ),
            ["QUIT"] => {
                write.write_all(b"221 bye\r\n").await?;
                return Ok(());
            }
            _ => "500 the commands are RECORD, TOTAL and QUIT\r\n".to_owned(),
        };
        write.write_all(answer.as_bytes()).await?;
    }
}

/// A client's connection, past the greeting.
#[derive(Debug)]
pub struct Connection {
    stream: BufReader<TcpStream>,
    /// Commands sent so far.
    pub uses: u32,
}

impl Connection {
    /// Connects and waits for the server's greeting.
    pub async fn open(address: &str) -> anyhow::Result<Self> {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        let mut this = Self {
            stream: BufReader::new(stream),
            uses: 0,
        };
        let greeting = this.line().await?;
        anyhow::ensure!(
            greeting.starts_with("220 "),
            "the ledger greeted with '{greeting}'"
        );
        Ok(this)
    }

    /// Writes an entry down; answers its number.
    pub async fn record(&mut self, item: u32, cents: u64) -> anyhow::Result<u64> {
        self.uses += 1;
        self.stream
            .get_mut()
            .write_all(format!("RECORD {item} {cents}\r\n").as_bytes())
            .await?;
        let answer = self.line().await?;
        answer
            .strip_prefix("250 ")
            .and_then(|n| n.parse().ok())
            .ok_or_else(|| anyhow::anyhow!("the ledger answered '{answer}'"))
    }

    /// Whether the ledger has neither closed the connection nor said something unasked.
    pub fn is_open(&self) -> bool {
        let mut byte = [0];
        let read = self.stream.get_ref().try_read(&mut byte);
        matches!(read, Err(e) if e.kind() == std::io::ErrorKind::WouldBlock)
    }

    /// Takes leave, so that the server need not find a dead connection.
    pub async fn quit(mut self) {
        let _ = self.stream.get_mut().write_all(b"QUIT\r\n").await;
    }

    async fn line(&mut self) -> anyhow::Result<String> {
        let mut line = String::new();
        let n = (&mut self.stream)
            .take(MAX_LINE)
            .read_line(&mut line)
            .await?;
        anyhow::ensure!(n > 0, "the ledger closed the connection");
        Ok(line.trim_end().to_owned())
    }
}
