//! Each promise of the table in `tcp/mod.rs`, over one, two and four hops of real sockets: plain,
//! plain-TLS-plain, plain-TLS-plain-TLS-plain.

use std::future::pending;
use std::io::{self, ErrorKind};
use std::net::SocketAddr;
use std::os::fd::AsRawFd;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use proptest::prelude::*;
use rustls::{ClientConfig, ServerConfig};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::task::{LocalSet, spawn_local};

use super::*;
use crate::transport::testing::{listen, tcp_pair, tls_configs};
use crate::transport::{self, Io, accept_tls, connect_plain, connect_tls};

/// A chain of proxies, and the two applications at its ends.
struct Chain {
    client: TcpStream,
    server: TcpStream,
    ended: mpsc::UnboundedReceiver<(Ended, u64, u64)>,
    hops: usize,
}

impl Chain {
    async fn new(hops: usize) -> Self {
        let (app, mut next) = listen().await;
        let (tell, ended) = mpsc::unbounded_channel();
        let (client_config, server_config) = tls_configs();
        for hop in (0..hops).rev() {
            let (listener, addr) = listen().await;
            let tls_in = hop % 2 == 1;
            let tls_out = hops > 1 && hop % 2 == 0;
            spawn_local(one_hop(
                listener,
                next,
                tls_in.then(|| server_config.clone()),
                tls_out.then(|| client_config.clone()),
                tell.clone(),
            ));
            next = addr;
        }
        let client = TcpStream::connect(next).await.unwrap();
        let (server, _) = app.accept().await.unwrap();
        client.set_nodelay(true).unwrap();
        server.set_nodelay(true).unwrap();
        Self {
            client,
            server,
            ended,
            hops,
        }
    }

    /// How every hop ended; all say the same.
    async fn ended(&mut self) -> Ended {
        let mut all = Vec::new();
        for _ in 0..self.hops {
            let one = timeout(Duration::from_secs(5), self.ended.recv()).await;
            all.push(one.expect("a hop goes on").unwrap().0);
        }
        assert!(all.iter().all(|one| *one == all[0]), "{all:?}");
        all[0]
    }
}

async fn one_hop(
    listener: TcpListener,
    next: SocketAddr,
    tls_in: Option<Arc<ServerConfig>>,
    tls_out: Option<Arc<ClientConfig>>,
    tell: mpsc::UnboundedSender<(Ended, u64, u64)>,
) {
    let options = transport::Options::default();
    let mut client = Stream::from(listener.accept().await.unwrap().0);
    if let Some(config) = tls_in {
        client = accept_tls(client, config, transport::HANDSHAKE_TIMEOUT)
            .await
            .unwrap();
    }
    let server = match tls_out {
        None => connect_plain(next, &options).await,
        Some(config) => connect_tls(next, &options, config).await,
    };
    let counters = Counters::default();
    let ended = copy(
        client,
        server.unwrap(),
        &Options::default(),
        &counters,
        pending(),
    )
    .await;
    let _ = tell.send((ended, counters.to_server.get(), counters.to_client.get()));
}

/// Runs a case over one, two and four hops, and from either end (`swap`: the server does what
/// the case's first application does).
async fn each<F: AsyncFn(&mut TcpStream, &mut TcpStream)>(
    expected: Option<(Ended, Ended)>,
    case: F,
) {
    LocalSet::new()
        .run_until(async {
            spawn_local(super::urgent::run());
            for hops in [1, 2, 4] {
                for swap in [false, true] {
                    let mut chain = Chain::new(hops).await;
                    let (a, b) = if swap {
                        (&mut chain.server, &mut chain.client)
                    } else {
                        (&mut chain.client, &mut chain.server)
                    };
                    timeout(Duration::from_secs(30), case(a, b))
                        .await
                        .unwrap_or_else(|_| panic!("stuck: {hops} hops, swapped {swap}"));
                    if let Some((straight, swapped)) = expected {
                        let ended = chain.ended().await;
                        assert_eq!(ended, if swap { swapped } else { straight });
                    }
                }
            }
        })
        .await;
}

