//! Permits: what is refused, who waits, and that nothing is lost across threads.

use std::sync::atomic::{AtomicBool, AtomicU32};
use std::task::Poll;

use futures_util::{FutureExt as _, poll};

use super::*;

fn limited(connections: u32, requests: u32, pending: u32) -> BackendPolicy {
    BackendPolicy {
        max_connections: connections,
        max_requests: requests,
        max_pending_requests: pending,
        ..BackendPolicy::default()
    }
}

#[tokio::test]
async fn without_limits_nothing_is_counted() {
    let backend = backend(&cell(infos(&[1])), limited(0, 0, 0));
    let balancer = Balancer::<()>::new(backend.clone());
    let _requests: Vec<_> = (0..1000)
        .map(|_| balancer.request_permit().now_or_never().unwrap().unwrap())
        .collect();
    let _connection = balancer.connection_permit().unwrap();
    assert_eq!(backend.limits.in_use(), LimitsInUse::default());
}

#[tokio::test]
async fn connections_beyond_the_limit_are_refused_at_once() {
    let backend = backend(&cell(infos(&[1])), limited(2, 0, 0));
    let balancer = Balancer::<()>::new(backend.clone());
    let first = balancer.connection_permit().unwrap();
    let _second = balancer.connection_permit().unwrap();
    let refused = balancer.connection_permit().err();
    assert_eq!(refused, Some(LimitReached::Connections));
    drop(first);
    let _third = balancer.connection_permit().unwrap();
    let in_use = backend.limits.in_use();
    assert_eq!((in_use.connections, in_use.rejected_connections), (2, 1));
}

#[tokio::test]
async fn requests_wait_in_turn_and_the_queue_has_an_end() {
    let backend = backend(&cell(infos(&[1])), limited(0, 1, 2));
    let balancer = Balancer::<()>::new(backend.clone());
    let running = balancer.request_permit().await.unwrap();
    let mut first = std::pin::pin!(balancer.request_permit());
    let mut second = std::pin::pin!(balancer.request_permit());
    assert!(poll!(&mut first).is_pending());
    assert!(poll!(&mut second).is_pending());
    let third = balancer.request_permit().await.err();
    assert_eq!(third, Some(LimitReached::PendingRequests));
    assert_eq!(backend.limits.in_use().pending, 2);
    drop(running);
    // The place is the first one's: neither the second nor a newcomer gets it.
    assert!(poll!(&mut second).is_pending());
    let newcomer = balancer.request_permit();
    let mut newcomer = std::pin::pin!(newcomer);
    assert_eq!(
        poll!(&mut newcomer).map(|r| r.err()),
        Poll::Ready(Some(LimitReached::PendingRequests))
    );
    let Poll::Ready(Ok(running)) = poll!(&mut first) else {
        panic!("the first in the queue has its place")
    };
    drop(running);
    assert!(poll!(&mut second).is_ready());
    let in_use = backend.limits.in_use();
    assert_eq!((in_use.requests, in_use.pending), (0, 0));
    assert_eq!(in_use.rejected_pending, 2);
}

#[tokio::test]
async fn without_a_queue_requests_are_refused_at_once() {
    let backend = backend(&cell(infos(&[1])), limited(0, 1, 0));
    let balancer = Balancer::<()>::new(backend.clone());
    let running = balancer.request_permit().await.unwrap();
    let refused = balancer.request_permit().await.err();
    assert_eq!(refused, Some(LimitReached::Requests));
    drop(running);
    drop(balancer.request_permit().await.unwrap());
    assert_eq!(backend.limits.in_use().rejected_requests, 1);
}

