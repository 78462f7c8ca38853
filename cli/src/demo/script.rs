//! What is done to the shop, when, and what is measured about it. Times are written for a demo of
//! sixty seconds and stretched or shrunk to its length.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use serde_json::json;

use super::board::{Act, Expectation, Shared, expect};
use super::figures::Figures;
use super::stage::Stage;
use super::topology::{MEMBERS, Member, find};
use crate::admin::Admin;
use crate::apps::knobs::Order;
use crate::output::{count, span};

/// Length the times below are written for, seconds.
const WRITTEN_FOR: f64 = 60.0;
/// Added to every answer of the slow endpoint, milliseconds.
const SLOW_MS: u64 = 400;
/// A share of the requests that is small enough for a slow endpoint in any case, percent.
const NEXT_TO_NONE: f64 = 5.0;
/// File of the manifests that says PERMISSIVE or STRICT.
pub const MTLS_FILE: &str = "mtls.yaml";

/// Carries the script out.
pub struct Director<'a> {
    pub stage: &'a mut Stage,
    pub board: Shared,
    /// Length of the demo, seconds.
    pub total: f64,
    pub manifests: PathBuf,
}

impl Director<'_> {
    /// The whole story.
    pub async fn play(&mut self) -> anyhow::Result<()> {
        self.until(8.0).await;
        self.slow_endpoint().await?;
        self.until(16.0).await;
        self.failing_endpoint().await?;
        self.until(26.0).await;
        self.killed_endpoint().await?;
        self.until(36.5).await;
        self.killed_control_plane().await?;
        self.until(46.0).await;
        self.renewed_certificates().await?;
        self.until(52.0).await;
        self.policy_changed().await?;
        self.until(WRITTEN_FOR).await;
        Ok(())
    }

    /// The moment the script calls `at`, in seconds since the beginning.
    fn moment(&self, at: f64) -> f64 {
        at * self.total / WRITTEN_FOR
    }

    /// Waits for it.
    async fn until(&self, at: f64) {
        let left = self.moment(at) - self.board.lock().now();
        if left > 0.0 {
            tokio::time::sleep(Duration::from_secs_f64(left)).await;
        }
    }

    /// Waits until `found` finds something, at most until the script's `latest`.
    async fn wait_for<T>(&self, latest: f64, found: impl Fn(&Self) -> Option<T>) -> Option<T> {
        let deadline = self.moment(latest);
        loop {
            if let Some(value) = found(self) {
                return Some(value);
            }
            if self.board.lock().now() >= deadline {
                return None;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    fn now(&self) -> f64 {
        self.board.lock().now()
    }

    fn begin(&self, name: &'static str, did: impl Into<String>) -> f64 {
        let mut board = self.board.lock();
        let began = board.now();
        board.acts.push(Act {
            name,
            began,
            did: did.into(),
            ..Act::default()
        });
        began
    }

    fn end(&self, saw: String, figures: serde_json::Value, expected: Vec<Expectation>) {
        let mut board = self.board.lock();
        let now = board.now();
        if let Some(act) = board.acts.last_mut() {
            act.ended = Some(now);
            act.saw = saw;
            act.figures = figures;
            act.expected = expected;
        }
    }

    async fn slow_endpoint(&mut self) -> anyhow::Result<()> {
        let began = self.begin(
            "slow endpoint",
            format!("catalog-2 takes {SLOW_MS} ms longer for every answer."),
        );
        let slow = Order::Latency { ms: SLOW_MS };
        self.stage.order("catalog-2", slow).await?;
        self.until(14.0).await;
        let ended = self.now();
        self.stage.order("catalog-2", Order::Well).await?;
        // What was due until now has ended after a moment.
        tokio::time::sleep(Duration::from_millis(200)).await;

        let board = self.board.lock();
        let (calm, during) = (board.figures(0.0, began), board.figures(began, ended));
        let middle = f64::midpoint(began, ended);
        let share = |from, to| {
            let share = board.share("catalog", "catalog-2", from, to);
            share.unwrap_or_default()
        };
        let (before, after) = (share(0.0, began), share(middle, ended));
        drop(board);
        let saw = format!(
            "Its share of the catalog's requests went from {before:.0} % to {after:.1} %: the \
             balancer prefers endpoints that answer soon. p99 was {:.0} ms ({:.0} ms before), p50 \
             {:.1} ms ({:.1} ms before). {}.",
            during.p99,
            calm.p99,
            during.p50,
            calm.p50,
            failed(&during),
        );
        let expected = vec![
            // One that was slow before, too, may have had next to none.
            expect(
                after < (before / 2.0).max(NEXT_TO_NONE),
                "the slow endpoint's share falls below half",
            ),
            expect(during.failed == 0, "no request fails"),
        ];
        let figures = json!({
            "shareBefore": before, "shareAfter": after, "before": calm, "during": during,
        });
        self.end(saw, figures, expected);
        Ok(())
    }

    async fn failing_endpoint(&mut self) -> anyhow::Result<()> {
        let began = self.begin("failing endpoint", "catalog-3 answers everything with 500.");
        let (retries, tried) = {
            let board = self.board.lock();
            let front = board.front.last();
            (
                front.map_or(0, |(_, v)| v.retries),
                front.map_or(0, |(_, v)| v.sent_to("catalog", "catalog-3")),
            )
        };
        let fail = Order::Fail {
            status: 500,
            percent: 100,
        };
        self.stage.order("catalog-3", fail).await?;
        // It has to be asked five times in a row first, however short the demo and slow the machine.
        let latest = f64::max(19.0, self.script_time(began + 5.0));
        let ejected = self
            .wait_for(latest, |d| {
                let board = d.board.lock();
                board.first(began, |v| v.is_ejected("catalog", "catalog-3"))
            })
            .await;
        self.until(19.0).await;
        let tries = self
            .board
            .lock()
            .front
            .last()
            .map_or(0, |(_, v)| v.sent_to("catalog", "catalog-3"))
            .saturating_sub(tried);
        let well = self.now();
        self.stage.order("catalog-3", Order::Well).await?;
        let back = match ejected {
            Some(_) => self.comes_back("catalog", "catalog-3", well, 25.5).await,
            None => None,
        };
        let ended = self.now();
        tokio::time::sleep(Duration::from_millis(200)).await;

        let board = self.board.lock();
        let during = board.figures(began, ended);
        let retried = board
            .front
            .last()
            .map_or(0, |(_, v)| v.retries)
            .saturating_sub(retries);
        drop(board);
        let mut saw = match ejected {
            Some(at) => format!(
                "Ejected {} after it began; {tries} tries reached it, probes included.",
                span(at - began)
            ),
            None => "It was not ejected.".to_owned(),
        };
        saw.push_str(&format!(
            " {}; {} tried again elsewhere.",
            failed(&during),
            were(retried),
        ));
        if let Some(back) = back {
            saw.push_str(&format!(
                " Well again from {well:.1} s, back in at {back:.1} s."
            ));
        }
        let expected = vec![
            expect(ejected.is_some(), "the failing endpoint is ejected"),
            expect(during.success >= 99.0, "99 % of the requests succeed"),
        ];
        let figures = json!({
            "ejectedAfter": ejected.map(|at| at - began), "tries": tries, "retries": retried,
            "wellAgain": well, "backAt": back, "during": during,
        });
        self.end(saw, figures, expected);
        Ok(())
    }

    /// When requests reach `workload` again, after `from`.
    async fn comes_back(
        &self,
        service: &str,
        workload: &str,
        from: f64,
        latest: f64,
    ) -> Option<f64> {
        let base = self
            .board
            .lock()
            .front_at(from)
            .map_or(0, |v| v.sent_to(service, workload));
        self.wait_for(latest, |d| {
            let board = d.board.lock();
            // One request is the probe; a few are its share again.
            board.first(from, |v| v.sent_to(service, workload) > base + 2)
        })
        .await
    }

    async fn killed_endpoint(&mut self) -> anyhow::Result<()> {
        let killed = member("pricing-2")?;
        let began = self.begin(
            "killed endpoint",
            "pricing-2 and its proxy are killed (SIGKILL), with gRPC streams open.",
        );
        let retries = self.front_retries();
        self.stage.kill_member(killed.name).await?;
        self.until(30.0).await;
        let restarted = self.now();
        self.stage.start_member(killed)?;
        let back = self
            .comes_back("pricing", killed.name, restarted, 36.0)
            .await;
        let ended = self.now();
        tokio::time::sleep(Duration::from_millis(200)).await;

        let board = self.board.lock();
        let during = board.figures(began, ended);
        let last = board
            .reports
            .failures(board.epoch(began), board.epoch(ended))
            .last()
            .map(|r| (r.at - board.epoch(began)) / 1e3);
        drop(board);
        let retried = self.front_retries().saturating_sub(retries);
        let mut saw = format!(
            "{}{}; {} tried again on pricing-1.",
            failed(&during),
            last.map(|at| format!(" (the last one after {})", span(at)))
                .unwrap_or_default(),
            were(retried),
        );
        if let Some(back) = back {
            saw.push_str(&format!(
                " Started again at {restarted:.1} s, taking requests at {back:.1} s."
            ));
        }
        let expected = vec![expect(
            during.success >= 99.0,
            "99 % of the requests succeed",
        )];
        let figures = json!({
            "retries": retried, "restartedAt": restarted, "backAt": back, "during": during,
        });
        self.end(saw, figures, expected);
        Ok(())
    }

    fn front_retries(&self) -> u64 {
        let board = self.board.lock();
        board.front.last().map_or(0, |(_, v)| v.retries)
    }

    async fn killed_control_plane(&mut self) -> anyhow::Result<()> {
        let began = self.begin(
            "killed control plane",
            "The control plane is killed (SIGKILL).",
        );
        self.stage.kill_control_plane().await?;
        self.board.lock().control.up = false;
        self.until(42.0).await;
        let outage = self.now() - began;
        self.stage.start_control_plane()?;
        let restarted = self.now();
        self.stage.wait_for_control_plane().await?;
        // They try again after a random while, however long the demo is.
        let latest = f64::max(45.5, self.script_time(restarted + 6.0));
        let again = self
            .wait_for(latest, |d| {
                let board = d.board.lock();
                let all = board.control.up && board.control.connected == MEMBERS.len();
                all.then(|| board.now())
            })
            .await;
        let ended = self.now();
        tokio::time::sleep(Duration::from_millis(200)).await;
        let during = self.board.lock().figures(began, ended);
        let mut saw = format!(
            "For {} the proxies went on with the tables and certificates they had. {}.",
            span(outage),
            failed(&during)
        );
        match again {
            Some(at) => saw.push_str(&format!(
                " All {} proxies were connected again {} after its restart.",
                MEMBERS.len(),
                span(at - restarted)
            )),
            None => saw.push_str(" Not all proxies have found it again."),
        }
        let expected = vec![
            expect(during.failed == 0, "the outage costs no request"),
            expect(again.is_some(), "all proxies connect again"),
        ];
        let figures = json!({
            "outage": outage, "reconnectedAfter": again.map(|at| at - restarted), "during": during,
        });
        self.end(saw, figures, expected);
        Ok(())
    }

    async fn renewed_certificates(&mut self) -> anyhow::Result<()> {
        let began = self.begin(
            "certificates renewed",
            "The mesh's root certificate begins to be replaced: a second root is trusted beside the \
             first, and signs when every proxy knows it.",
        );
        let expiries = |d: &Self| -> Vec<u64> {
            let board = d.board.lock();
            let expiry = |m: &Member| {
                board
                    .proxies
                    .get(m.name)
                    .map_or(0, |p| p.certificate_expires)
            };
            MEMBERS.iter().map(expiry).collect()
        };
        let before = expiries(self);
        let renewed = |d: &Self| {
            let now = expiries(d);
            now.iter()
                .zip(&before)
                .filter(|(now, old)| now != old)
                .count()
        };
        Admin::new(&Stage::control_admin())?
            .post("/rotate-root")
            .await?;
        // The second root is made known for five seconds, and then the proxies spread their requests
        // over three, however long the demo is.
        let latest = f64::max(52.0, self.script_time(began + 14.0));
        let all = self
            .wait_for(latest, |d| (renewed(d) == MEMBERS.len()).then(|| d.now()))
            .await;
        let count = renewed(self);
        let ended = self.now();
        tokio::time::sleep(Duration::from_millis(200)).await;
        let during = self.board.lock().figures(began, ended);
        let saw = format!(
            "{count} of {} proxies fetched new certificates{}. {}.",
            MEMBERS.len(),
            all.map(|at| format!(" within {}", span(at - began)))
                .unwrap_or_default(),
            failed(&during)
        );
        let expected = vec![
            expect(all.is_some(), "every proxy renews its certificate"),
            expect(during.failed == 0, "renewal costs no request"),
        ];
        let figures = json!({
            "renewed": count, "within": all.map(|at| at - began), "during": during,
        });
        self.end(saw, figures, expected);
        Ok(())
    }

    /// What the script calls a moment in seconds since the beginning.
    fn script_time(&self, seconds: f64) -> f64 {
        seconds * WRITTEN_FOR / self.total
    }

    async fn policy_changed(&mut self) -> anyhow::Result<()> {
        let path = self.manifests.join(MTLS_FILE);
        let old = std::fs::read_to_string(&path)
            .with_context(|| format!("cannot read {}", path.display()))?;
        let new = old.replace("mode: PERMISSIVE", "mode: STRICT");
        let began = self.begin(
            "policy changed",
            format!("{MTLS_FILE} now says STRICT. Somebody outside the mesh asks catalog-1 in plaintext."),
        );
        if new == old {
            self.end(
                format!("Nothing: {MTLS_FILE} does not say PERMISSIVE."),
                json!({}),
                vec![],
            );
            return Ok(());
        }
        let before = outsider().await;
        let edited = self.now();
        replace(&path, &new)?;
        let latest = self.moment(57.0).max(edited + 3.0);
        let refused = loop {
            if !outsider().await {
                break Some(self.now());
            }
            if self.now() > latest {
                break None;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        };
        tokio::time::sleep(Duration::from_millis(700)).await;
        let ended = self.now();
        let board = self.board.lock();
        let during = board.figures(began, ended - 0.2);
        drop(board);
        let mut saw = match (before, refused) {
            (true, Some(at)) => format!(
                "Answered until then, refused {} after the file was saved.",
                span(at - edited)
            ),
            (false, _) => "The outsider was refused before the change already.".to_owned(),
            (_, None) => "The outsider is still answered.".to_owned(),
        };
        saw.push_str(&format!(" {} inside the mesh.", failed(&during)));
        let expected = vec![
            expect(before, "PERMISSIVE takes plaintext"),
            expect(refused.is_some(), "STRICT refuses plaintext"),
            expect(during.failed == 0, "no request of the mesh fails"),
        ];
        let figures = json!({
            "refusedAfter": refused.map(|at| at - edited), "during": during,
        });
        self.end(saw, figures, expected);
        Ok(())
    }
}

/// Whether a plaintext request from outside the mesh is answered by catalog-1.
async fn outsider() -> bool {
    let Some((address, port)) = find("catalog-1").and_then(|m| Some((m.address, m.port?))) else {
        return false;
    };
    let Ok(catalog) = Admin::new(&format!("{address}:{port}")) else {
        return false;
    };
    catalog.text("/items/1").await.is_ok()
}

fn member(name: &str) -> anyhow::Result<&'static Member> {
    find(name).with_context(|| format!("there is no {name} in the demo"))
}

/// Replaces a file in one step, so that nobody reads half of it.
pub fn replace(path: &std::path::Path, contents: &str) -> anyhow::Result<()> {
    // A name without the ending of a manifest, which a watcher leaves alone.
    let new = path.with_extension("new");
    std::fs::write(&new, contents)
        .and_then(|()| std::fs::rename(&new, path))
        .with_context(|| format!("cannot write {}", path.display()))
}

/// "3 of 2,412 requests failed", as the beginning of a sentence.
fn failed(during: &Figures) -> String {
    let requests = count(during.requests);
    match during.failed {
        0 => format!("None of {requests} requests failed"),
        n => format!("{} of {requests} requests failed", count(n)),
    }
}

fn were(n: u64) -> String {
    match n {
        0 => "none was".to_owned(),
        1 => "1 was".to_owned(),
        n => format!("{} were", count(usize::try_from(n).unwrap_or(usize::MAX))),
    }
}
