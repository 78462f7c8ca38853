use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::time::Instant;
use weft_api::proto::{ResourceKind, Trust, resource::Body};

use super::samples::*;
use crate::discovery::directory::{Directory, LinkState};
use crate::discovery::store::{Reply, Store};
use crate::identity::Handle;
use crate::identity::testing::{Authority, shop};
use crate::tables::{Destination, Known};

struct World {
    directory: Arc<Directory>,
    store: Store,
}

impl World {
    fn new() -> Self {
        Self::with(Handle::new())
    }

    fn with(identity: Handle) -> Self {
        let (directory, _) = Directory::new(identity);
        let store = Store::new(directory.clone(), "cluster.local", "shop/web");
        Self { directory, store }
    }

    /// A worker has connected to the VIP.
    fn wanting() -> Self {
        let mut world = Self::new();
        drop(world.directory.lookup(vip()));
        assert_eq!(world.store.want(vip()).unwrap().version, 0);
        world
    }

    fn table(&self) -> Arc<Destination> {
        match self.directory.cell(&vip()).unwrap().known() {
            Known::Present(table) => table,
            other => panic!("{other:?}"),
        }
    }

    /// Lets time pass and forgets what is idle.
    async fn idle(&mut self, time: Duration, idle: Duration) -> Vec<String> {
        tokio::time::advance(time).await;
        self.directory.tick();
        let keys = self.store.forget_idle(idle);
        keys.into_iter().map(|key| key.name).collect()
    }
}

fn vip() -> SocketAddr {
    VIP.parse().unwrap()
}

fn acked(reply: &Reply) -> Vec<u64> {
    assert!(reply.nacks.is_empty(), "{:?}", reply.nacks);
    reply.acks.iter().map(|ack| ack.version).collect()
}

#[tokio::test]
async fn a_refused_version_leaves_the_good_one_and_its_neighbours() {
    let mut world = World::wanting();
    let reply = world.store.apply(vec![
        of_destination(11, destination()),
        of_endpoints(21, &["10.1.0.1:80"]),
    ]);
    assert_eq!(acked(&reply), [11, 21]);
    let good = world.table();

    let mut bad = destination();
    bad.routes[0].backends[0].weight = u32::MAX;
    let reply = world.store.apply(vec![
        of_destination(12, bad),
        of_endpoints(22, &["10.1.0.1:80", "10.1.0.2:80"]),
    ]);
    assert_eq!(reply.acks.len(), 1);
    assert_eq!(reply.nacks[0].version, 12);
    assert!(
        reply.nacks[0]
            .reason
            .contains("route 0 ('Service/shop/cart'): a weight")
    );
    // We go on following the endpoints of the table we use.
    assert_eq!(reply.subscribe[0].key.as_ref().unwrap().name, ENDPOINTS);
    assert!(Arc::ptr_eq(&good, &world.table()));
    let set = good.routes[0].backends[0]
        .backend
        .as_ref()
        .unwrap()
        .endpoints
        .current
        .load_full();
    assert_eq!(set.endpoints.len(), 2);

    // The version told at the next stream is the good one.
    let resumed = world.store.resume();
    let versions: Vec<_> = resumed.iter().map(|held| held.version).collect();
    assert_eq!(versions, [0, 0, 11, 22]);
    let status = serde_json::to_value(world.store.status()).unwrap();
    assert_eq!(status[2]["version"], "000000000000000b");
    assert_eq!(status[2]["nack"]["version"], "000000000000000c");

    world.store.apply(vec![of_destination(13, destination())]);
    let status = serde_json::to_value(world.store.status()).unwrap();
    assert!(status[2]["nack"].is_null());
}

#[tokio::test]
async fn a_first_version_that_is_refused_holds_nobody_up() {
    let mut world = World::wanting();
    let mut bad = destination();
    bad.port = 0;
    let reply = world.store.apply(vec![of_destination(1, bad)]);
    assert_eq!(reply.nacks.len(), 1);
    let cell = world.directory.lookup(vip());
    assert!(matches!(cell.known(), Known::Absent));
}

