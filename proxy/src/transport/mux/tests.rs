use std::io;
use std::pin::Pin;
use std::task::Poll;

use proptest::prelude::*;
use tokio::io::{AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::task::{JoinHandle, spawn_local};

use super::frame::{Decoder, FrameError};
use super::*;
use crate::transport::testing::{local, tcp_pair};

type Ended = JoinHandle<Result<(), SessionError>>;

/// Both ends of a shared connection, and what the accepting one gets.
struct Pair {
    client: Session,
    server: Session,
    accepted: mpsc::UnboundedReceiver<(Inside, MuxStream)>,
    client_ended: Ended,
    server_ended: Ended,
}

impl Pair {
    async fn new() -> Self {
        let (connected, accepted) = tcp_pair().await;
        let (client, client_driver) = Driver::client(Io::Plain(connected));
        let (server, server_driver) = Driver::server(Io::Plain(accepted));
        let (tell, accepted) = mpsc::unbounded_channel();
        Self {
            client,
            server,
            accepted,
            client_ended: spawn_local(client_driver.run(|_, _| panic!("a server begins none"))),
            server_ended: spawn_local(server_driver.run(move |inside, stream| {
                let _ = tell.send((inside, stream));
            })),
        }
    }

    /// A stream, as both sides have it.
    async fn stream(&mut self) -> (MuxStream, MuxStream) {
        let near = self.client.open(Inside::Tcp).unwrap();
        let (inside, far) = self.accepted.recv().await.unwrap();
        assert_eq!(inside, Inside::Tcp);
        (near, far)
    }
}

/// Bytes that show when some are lost, doubled or out of order.
fn bytes(seed: usize, length: usize) -> Vec<u8> {
    (0..length)
        .map(|at| ((at * 31 + seed * 7 + at / 251) % 256) as u8)
        .collect()
}

#[test]
fn what_is_written_arrives_on_its_stream() {
    local(async {
        let mut pair = Pair::new().await;
        // Below and above a record, a window, and what is written without a copy.
        let sizes = [1, 100, 8191, 8192, 65_536, 65_537, 300_000, 2_000_000];
        let mut clients = Vec::new();
        for (seed, size) in sizes.into_iter().enumerate() {
            let (near, far) = pair.stream().await;
            spawn_local(async move {
                let (mut from, mut to) = tokio::io::split(far);
                tokio::io::copy(&mut from, &mut to).await.unwrap();
                to.shutdown().await.unwrap();
            });
            clients.push(spawn_local(async move {
                let said = bytes(seed, size);
                let (mut from, mut to) = tokio::io::split(near);
                let mut heard = Vec::new();
                let say = async {
                    to.write_all(&said).await.unwrap();
                    to.shutdown().await.unwrap();
                };
                let hear = from.read_to_end(&mut heard);
                let ((), read) = tokio::join!(say, hear);
                read.unwrap();
                assert!(heard == said, "{size} bytes came back changed");
            }));
        }
        for client in clients {
            client.await.unwrap();
        }
        assert_eq!(pair.client.0.streams.borrow().len(), 0);
        assert!(pair.client.idle_since().is_some());
    });
}

#[test]
fn a_half_close_leaves_the_other_direction_open() {
    local(async {
        let mut pair = Pair::new().await;
        let (mut near, mut far) = pair.stream().await;
        near.write_all(b"question").await.unwrap();
        near.shutdown().await.unwrap();
        assert!(near.write_all(b"more").await.is_err());
        let mut asked = Vec::new();
        far.read_to_end(&mut asked).await.unwrap();
        assert_eq!(asked, b"question");
        far.write_all(b"answer").await.unwrap();
        far.shutdown().await.unwrap();
        let mut answered = Vec::new();
        near.read_to_end(&mut answered).await.unwrap();
        assert_eq!(answered, b"answer");
    });
}

#[test]
fn a_reset_comes_after_the_data_before_it() {
    local(async {
        let mut pair = Pair::new().await;
        for half_closed in [false, true] {
            let (mut near, mut far) = pair.stream().await;
            let hangup = near.hangup();
            far.write_all(b"last words").await.unwrap();
            if half_closed {
                near.shutdown().await.unwrap();
                assert_eq!(far.read(&mut [0; 1]).await.unwrap(), 0);
            }
            far.reset();
            hangup.await;
            let mut heard = Vec::new();
            let error = near.read_to_end(&mut heard).await.unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
            assert_eq!(heard, b"last words");
            assert!(near.write_all(b"too late").await.is_err());
        }
        // The others go on.
        let (mut near, mut far) = pair.stream().await;
        near.write_all(b"x").await.unwrap();
        assert_eq!(far.read_u8().await.unwrap(), b'x');
    });
}

#[test]
fn a_reader_that_stalls_stops_its_own_stream() {
    local(async {
        let mut pair = Pair::new().await;
        let (mut near, mut far) = pair.stream().await;
        let mut taken = 0;
        let block = [7; 10_000];
        std::future::poll_fn(|cx| {
            while let Poll::Ready(n) = Pin::new(&mut near).poll_write(cx, &block) {
                taken += n.unwrap();
            }
            // What waits for room in the session goes on; what waits for the reader does not.
            match near.state.credit.get() {
                0 => Poll::Ready(()),
                _ => Poll::Pending,
            }
        })
        .await;
        assert_eq!(taken, WINDOW as usize);
        let (mut other, mut echo) = pair.stream().await;
        other.write_all(b"not held up").await.unwrap();
        let mut heard = [0; 11];
        echo.read_exact(&mut heard).await.unwrap();
        assert_eq!(&heard, b"not held up");
        // The reader goes on, and so does the writer.
        let rest = spawn_local(async move {
            near.write_all(&[7; 1_000_000]).await.unwrap();
            near.shutdown().await.unwrap();
            // Both directions have to end before the stream goes.
            assert_eq!(near.read(&mut [0; 1]).await.unwrap(), 0);
        });
        let mut all = Vec::new();
        far.read_to_end(&mut all).await.unwrap();
        assert_eq!(all.len(), taken + 1_000_000);
        assert!(far.state.window.get() <= MAX_WINDOW);
        far.shutdown().await.unwrap();
        rest.await.unwrap();
    });
}

#[test]
fn what_is_left_ends_in_order() {
    local(async {
        let mut pair = Pair::new().await;
        let (near, mut far) = pair.stream().await;
        let hangup = far.hangup();
        Io::Shared(near).leave();
        let mut heard = Vec::new();
        far.write_all(b"not to be heard").await.unwrap();
        assert_eq!(far.read_to_end(&mut heard).await.unwrap(), 0);
        far.shutdown().await.unwrap();
        let reset = tokio::time::timeout(2 * crate::transport::ending::LEAVE, hangup).await;
        assert!(reset.is_err(), "both have ended");
    });
}

#[test]
fn a_lost_connection_resets_its_streams_after_their_data() {
    local(async {
        let mut pair = Pair::new().await;
        let (mut near, mut far) = pair.stream().await;
        far.write_all(b"heard").await.unwrap();
        assert_eq!(near.read_u8().await.unwrap(), b'h');
        pair.server_ended.abort();
        let _ = (&mut pair.server_ended).await;
        drop((far, pair.server));
        let mut heard = Vec::new();
        let error = near.read_to_end(&mut heard).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
        assert_eq!(heard, b"eard");
        assert!(pair.client_ended.await.unwrap().is_err());
        assert!(pair.client.open(Inside::Http1).is_none());
    });
}

#[test]
fn who_leaves_takes_what_was_on_its_way() {
    local(async {
        let mut pair = Pair::new().await;
        let (mut near, mut far) = pair.stream().await;
        // Begun before the client knows that the server leaves.
        let mut late = pair.client.open(Inside::Http1).unwrap();
        late.write_all(b"late").await.unwrap();
        pair.server.leave();
        let (inside, mut taken) = pair.accepted.recv().await.unwrap();
        assert_eq!(inside, Inside::Http1);
        let mut heard = [0; 4];
        taken.read_exact(&mut heard).await.unwrap();
        far.write_all(b"done").await.unwrap();
        near.read_exact(&mut heard).await.unwrap();
        assert!(
            pair.client.open(Inside::Tcp).is_none(),
            "none begins any more"
        );
        drop((near, far, late, taken));
        assert!(pair.client_ended.await.unwrap().is_ok());
        assert!(pair.server_ended.await.unwrap().is_ok());
    });
}

#[test]
fn an_end_is_an_end_however_late_it_is_read() {
    local(async {
        let mut pair = Pair::new().await;
        let (mut near, mut far) = pair.stream().await;
        far.write_all(b"everything").await.unwrap();
        far.shutdown().await.unwrap();
        let hangup = near.hangup();
        drop(far);
        hangup.await;
        let mut heard = Vec::new();
        near.read_to_end(&mut heard).await.unwrap();
        assert_eq!(heard, b"everything");
    });
}

#[test]
fn the_last_words_of_a_session_arrive() {
    local(async {
        let mut pair = Pair::new().await;
        let (mut near, mut far) = pair.stream().await;
        near.shutdown().await.unwrap();
        // Fits into the window, so that the server is done before the client has read.
        far.write_all(&bytes(1, WINDOW as usize)).await.unwrap();
        far.shutdown().await.unwrap();
        drop(far);
        pair.server.leave();
        pair.client.leave();
        let mut heard = Vec::new();
        near.read_to_end(&mut heard).await.unwrap();
        assert!(heard == bytes(1, WINDOW as usize));
        drop(near);
        assert!(pair.client_ended.await.unwrap().is_ok());
        assert!(pair.server_ended.await.unwrap().is_ok());
    });
}

#[test]
fn a_stream_in_bulk_leaves_room_for_the_others() {
    local(async {
        let (connected, peer) = tcp_pair().await;
        let (session, driver) = Driver::client(Io::Plain(connected));
        let _driving = spawn_local(driver.run(|_, _| {}));
        let mut bulk = session.open(Inside::Tcp).unwrap();
        // Far more than the peer takes and the session holds.
        bulk.state.credit.set(u32::MAX);
        spawn_local(async move { while bulk.write_all(&[0; 65_536]).await.is_ok() {} });
        let blocked = || !session.0.blocked[1].borrow().is_empty();
        while !blocked() {
            tokio::task::yield_now().await;
        }
        let mut small = session.open(Inside::Tcp).unwrap();
        let mut reading = spawn_local(async move {
            let mut peer = peer;
            while peer.read(&mut [0; 65_536]).await.is_ok_and(|n| n > 0) {}
        });
        let writes = session.clone();
        let words = spawn_local(async move {
            let before = writes.0.writes.get();
            for _ in 0..20 {
                small.write_all(&[0; 4096]).await.unwrap();
            }
            writes.0.writes.get() - before
        });
        let writes = words.await.unwrap();
        // Each time that it has to wait, it is the next one.
        assert!(writes <= 20, "twenty words took {writes} writes");
        reading.abort();
        let _ = (&mut reading).await;
    });
}

#[test]
fn streams_that_are_held_are_bounded_and_so_is_what_waits() {
    local(async {
        let (peer, accepted) = tcp_pair().await;
        let (session, driver) = Driver::server(Io::Plain(accepted));
        let held = Rc::new(RefCell::new(Vec::new()));
        let kept = held.clone();
        let ended = spawn_local(driver.run(move |_, stream| kept.borrow_mut().push(stream)));
        // Begun and given up at once, and what comes back is never read.
        let mut peer = peer;
        for id in 1.. {
            let flood = [open(id), Frame::Reset(id).header().into()].concat();
            if peer.write_all(&flood).await.is_err() || ended.is_finished() {
                break;
            }
        }
        let error = ended.await.unwrap().unwrap_err();
        assert!(error.to_string().contains("without end"), "{error}");
        assert_eq!(held.borrow().len(), MAX_STREAMS);
        assert_eq!(session.0.living.get(), MAX_STREAMS);
    });
}

#[test]
fn a_full_session_takes_no_more() {
    local(async {
        let pair = Pair::new().await;
        let mut open: Vec<_> = std::iter::from_fn(|| pair.client.open(Inside::Tcp)).collect();
        assert_eq!(open.len(), FULL);
        open.pop();
        assert!(pair.client.open(Inside::Tcp).is_some());
    });
}

/// A session whose peer is not one of ours, and how it ends.
async fn against(say: &[Vec<u8>]) -> (SessionError, TcpStream) {
    let (mut peer, accepted) = tcp_pair().await;
    let (_session, driver) = Driver::server(Io::Plain(accepted));
    let streams = Rc::new(RefCell::new(Vec::new()));
    let kept = streams.clone();
    let ended = spawn_local(driver.run(move |_, stream| kept.borrow_mut().push(stream)));
    for bytes in say {
        // It may have been cut off by now.
        let _ = peer.write_all(bytes).await;
    }
    (ended.await.unwrap().unwrap_err(), peer)
}

fn open(stream: u32) -> Vec<u8> {
    Frame::Open(stream, Inside::Tcp).header().into()
}

fn data(stream: u32, length: usize) -> Vec<u8> {
    let mut frame = Frame::Data(stream, length).header().to_vec();
    frame.resize(HEADER + length, 0);
    frame
}

#[test]
fn a_peer_that_does_not_keep_to_the_protocol_is_cut_off() {
    local(async {
        let half = WINDOW as usize / 2;
        let flood = [vec![open(1)], vec![data(1, half); 3]].concat();
        let mut after_end = [open(1), Frame::End(1).header().into()].concat();
        after_end.extend(data(1, 1));
        for (say, expected) in [
            (vec![vec![0, 0, 0, 1, 9, 0, 0, 0]], "kind 9"),
            (vec![vec![0, 0, 0, 1, 1, 0, 0, 9]], "9 inside"),
            (vec![vec![0, 0, 0, 1, 0, 255, 255, 255]], "16777215 bytes"),
            (vec![open(2), open(1)], "may not begin"),
            (vec![after_end], "after the end"),
            (flood, "more data than there is room for"),
        ] {
            let (error, _peer) = against(&say).await;
            assert!(error.to_string().contains(expected), "{error}");
        }
    });
}

#[test]
fn what_comes_for_a_stream_that_was_given_up_is_nothing_new() {
    local(async {
        let (mut peer, accepted) = tcp_pair().await;
        let (session, driver) = Driver::server(Io::Plain(accepted));
        let ended = spawn_local(driver.run(|_, stream| drop(stream)));
        let late = [
            open(1),
            data(1, 5),
            Frame::Credit(1, 5).header().into(),
            Frame::End(1).header().into(),
            Frame::Reset(1).header().into(),
        ];
        peer.write_all(&late.concat()).await.unwrap();
        let mut reset = [0; HEADER];
        peer.read_exact(&mut reset).await.unwrap();
        assert_eq!(reset, Frame::Reset(1).header());
        peer.shutdown().await.unwrap();
        assert!(ended.await.unwrap().is_ok());
        assert_eq!(session.0.streams.borrow().len(), 0);
    });
}

fn frames() -> impl Strategy<Value = Vec<Frame<Vec<u8>>>> {
    let inside = prop_oneof![Just(Inside::Http1), Just(Inside::Tcp)];
    let frame = prop_oneof![
        (any::<u32>(), prop::collection::vec(any::<u8>(), 1..300))
            .prop_map(|(id, data)| Frame::Data(id, data)),
        (any::<u32>(), inside).prop_map(|(id, inside)| Frame::Open(id, inside)),
        any::<u32>().prop_map(Frame::End),
        any::<u32>().prop_map(Frame::Reset),
        (any::<u32>(), 0..1u32 << 24).prop_map(|(id, bytes)| Frame::Credit(id, bytes)),
        Just(Frame::Leaving),
    ];
    prop::collection::vec(frame, 0..20)
}

/// Frames as they are read from `input` cut into pieces of `sizes`; data of one frame put together.
fn decode(input: &[u8], sizes: &[usize]) -> Result<Vec<Frame<Vec<u8>>>, FrameError> {
    let mut decoder = Decoder::default();
    let mut read: Vec<Frame<Vec<u8>>> = Vec::new();
    let (mut at, mut sizes, mut left) = (0, sizes.iter().cycle(), 0);
    while at < input.len() {
        let end = (at + sizes.next().unwrap()).min(input.len());
        let mut piece = &input[at..end];
        at = end;
        while !piece.is_empty()
            && let Some(frame) = decoder.next(&mut piece)?
        {
            match frame {
                Frame::Data(_, part) if left > 0 => {
                    left -= part.len();
                    if let Some(Frame::Data(_, data)) = read.last_mut() {
                        data.extend_from_slice(part);
                    }
                }
                Frame::Data(id, part) => {
                    left = decoder.data.1;
                    read.push(Frame::Data(id, part.to_vec()));
                }
                Frame::Open(id, inside) => read.push(Frame::Open(id, inside)),
                Frame::End(id) => read.push(Frame::End(id)),
                Frame::Reset(id) => read.push(Frame::Reset(id)),
                Frame::Credit(id, bytes) => read.push(Frame::Credit(id, bytes)),
                Frame::Leaving => read.push(Frame::Leaving),
            }
        }
    }
    Ok(read)
}

proptest! {
    #[test]
    fn frames_are_read_as_written_however_they_come(
        frames in frames(),
        sizes in prop::collection::vec(1..400usize, 1..20),
    ) {
        let mut written = Vec::new();
        for frame in &frames {
            let header = match frame {
                Frame::Data(id, data) => Frame::Data(*id, data.len()),
                Frame::Open(id, inside) => Frame::Open(*id, *inside),
                Frame::End(id) => Frame::End(*id),
                Frame::Reset(id) => Frame::Reset(*id),
                Frame::Credit(id, bytes) => Frame::Credit(*id, *bytes),
                Frame::Leaving => Frame::Leaving,
            };
            written.extend_from_slice(&header.header());
            if let Frame::Data(_, data) = frame {
                written.extend_from_slice(data);
            }
        }
        prop_assert_eq!(decode(&written, &sizes).unwrap(), frames);
    }

    #[test]
    fn any_bytes_are_frames_or_refused(
        input in prop::collection::vec(any::<u8>(), 0..200),
        sizes in prop::collection::vec(1..50usize, 1..10),
    ) {
        let _ = decode(&input, &sizes);
    }
}