#[tokio::test]
async fn who_leaves_the_queue_leaves_the_place_to_the_next() {
    let backend = backend(&cell(infos(&[1])), limited(0, 1, 5));
    let balancer = Balancer::<()>::new(backend.clone());
    let running = balancer.request_permit().await.unwrap();
    let mut first = Box::pin(balancer.request_permit());
    let mut second = Box::pin(balancer.request_permit());
    assert!(poll!(&mut first).is_pending());
    assert!(poll!(&mut second).is_pending());
    // Its turn has come, and it goes away without taking it.
    drop(running);
    drop(first);
    assert!(poll!(&mut second).is_ready());
    // The same with nobody behind: the place is free.
    let running = balancer.request_permit().await.unwrap();
    let mut only = Box::pin(balancer.request_permit());
    assert!(poll!(&mut only).is_pending());
    drop(running);
    drop(only);
    assert_eq!(backend.limits.in_use().requests, 0);
    assert!(balancer.request_permit().now_or_never().is_some());
    assert_eq!(backend.limits.in_use().requests, 0);
}

#[tokio::test]
async fn a_changed_limit_holds_for_those_who_wait() {
    let old = backend(&cell(infos(&[1])), limited(0, 1, 5));
    let balancer = Balancer::<()>::new(old.clone());
    let _running = balancer.request_permit().await.unwrap();
    let mut waiting = std::pin::pin!(balancer.request_permit());
    assert!(poll!(&mut waiting).is_pending());
    let recompiled = |policy| {
        Arc::new(Backend {
            limits: old.limits.clone(),
            ..Arc::into_inner(backend(&old.endpoints, policy)).unwrap()
        })
    };
    let raised = balancer.replace(recompiled(limited(0, 2, 5)));
    let Poll::Ready(Ok(second)) = poll!(&mut waiting) else {
        panic!("there is room now")
    };
    // Lowered again: what runs goes on, and is above the limit until enough has ended.
    let lowered = raised.replace(recompiled(limited(0, 1, 5)));
    let mut waiting = std::pin::pin!(lowered.request_permit());
    assert!(poll!(&mut waiting).is_pending());
    drop(second);
    assert!(poll!(&mut waiting).is_pending());
    // Taken away altogether.
    let _free = lowered.replace(recompiled(limited(0, 0, 0)));
    assert!(poll!(&mut waiting).is_ready());
}

#[tokio::test]
async fn wake_ups_that_fold_into_one_reach_everybody() {
    let backend = backend(&cell(infos(&[1])), limited(0, 3, 5));
    let balancer = Balancer::<()>::new(backend.clone());
    let mut running = Vec::new();
    for _ in 0..3 {
        running.push(balancer.request_permit().await.unwrap());
    }
    let mut first = std::pin::pin!(balancer.request_permit());
    let mut second = std::pin::pin!(balancer.request_permit());
    let mut third = std::pin::pin!(balancer.request_permit());
    assert!(poll!(&mut first).is_pending());
    // One is woken; for the other two places nobody is there to be woken yet.
    running.clear();
    let second = poll!(&mut second);
    let third = poll!(&mut third);
    assert!(second.is_ready() && third.is_ready());
    assert!(poll!(&mut first).is_ready());
}

/// Does both at the same moment on two threads, thousands of times, a little shifted each time.
fn race<A: Send + 'static, B>(
    prepare: impl Fn(&Arc<SharedLimits>) -> (A, B),
    there: impl Fn(A) + Send + 'static,
    here: impl Fn(B),
) {
    const ROUNDS: u32 = 20_000;
    let spin_until = |reached: &dyn Fn() -> bool| {
        for turn in 0u32.. {
            if reached() {
                break;
            }
            std::hint::spin_loop();
            if turn % 1000 == 999 {
                std::thread::yield_now();
            }
        }
    };
    let slot = Arc::new(std::sync::Mutex::new(None::<A>));
    let [given, begun, done] = [(); 3].map(|()| Arc::new(AtomicU32::new(0)));
    let thread = std::thread::spawn({
        let (slot, given, begun, done) = (slot.clone(), given.clone(), begun.clone(), done.clone());
        move || {
            for round in 1..=ROUNDS {
                spin_until(&|| given.load(Ordering::SeqCst) == round);
                let mine = slot.lock().unwrap().take().expect("given");
                begun.store(round, Ordering::SeqCst);
                for _ in 0..round / 32 % 64 {
                    std::hint::spin_loop();
                }
                there(mine);
                done.store(round, Ordering::SeqCst);
            }
        }
    });
    for round in 1..=ROUNDS {
        let limits = Arc::new(SharedLimits::default());
        limits.set_max_requests(1);
        let (a, b) = prepare(&limits);
        *slot.lock().unwrap() = Some(a);
        given.store(round, Ordering::SeqCst);
        spin_until(&|| begun.load(Ordering::SeqCst) == round);
        for _ in 0..round % 32 {
            std::hint::spin_loop();
        }
        here(b);
        spin_until(&|| done.load(Ordering::SeqCst) == round);
        assert_eq!(limits.in_use(), LimitsInUse::default(), "round {round}");
    }
    thread.join().unwrap();
}