const FINISHED: Option<(Ended, Ended)> = Some((Ended::Finished, Ended::Finished));
const RESET: Option<(Ended, Ended)> = Some((Ended::ResetByClient, Ended::ResetByServer));

async fn read_all(stream: &mut TcpStream) -> (Vec<u8>, io::Result<usize>) {
    let mut data = Vec::new();
    let end = stream.read_to_end(&mut data).await;
    (data, end)
}

/// The stream is replaced by one that leads nowhere, and reset once its data is delivered.
async fn reset(stream: &mut TcpStream) {
    let (elsewhere, _) = tcp_pair().await;
    Io::Plain(std::mem::replace(stream, elsewhere))
        .abort_delivered()
        .await;
}

/// Bytes that are not the same anywhere.
fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed | 1;
    std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    })
    .flatten()
    .take(length)
    .collect()
}

#[tokio::test]
async fn a_half_close_leaves_the_other_direction_open() {
    each(FINISHED, async |a, b| {
        a.write_all(b"question").await.unwrap();
        a.shutdown().await.unwrap();
        let (data, end) = read_all(b).await;
        assert_eq!((&data[..], end.is_ok()), (&b"question"[..], true));
        // Longer than anybody waits to look for a reset.
        tokio::time::sleep(2 * HALF_CLOSED_WATCH).await;
        let answer = noise(1, 300_000);
        let sending = async {
            b.write_all(&answer).await.unwrap();
            b.shutdown().await.unwrap();
        };
        let ((), (data, end)) = tokio::join!(sending, read_all(a));
        assert!(data == answer && end.is_ok());
    })
    .await;
}

#[tokio::test]
async fn an_end_is_passed_at_once() {
    each(FINISHED, async |a, b| {
        let begin = Instant::now();
        a.shutdown().await.unwrap();
        assert!(read_all(b).await.0.is_empty());
        b.shutdown().await.unwrap();
        assert!(read_all(a).await.0.is_empty());
        assert!(begin.elapsed() < Duration::from_secs(1));
    })
    .await;
}

#[tokio::test]
async fn first_messages_of_few_bytes_pass_at_once() {
    each(None, async |a, b| {
        for n in 1..=4 {
            let begin = Instant::now();
            a.write_all(&[7; 4][..n]).await.unwrap();
            let mut read = [0; 4];
            b.read_exact(&mut read[..n]).await.unwrap();
            b.write_all(&read[..n]).await.unwrap();
            a.read_exact(&mut read[..n]).await.unwrap();
            assert_eq!(read[..n], [7; 4][..n]);
            assert!(begin.elapsed() < Duration::from_secs(1));
        }
    })
    .await;
}

#[tokio::test]
async fn data_followed_at_once_by_a_reset_is_delivered_then_reset() {
    for length in [0, 1, 1000, 100_000, 1 << 20] {
        let sent = noise(2, length);
        each(RESET, async |a, b| {
            let sending = async {
                a.write_all(&sent).await.unwrap();
                reset(a).await;
            };
            let ((), (data, end)) = tokio::join!(sending, read_all(b));
            assert!(data == sent, "{} of {length} bytes", data.len());
            assert_eq!(end.unwrap_err().kind(), ErrorKind::ConnectionReset);
        })
        .await;
    }
}

#[tokio::test]
async fn a_reset_with_data_under_way_the_other_way() {
    each(RESET, async |a, b| {
        a.write_all(b"last words").await.unwrap();
        // Enough to fill what is between them, so that the loss is noticed by writing.
        let filling = async {
            let some = noise(3, 64 << 10);
            while b.write_all(&some).await.is_ok() {}
        };
        let resetting = async {
            tokio::time::sleep(Duration::from_millis(50)).await;
            reset(a).await;
        };
        tokio::join!(filling, resetting);
        let (data, _) = read_all(b).await;
        assert_eq!(&data[..], b"last words");
    })
    .await;
}