#[tokio::test]
async fn what_was_learnt_outlives_an_update() {
    let mut world = World::wanting();
    world.store.apply(vec![
        of_destination(1, destination()),
        of_endpoints(2, &["10.1.0.1:80", "10.1.0.2:80"]),
    ]);
    let before = world.table();
    let old = before.routes[0].backends[0].backend.as_ref().unwrap();
    let old_set = old.endpoints.current.load_full();

    let mut changed = destination();
    changed.routes[0].policy = None;
    let mut moved = endpoints(&["10.1.0.2:80", "10.1.0.3:80"]);
    moved.endpoints[0].zone = "b".into();
    world.store.apply(vec![
        of_destination(3, changed),
        resource(
            ResourceKind::Endpoints,
            ENDPOINTS,
            4,
            Body::Endpoints(moved.clone()),
        ),
    ]);
    let after = world.table();
    let new = after.routes[0].backends[0].backend.as_ref().unwrap();
    assert_ne!(before.id, after.id);
    assert!(Arc::ptr_eq(&old.limits, &new.limits));
    assert!(Arc::ptr_eq(&old.endpoints, &new.endpoints));
    let new_set = new.endpoints.current.load_full();
    assert!(new_set.generation > old_set.generation);
    assert!(Arc::ptr_eq(
        &old_set.endpoints[1].health,
        &new_set.endpoints[0].health
    ));
    assert!(!Arc::ptr_eq(
        &old_set.endpoints[0].health,
        &new_set.endpoints[1].health
    ));

    // Another identity at the same address is another endpoint.
    moved.endpoints[0].identity = shop("other");
    world.store.apply(vec![resource(
        ResourceKind::Endpoints,
        ENDPOINTS,
        5,
        Body::Endpoints(moved),
    )]);
    let newest = new.endpoints.current.load_full();
    assert!(!Arc::ptr_eq(
        &newest.endpoints[0].health,
        &new_set.endpoints[0].health
    ));

    // The version held already changes nothing.
    assert_eq!(
        acked(&world.store.apply(vec![of_destination(3, destination())])),
        [3]
    );
    assert!(Arc::ptr_eq(&after, &world.table()));
}

#[tokio::test]
async fn an_absent_destination_may_appear_and_go() {
    let mut world = World::wanting();
    let cell = world.directory.lookup(vip());
    assert!(matches!(cell.known(), Known::Pending));
    world
        .store
        .apply(vec![absent(ResourceKind::Destination, VIP, 1)]);
    assert!(matches!(cell.known(), Known::Absent));
    world.store.apply(vec![of_destination(2, destination())]);
    assert!(matches!(cell.known(), Known::Present(_)));
    world
        .store
        .apply(vec![absent(ResourceKind::Destination, VIP, 1)]);
    assert!(matches!(cell.known(), Known::Absent));
}

#[tokio::test]
async fn absent_endpoints_are_none() {
    let mut world = World::wanting();
    world.store.apply(vec![
        of_destination(1, destination()),
        of_endpoints(2, &["10.1.0.1:80"]),
    ]);
    world
        .store
        .apply(vec![absent(ResourceKind::Endpoints, ENDPOINTS, 3)]);
    let table = world.table();
    let set = table.routes[0].backends[0]
        .backend
        .as_ref()
        .unwrap()
        .endpoints
        .current
        .load_full();
    assert!(set.endpoints.is_empty());
}

#[tokio::test]
async fn what_was_not_asked_for_is_refused_or_ignored() {
    let mut world = World::new();
    let reply = world.store.apply(vec![
        of_destination(1, destination()),
        resource(
            ResourceKind::Workload,
            "shop/other",
            2,
            Body::Workload(workload()),
        ),
        resource(ResourceKind::Trust, "trust", 3, Body::Workload(workload())),
        absent(ResourceKind::Trust, "trust", 4),
        of_endpoints(0, &[]),
    ]);
    assert!(reply.acks.is_empty());
    let refused: Vec<_> = reply.nacks.iter().map(|nack| nack.version).collect();
    assert_eq!(refused, [2, 3, 4, 0]);
    assert!(world.directory.destinations().is_empty());
}

#[tokio::test(start_paused = true)]
async fn idle_destinations_are_forgotten_unless_held() {
    let idle = Duration::from_secs(600);
    let mut world = World::wanting();
    world.store.apply(vec![
        of_destination(1, destination()),
        of_endpoints(2, &["10.1.0.1:80"]),
    ]);
    let held = world.directory.lookup(vip());
    assert!(world.idle(idle * 2, idle).await.is_empty());
    drop(held);
    // It counts as used when it was looked up last.
    drop(world.directory.lookup(vip()));
    assert!(world.idle(idle, idle).await.is_empty());
    assert_eq!(world.idle(Duration::from_secs(1), idle).await, [VIP]);
    assert!(world.directory.destinations().is_empty());
    assert_eq!(world.store.resume().len(), 2);
    // What arrives late for it is ignored.
    assert!(acked(&world.store.apply(vec![of_destination(3, destination())])).is_empty());
    // And it can be wanted again.
    assert!(matches!(
        world.directory.lookup(vip()).known(),
        Known::Pending
    ));
    assert!(world.store.want(vip()).is_some());
}