/// The only place in flight.
fn taken(limits: &Arc<SharedLimits>) -> RequestPermit {
    limits.request(1, 5).now_or_never().unwrap().unwrap()
}

#[test]
fn a_place_given_back_while_somebody_joins_the_queue_is_found() {
    let prepare = |limits: &Arc<SharedLimits>| (taken(limits), limits.clone());
    race(prepare, drop, |limits| {
        let mut joining = std::pin::pin!(limits.request(1, 5));
        // Only woken is it polled again.
        let woken = Arc::new(Flag::default());
        let waker = std::task::Waker::from(woken.clone());
        let mut context = std::task::Context::from_waker(&waker);
        while joining.as_mut().poll(&mut context).is_pending() {
            let start = std::time::Instant::now();
            while !woken.0.swap(false, Ordering::SeqCst) {
                assert!(start.elapsed() < 20 * SECOND, "forgotten");
                std::thread::yield_now();
            }
        }
    });
}

#[test]
fn a_place_given_back_while_the_queue_empties_is_free() {
    let prepare = |limits: &Arc<SharedLimits>| {
        let permit = taken(limits);
        let limits = limits.clone();
        let mut waiting = Box::pin(async move { limits.request(1, 5).await.map(drop) });
        assert!((&mut waiting).now_or_never().is_none());
        (permit, waiting)
    };
    race(prepare, drop, drop);
}

/// A waker that remembers that it was called.
#[derive(Default)]
struct Flag(AtomicBool);

impl std::task::Wake for Flag {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// Four workers, more requests than places: never more at once than allowed, nobody is forgotten,
/// and in the end everything is given back.
#[test]
fn workers_share_the_places_without_losing_any() {
    let limits = Arc::new(SharedLimits::default());
    limits.set_max_requests(3);
    let at_once = AtomicU32::new(0);
    std::thread::scope(|scope| {
        for worker in 0..4u32 {
            let (limits, at_once) = (&limits, &at_once);
            scope.spawn(move || {
                let runtime = tokio::runtime::Builder::new_current_thread()
                    .build()
                    .unwrap();
                let tasks = (0..8u32).map(|task| async move {
                    for round in 0..400 {
                        let mut permit = Box::pin(limits.request(3, 1000));
                        let permit = match poll!(&mut permit) {
                            Poll::Ready(permit) => permit,
                            // Some give up: while they wait, or just when their turn comes.
                            Poll::Pending if (round + task + worker) % 5 == 0 => {
                                tokio::task::yield_now().await;
                                continue;
                            }
                            Poll::Pending => permit.await,
                        };
                        let permit = permit.expect("the queue is long enough");
                        assert!(at_once.fetch_add(1, Ordering::SeqCst) < 3);
                        tokio::task::yield_now().await;
                        at_once.fetch_sub(1, Ordering::SeqCst);
                        drop(permit);
                    }
                });
                runtime.block_on(futures_util::future::join_all(tasks));
            });
        }
    });
    assert_eq!(limits.in_use(), LimitsInUse::default());
}