#[tokio::test]
async fn a_reset_after_a_half_close() {
    each(RESET, async |a, b| {
        a.write_all(b"bye").await.unwrap();
        a.shutdown().await.unwrap();
        assert!(read_all(b).await.1.is_ok());
        reset(a).await;
        let (elsewhere, _) = tcp_pair().await;
        let b = Io::Plain(std::mem::replace(b, elsewhere));
        timeout(Duration::from_secs(3), b.hangup().unwrap())
            .await
            .expect("the reset arrives without anybody writing");
    })
    .await;
}

#[tokio::test]
async fn ten_mebibytes_each_way_at_once() {
    each(FINISHED, async |a, b| {
        async fn both(stream: &mut TcpStream, mine: &[u8]) -> Vec<u8> {
            let (mut read, mut write) = stream.split();
            let mut theirs = Vec::new();
            let sending = async {
                write.write_all(mine).await.unwrap();
                write.shutdown().await.unwrap();
            };
            let ((), end) = tokio::join!(sending, read.read_to_end(&mut theirs));
            end.unwrap();
            theirs
        }
        let (mine, theirs) = (noise(4, 10 << 20), noise(5, 10 << 20));
        let (from_b, from_a) = tokio::join!(both(a, &mine), both(b, &theirs));
        assert!(from_a == mine && from_b == theirs);
    })
    .await;
}

#[tokio::test]
async fn a_slow_reader_slows_its_writer() {
    each(None, async |a, b| {
        let some = noise(6, 1 << 20);
        let mut sent = Vec::new();
        // Until nothing moves any more: every socket's buffers are full, and ours.
        while let Ok(n) = timeout(Duration::from_millis(500), a.write(&some)).await {
            sent.extend_from_slice(&some[..n.unwrap()]);
            assert!(sent.len() < 100 << 20, "nobody stops the writer");
        }
        let expecting = sent.len();
        let mut data = vec![0; expecting];
        b.read_exact(&mut data).await.unwrap();
        assert!(data == sent);
    })
    .await;
}

#[tokio::test]
async fn what_was_read_before_goes_first_and_is_counted() {
    let (mut a, client) = tcp_pair().await;
    let (mut b, server) = tcp_pair().await;
    let stream = |tcp, prefix| Stream {
        io: Io::Plain(tcp),
        prefix: Bytes::from_static(prefix),
    };
    let counters = Counters::default();
    let options = Options::default();
    let copying = copy(
        stream(client, b"EHLO"),
        stream(server, b"220 "),
        &options,
        &counters,
        pending(),
    );
    let applications = async {
        a.write_all(b" a").await.unwrap();
        b.write_all(b"ready").await.unwrap();
        a.shutdown().await.unwrap();
        b.shutdown().await.unwrap();
        (read_all(&mut a).await.0, read_all(&mut b).await.0)
    };
    let (ended, (to_a, to_b)) = tokio::join!(copying, applications);
    assert_eq!((&to_a[..], &to_b[..]), (&b"220 ready"[..], &b"EHLO a"[..]));
    assert_eq!(ended, Ended::Finished);
    assert_eq!((counters.to_server.get(), counters.to_client.get()), (6, 9));
}

#[tokio::test]
async fn idle_connections_and_drained_ones_are_reset() {
    for idle in [true, false] {
        let (mut a, client) = tcp_pair().await;
        let (mut b, server) = tcp_pair().await;
        let counters = Counters::default();
        let options = Options {
            idle_timeout: idle.then_some(Duration::from_millis(150)),
        };
        let begin = Instant::now();
        let cut = async {
            if idle {
                pending::<()>().await;
            }
            tokio::time::sleep(Duration::from_millis(250)).await;
        };
        let copying = copy(client.into(), server.into(), &options, &counters, cut);
        let applications = async {
            tokio::time::sleep(Duration::from_millis(100)).await;
            a.write_all(b"x").await.unwrap();
            let ends = tokio::join!(read_all(&mut a), read_all(&mut b));
            (ends.0.1.unwrap_err().kind(), ends.1)
        };
        let (ended, (a_end, (b_data, b_end))) = tokio::join!(copying, applications);
        let took = begin.elapsed();
        assert!(took >= Duration::from_millis(240) && took < Duration::from_secs(2));
        assert_eq!(
            ended,
            if idle {
                Ended::IdleTimeout
            } else {
                Ended::Drained
            }
        );
        assert_eq!(
            (a_end, &b_data[..]),
            (ErrorKind::ConnectionReset, &b"x"[..])
        );
        assert_eq!(b_end.unwrap_err().kind(), ErrorKind::ConnectionReset);
    }
}