#[tokio::test(start_paused = true)]
async fn endpoints_are_kept_while_any_destination_reads_them() {
    let idle = Duration::from_secs(600);
    let mut world = World::wanting();
    let other: SocketAddr = "10.96.0.16:80".parse().unwrap();
    let held = world.directory.lookup(other);
    world.store.want(other);
    world.store.apply(vec![
        of_destination(1, destination()),
        resource(
            ResourceKind::Destination,
            "10.96.0.16:80",
            1,
            Body::Destination(destination()),
        ),
        of_endpoints(2, &["10.1.0.1:80"]),
    ]);
    // Subscribed to by ourselves from the second stream on.
    assert_eq!(world.store.resume().len(), 5);
    assert_eq!(world.idle(idle * 2, idle).await, [VIP]);
    let Known::Present(table) = held.known() else {
        panic!("gone")
    };
    let cell = table.routes[0].backends[0]
        .backend
        .as_ref()
        .unwrap()
        .endpoints
        .clone();
    world
        .store
        .apply(vec![of_endpoints(3, &["10.1.0.1:80", "10.1.0.2:80"])]);
    assert_eq!(cell.current.load().endpoints.len(), 2);
    drop((held, table));
    assert_eq!(
        world.idle(idle * 2, idle).await,
        ["10.96.0.16:80", ENDPOINTS]
    );
}

#[tokio::test]
async fn one_address_in_two_spellings_is_one_destination() {
    let world = World::new();
    let v4 = world.directory.lookup(vip());
    let mapped = world
        .directory
        .lookup("[::ffff:10.96.0.15]:80".parse().unwrap());
    assert!(Arc::ptr_eq(&v4, &mapped));
}

#[tokio::test(start_paused = true)]
async fn a_connection_waits_for_the_answer_and_no_longer() {
    let mut world = World::wanting();
    let cell = world.directory.lookup(vip());
    let begin = Instant::now();
    let deadline = begin + Duration::from_secs(1);
    assert!(matches!(cell.resolved(deadline).await, Known::Pending));
    assert_eq!(begin.elapsed(), Duration::from_secs(1));

    let waiting = tokio::spawn({
        let cell = cell.clone();
        async move {
            cell.resolved(Instant::now() + Duration::from_secs(60))
                .await
        }
    });
    tokio::task::yield_now().await;
    world.store.apply(vec![of_destination(1, destination())]);
    let begin = Instant::now();
    assert!(matches!(waiting.await.unwrap(), Known::Present(_)));
    assert_eq!(begin.elapsed(), Duration::ZERO);
}

#[tokio::test(start_paused = true)]
async fn nobody_waits_for_a_control_plane_that_is_away() {
    let world = World::wanting();
    let cell = world.directory.lookup(vip());
    let begin = Instant::now();
    let waiting = tokio::spawn({
        let cell = cell.clone();
        async move {
            cell.resolved(Instant::now() + Duration::from_secs(60))
                .await
        }
    });
    tokio::task::yield_now().await;
    world.directory.set_link(LinkState::Down);
    assert!(matches!(waiting.await.unwrap(), Known::Pending));
    assert!(matches!(
        cell.resolved(begin + Duration::from_secs(60)).await,
        Known::Pending
    ));
    assert!(begin.elapsed() < Duration::from_millis(100));
}

#[tokio::test]
async fn roots_come_from_the_stream() {
    let (old, new) = (Authority::new("old", 1), Authority::new("new", 2));
    let handle = Handle::new();
    handle.set(old.credentials(&shop("web"), &[&old]));
    let mut world = World::with(handle.clone());
    let trust = |version, domain: &str, roots: &[&Authority]| {
        let trust = Trust {
            trust_domain: domain.into(),
            roots: roots.iter().map(|a| a.cert.to_vec()).collect(),
            ..Trust::default()
        };
        vec![resource(
            ResourceKind::Trust,
            "trust",
            version,
            Body::Trust(trust),
        )]
    };
    assert!(world.directory.ready().trust);
    assert_eq!(
        acked(&world.store.apply(trust(1, "cluster.local", &[&old]))),
        [1]
    );
    assert_eq!(handle.generation(), 1);
    assert_eq!(
        acked(&world.store.apply(trust(2, "cluster.local", &[&old, &new]))),
        [2]
    );
    assert_eq!(handle.generation(), 2);
    for bad in [
        trust(3, "other.example", &[&new]),
        trust(3, "cluster.local", &[]),
    ] {
        assert_eq!(world.store.apply(bad).nacks.len(), 1);
        assert_eq!(handle.generation(), 2);
    }
    world.store.apply(trust(4, "cluster.local", &[&new]));
    assert!(!world.directory.ready().trust);
}

