//! The tasks in which streams are served.

use tokio::sync::Notify;

use super::*;

#[tokio::test]
async fn streams_are_served_by_the_tasks_of_those_before() {
    local(async {
        let (go, arrived) = (Rc::new(Notify::new()), Rc::new(Cell::new(0)));
        let all = Rc::new(Notify::new());
        let at_server = (go.clone(), arrived.clone(), all.clone());
        let (address, _) = server(move |_, respond| {
            let (go, arrived, all) = at_server.clone();
            async move {
                arrived.set(arrived.get() + 1);
                if arrived.get() % 3 == 0 {
                    all.notify_one();
                }
                go.notified().await;
                ok(respond, "done");
            }
        })
        .await;
        let worker = worker(None);
        let mut client = client_of(&worker, to(address)).await;
        // Three at once, twice: as many tasks as there are streams at once.
        for _ in 0..2 {
            let asked: Vec<_> = (0..3)
                .map(|_| client.send_request(get("/"), true).unwrap().0)
                .collect();
            all.notified().await;
            assert_eq!(worker.crew.waiting(), 0, "all of them have work");
            go.notify_waiters();
            for answer in asked {
                let (_, mut body) = answer.await.unwrap().into_parts();
                assert_eq!(read(&mut body).await.unwrap().0, "done");
            }
            while worker.crew.waiting() < 3 {
                tokio::task::yield_now().await;
            }
            assert_eq!(worker.crew.waiting(), 3);
        }
        // What was in use since the last sweep stays; what was not goes.
        worker.crew.sweep();
        assert_eq!(worker.crew.waiting(), 3);
        let asked = client.send_request(get("/"), true).unwrap().0;
        while worker.crew.waiting() == 3 {
            tokio::task::yield_now().await;
        }
        go.notify_one();
        drop(asked.await.unwrap());
        while worker.crew.waiting() < 3 {
            tokio::task::yield_now().await;
        }
        worker.crew.sweep();
        assert_eq!(worker.crew.waiting(), 1);
        worker.crew.sweep();
        assert_eq!(worker.crew.waiting(), 0);
    })
    .await;
}