#[tokio::test]
async fn a_client_that_reset_early_is_delivered() {
    let (to, mut server) = tcp_pair().await;
    let delivering = deliver_reset(to.into(), Bytes::from_static(b"GE"));
    let ((), (data, end)) = tokio::join!(delivering, read_all(&mut server));
    assert_eq!(&data[..], b"GE");
    assert_eq!(end.unwrap_err().kind(), ErrorKind::ConnectionReset);
}

#[tokio::test]
async fn the_copy_of_a_connection_is_small() {
    let (a, b) = tcp_pair().await;
    let counters = Counters::default();
    let options = Options::default();
    let copying = copy(a.into(), b.into(), &options, &counters, pending());
    let bytes = size_of_val(&copying);
    assert!(bytes < 800, "{bytes} bytes per connection");
}

/// What one application does, a step at a time.
#[derive(Debug, Clone)]
enum Step {
    Write(usize),
    Pause,
}

fn script() -> impl Strategy<Value = (Vec<Step>, bool)> {
    let step = prop_oneof![
        (1..5usize).prop_map(Step::Write),
        (1000..70_000usize).prop_map(Step::Write),
        (100_000..400_000usize).prop_map(Step::Write),
        Just(Step::Pause),
    ];
    (prop::collection::vec(step, 0..6), any::<bool>())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    /// However two applications cut up what they say, all of it arrives, in order, with its end.
    #[test]
    fn everything_arrives_in_order(
        client in script(),
        server in script(),
        four in any::<bool>(),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        LocalSet::new().block_on(&runtime, async {
            let mut chain = Chain::new(if four { 4 } else { 2 }).await;
            async fn play(
                stream: &mut TcpStream,
                (steps, early): &(Vec<Step>, bool),
                seed: u64,
            ) -> (Vec<u8>, Vec<u8>) {
                let total = steps.iter().map(|step| if let Step::Write(n) = step { *n } else { 0 });
                let all = noise(seed, total.sum());
                let (mut read, mut write) = stream.split();
                let mut theirs = Vec::new();
                let heard = Rc::new(tokio::sync::Notify::new());
                let writing = async {
                    let mut rest = &all[..];
                    for step in steps {
                        match step {
                            Step::Pause => tokio::time::sleep(Duration::from_millis(2)).await,
                            Step::Write(n) => {
                                let (now, later) = rest.split_at(*n);
                                write.write_all(now).await.unwrap();
                                rest = later;
                            }
                        }
                    }
                    if !early {
                        // Half-closes last: after it has heard the other side's end, or a while.
                        let _ = timeout(Duration::from_millis(20), heard.notified()).await;
                    }
                    write.shutdown().await.unwrap();
                };
                let reading = async {
                    read.read_to_end(&mut theirs).await.unwrap();
                    heard.notify_one();
                };
                tokio::join!(writing, reading);
                (all, theirs)
            }
            let (one, other) = tokio::join!(
                play(&mut chain.client, &client, 11),
                play(&mut chain.server, &server, 12),
            );
            assert!(one.0 == other.1 && other.0 == one.1);
            assert_eq!(chain.ended().await, Ended::Finished);
        });
    }
}

#[tokio::test]
async fn what_follows_an_urgent_byte_is_not_overlooked() {
    each(None, async |a, b| {
        for _ in 0..10 {
            a.write_all(b"abc").await.unwrap();
            let urgent = nix::sys::socket::MsgFlags::MSG_OOB;
            nix::sys::socket::send(a.as_raw_fd(), b"U", urgent).unwrap();
            a.write_all(b"def").await.unwrap();
            let mut got = [0; 7];
            b.read_exact(&mut got).await.unwrap();
            assert_eq!(&got, b"abcUdef");
        }
    })
    .await;
}