#[tokio::test]
async fn ready_when_everything_is_in_place() {
    let ca = Authority::new("root", 1);
    let handle = Handle::new();
    let mut world = World::with(handle.clone());
    assert!(!world.directory.ready().all());
    handle.set(ca.credentials(&shop("web"), &[&ca]));
    assert!(!world.directory.ready().workload);
    assert_eq!(acked(&world.store.apply(vec![of_workload(1)])), [1]);
    assert!(world.directory.ready().all());
    assert_eq!(&*world.directory.workload().name, "web");
    // It stays when the control plane no longer knows it.
    world
        .store
        .apply(vec![absent(ResourceKind::Workload, "shop/web", 2)]);
    assert!(world.directory.ready().all());
}

#[test]
fn forgetting_and_looking_up_at_once_lose_nothing() {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let _entered = runtime.enter();
    let world = World::new();
    let directory = &world.directory;
    let done = AtomicBool::new(false);
    let mut forgotten = 0;
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..3)
            .map(|_| {
                scope.spawn(move || {
                    for n in 0..20_000u32 {
                        let address = SocketAddr::from(([10, 0, (n % 251) as u8, 1], 80));
                        let cell = directory.lookup(address);
                        assert_eq!(cell.address, address);
                        // Who holds a cell holds the one that updates reach.
                        assert!(Arc::ptr_eq(&directory.lookup(address), &cell));
                    }
                })
            })
            .collect();
        let forgetting = scope.spawn(|| {
            let mut forgotten = 0;
            while !done.load(Ordering::Relaxed) {
                directory.tick();
                forgotten += directory.forget_idle(Duration::ZERO).len();
                std::thread::yield_now();
            }
            forgotten
        });
        let ended: Vec<_> = workers.into_iter().map(|worker| worker.join()).collect();
        done.store(true, Ordering::Relaxed);
        forgotten = forgetting.join().unwrap();
        assert!(ended.iter().all(Result::is_ok));
    });
    assert!(forgotten > 0);
    let known = directory.destinations().len() as u64;
    assert_eq!(directory.destination_count(), known);
}

/// What is near follows the proxy's own place, whichever of the two comes first.
#[tokio::test]
async fn near_is_what_is_meant_for_our_own_place() {
    let given = |version, zones: [&str; 2]| {
        let mut given = endpoints(&["10.1.0.1:80", "10.1.0.2:80"]);
        for (endpoint, zone) in given.endpoints.iter_mut().zip(zones) {
            endpoint.for_zones = vec![zone.into()];
            endpoint.for_nodes = vec![format!("node-{zone}")];
        }
        resource(
            ResourceKind::Endpoints,
            ENDPOINTS,
            version,
            Body::Endpoints(given),
        )
    };
    let at = |version, zone: &str, node: &str| {
        let mut given = workload();
        given.zone = zone.into();
        given.node = node.into();
        let body = Body::Workload(given);
        resource(ResourceKind::Workload, "shop/web", version, body)
    };
    let mut world = World::wanting();
    let near = |world: &World| {
        let table = world.table();
        let cell = &table.routes[0].backends[0]
            .backend
            .as_ref()
            .unwrap()
            .endpoints;
        let set = cell.current.load();
        (set.generation, set.near.to_vec())
    };
    world.store.apply(vec![
        of_destination(11, destination()),
        given(21, ["a", "b"]),
    ]);
    let (first, none) = near(&world);
    assert_eq!(none, [0; 0], "nobody knows where we are");
    world.store.apply(vec![at(31, "b", "")]);
    assert_eq!(near(&world), (first + 1, vec![1]));
    world.store.apply(vec![at(32, "b", "node-a")]);
    assert_eq!(near(&world), (first + 2, vec![0]), "the node goes first");
    world.store.apply(vec![at(33, "c", "node-a")]);
    assert_eq!(near(&world).0, first + 2, "nothing changes by that");
    world.store.apply(vec![given(22, ["b", "c"])]);
    assert_eq!(near(&world), (first + 3, vec![1]), "no hint for the node");
}
