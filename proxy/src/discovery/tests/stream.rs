use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout};
use tonic::Status;
use weft_api::proto::discovery_request::Message;
use weft_api::proto::{Certificate, ResourceKind};

use super::samples::*;
use super::scripted::{PATIENCE, Scripted, Session};
use crate::discovery::dial::ControlPlane;
use crate::discovery::{Client, Directory, LinkState, Settings};
use crate::identity::Handle;
use crate::identity::testing::{Authority, DOMAIN, shop};
use crate::tables::Known;
use crate::telemetry::Registry;

const CONTROL_PLANE: &str = "spiffe://cluster.local/ns/weft-system/sa/weft-control-plane";

struct Mesh {
    server: Scripted,
    directory: Arc<Directory>,
    handle: Handle,
    authority: Authority,
    client: JoinHandle<()>,
}

impl Drop for Mesh {
    fn drop(&mut self) {
        self.client.abort();
    }
}

impl Mesh {
    async fn start() -> Self {
        Self::with(CONTROL_PLANE, Duration::from_secs(600)).await
    }

    async fn with(server_id: &str, idle: Duration) -> Self {
        let authority = Authority::new("root", 1);
        let server = Scripted::start(&authority.credentials(server_id, &[&authority])).await;
        let mut control_plane = ControlPlane::parse(&server.address.to_string(), None).unwrap();
        control_plane.ping_after = Duration::from_millis(200);
        control_plane.ping_timeout = Duration::from_millis(500);
        let settings = Settings {
            control_plane,
            trust_domain: DOMAIN.into(),
            workload: "shop/web".into(),
            admin_address: String::new(),
            idle_destination: idle,
            dns_servers: Vec::new(),
        };
        let handle = Handle::new();
        handle.set(authority.credentials(&shop("web"), &[&authority]));
        let (client, directory) = Client::new(settings, handle.clone(), Registry::new());
        let client = tokio::spawn(async move {
            client.run().await;
        });
        Self {
            server,
            directory,
            handle,
            authority,
            client,
        }
    }

    /// A stream with a destination, its endpoints and the workload in place.
    async fn settled(&mut self) -> Session {
        let (mut session, ..) = self.server.session().await;
        session.send(vec![of_workload(3)]);
        assert_eq!(session.acked().await, 3);
        let cell = self.directory.lookup(vip());
        assert_eq!(names(&session.subscribed().await), [(VIP.to_owned(), 0)]);
        session.send(vec![
            of_destination(1, destination()),
            of_endpoints(2, &["10.1.0.1:80"]),
        ]);
        assert_eq!((session.acked().await, session.acked().await), (1, 2));
        let known = cell.resolved(Instant::now() + PATIENCE).await;
        assert!(matches!(known, Known::Present(_)));
        session
    }
}

fn vip() -> SocketAddr {
    VIP.parse().unwrap()
}

fn names(held: &[weft_api::proto::Held]) -> Vec<(String, u64)> {
    held.iter()
        .map(|held| (held.key.clone().unwrap().name, held.version))
        .collect()
}

async fn until(what: &str, mut done: impl AsyncFnMut() -> bool) {
    let begin = Instant::now();
    while !done().await {
        assert!(begin.elapsed() < PATIENCE, "{what}");
        sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn on_demand_acknowledged_and_resumed_with_versions() {
    let mut mesh = Mesh::start().await;
    let (session, hello, first) = mesh.server.session().await;
    assert_eq!(hello.workload, "shop/web");
    assert!(hello.certificate_expires > 1_700_000_000);
    // Nothing but what every proxy needs.
    assert_eq!(names(&first), [("trust".into(), 0), ("shop/web".into(), 0)]);
    session.fail(Status::unavailable("restarting"));

    let session = mesh.settled().await;
    assert!(mesh.directory.ready().all());
    session.fail(Status::unavailable("restarting"));

    let (mut session, again, resumed) = mesh.server.session().await;
    assert_eq!(again.instance, hello.instance);
    assert_eq!(
        names(&resumed),
        [
            ("trust".into(), 0),
            ("shop/web".into(), 3),
            (VIP.into(), 1),
            (ENDPOINTS.into(), 2)
        ]
    );
    // The stream goes on as before.
    session.send(vec![of_endpoints(4, &["10.1.0.1:80", "10.1.0.2:80"])]);
    assert_eq!(session.acked().await, 4);
    let status = mesh.directory.status().await.unwrap();
    assert_eq!(status.stream, LinkState::Connected);
    assert!(status.last_error.unwrap().contains("restarting"));
}

#[tokio::test]
async fn a_bad_resource_is_refused_by_name() {
    let mut mesh = Mesh::start().await;
    let mut session = mesh.settled().await;
    let mut bad = destination();
    bad.protocol = 77;
    session.send(vec![of_destination(9, bad), of_workload(10)]);
    assert_eq!(session.acked().await, 10);
    let Message::Nack(nack) = session.next().await else {
        panic!("no nack");
    };
    assert_eq!(nack.key.unwrap().name, VIP);
    assert_eq!(nack.version, 9);
    assert!(nack.reason.contains("protocol 77"), "{}", nack.reason);
    assert_eq!(names(&session.subscribed().await), [(ENDPOINTS.into(), 2)]);
    assert!(matches!(
        mesh.directory.lookup(vip()).known(),
        Known::Present(_)
    ));
}

#[tokio::test]
async fn everything_known_stays_while_the_control_plane_is_gone() {
    let mut mesh = Mesh::start().await;
    let session = mesh.settled().await;
    mesh.server.set_open(false);
    session.fail(Status::unavailable("gone"));
    until("the loss is noticed", async || {
        mesh.directory.link() == LinkState::Down
    })
    .await;
    assert!(matches!(
        mesh.directory.lookup(vip()).known(),
        Known::Present(_)
    ));
    assert!(mesh.directory.ready().all());
    // What is not known passes through, and soon.
    let begin = Instant::now();
    let unknown = mesh.directory.lookup("10.96.0.99:80".parse().unwrap());
    let known = unknown.resolved(begin + PATIENCE).await;
    assert!(matches!(known, Known::Pending));
    assert!(begin.elapsed() < PATIENCE / 10);

    mesh.server.set_open(true);
    let (mut session, _, resumed) = mesh.server.session().await;
    assert!(names(&resumed).contains(&("10.96.0.99:80".into(), 0)));
    session.send(vec![absent(ResourceKind::Destination, "10.96.0.99:80", 5)]);
    assert_eq!(session.acked().await, 5);
    assert!(matches!(unknown.known(), Known::Absent));
}

#[tokio::test]
async fn a_control_plane_that_falls_silent_is_noticed() {
    let mut mesh = Mesh::start().await;
    let session = mesh.settled().await;
    let begin = Instant::now();
    mesh.server.set_flowing(false);
    until("the silence is noticed", async || {
        mesh.directory.link() != LinkState::Connected
    })
    .await;
    assert!(begin.elapsed() < Duration::from_secs(5));
    mesh.server.set_flowing(true);
    let (_session, _, resumed) = mesh.server.session().await;
    assert!(names(&resumed).contains(&(VIP.into(), 1)));
    drop(session);
}

#[tokio::test]
async fn what_nobody_uses_is_unsubscribed() {
    let mut mesh = Mesh::with(CONTROL_PLANE, Duration::from_millis(300)).await;
    let mut session = mesh.settled().await;
    let Message::Unsubscribe(gone) = session.next().await else {
        panic!("not unsubscribed");
    };
    assert_eq!(gone.keys[0].name, VIP);
    assert_eq!(mesh.directory.destination_count(), 0);
    // Wanted again, it is asked for again.
    let _cell = mesh.directory.lookup(vip());
    assert_eq!(names(&session.subscribed().await), [(VIP.into(), 0)]);
}

#[tokio::test]
async fn somebody_else_is_not_the_control_plane() {
    let mesh = Mesh::with(&shop("weft-control-plane"), Duration::from_secs(600)).await;
    until("the stranger is refused", async || {
        let status = mesh.directory.status().await.unwrap();
        status.last_error.is_some_and(|error| {
            error.contains(&format!(
                "the endpoint showed {} but {CONTROL_PLANE} was expected",
                shop("weft-control-plane")
            ))
        })
    })
    .await;
    assert_eq!(mesh.directory.link(), LinkState::Down);
}

#[tokio::test]
async fn a_renewed_certificate_does_not_cut_the_stream() {
    let mut mesh = Mesh::start().await;
    let mut session = mesh.settled().await;
    let renewed = mesh.authority.credentials(&shop("web"), &[&mesh.authority]);
    mesh.handle.set(renewed);
    assert_eq!(mesh.handle.generation(), 2);
    // The control plane is told which one is in use now.
    let leaf = mesh.handle.get().unwrap().leaf().to_vec();
    assert_eq!(
        session.next().await,
        Message::Certificate(Certificate { leaf })
    );
    session.send(vec![of_workload(30)]);
    assert_eq!(session.acked().await, 30);
}

#[tokio::test]
async fn a_burst_of_destinations_loses_none() {
    let mut mesh = Mesh::start().await;
    let (mut session, ..) = mesh.server.session().await;
    let cells: Vec<_> = (0..500u16)
        .map(|n| {
            let address = SocketAddr::from(([10, 96, (n >> 8) as u8, n as u8], 80));
            mesh.directory.lookup(address)
        })
        .collect();
    let mut answered = 0;
    while answered < cells.len() {
        let Ok(message) = timeout(PATIENCE, session.next()).await else {
            panic!("{answered} asked for");
        };
        if let Message::Subscribe(subscribe) = message {
            answered += subscribe.resources.len();
            let answers = subscribe.resources.iter().map(|held| {
                let name = &held.key.as_ref().unwrap().name;
                absent(ResourceKind::Destination, name, 1)
            });
            session.send(answers.collect());
        }
    }
    for cell in cells {
        let known = cell.resolved(Instant::now() + PATIENCE).await;
        assert!(matches!(known, Known::Absent));
    }
}
