//! Medians, ratios to Envoy in the same round, and whether the targets are met.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use serde::Serialize;

use crate::measure::{CASES, Figures, IdleConnections, Memory};
use crate::process::Placement;

/// The pair that ratios are taken to.
pub const ENVOY: &str = "envoy";
/// The same with a single endpoint: nothing to balance, and all in one connection.
pub const ENVOY_ONE: &str = "envoy, one endpoint";
/// The pair that the targets are about.
pub const WEFT: &str = "weft";
/// The same with a single endpoint.
pub const WEFT_ONE: &str = "weft, one endpoint";
/// Our pair without shared connections between the proxies.
pub const WEFT_OWN: &str = "weft, a connection each";

/// What targets are compared on: what a target's name ends with, our pair and Envoy's. The last is
/// to Envoy's advantage: it has nothing to balance.
const COMPARED: [(&str, &str, &str); 3] = [
    ("", WEFT, ENVOY),
    (", one endpoint", WEFT_ONE, ENVOY_ONE),
    (", ten endpoints to Envoy's one", WEFT, ENVOY_ONE),
];

/// Everything that was measured.
#[derive(Debug, Serialize)]
pub struct Report {
    pub cores: usize,
    pub placement: Placement,
    pub seconds_per_run: f64,
    pub rounds: usize,
    /// Candidates in the order of measurement.
    pub candidates: Vec<&'static str>,
    /// Case, candidate, a figure for each round.
    pub cases: BTreeMap<&'static str, BTreeMap<&'static str, Vec<Figures>>>,
    /// Case, candidate: system calls per request of the outbound and the inbound proxy.
    pub syscalls: BTreeMap<&'static str, BTreeMap<&'static str, (f64, f64)>>,
    pub memory: BTreeMap<&'static str, MemoryFigures>,
    pub targets: Vec<Target>,
}

/// Memory of one pair, each part measured on a pair freshly started.
#[derive(Debug, Default, Serialize)]
pub struct MemoryFigures {
    pub idle: Option<Memory>,
    pub at_256_connections: Option<Memory>,
    pub unused_services: Option<UnusedServices>,
    pub idle_http1: Option<IdleConnections>,
    pub idle_tcp: Option<IdleConnections>,
}

/// Memory of an idle pair without, and with services that are known and not called.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct UnusedServices {
    pub count: usize,
    pub without: Memory,
    pub with: Memory,
}

/// A figure with a bound.
#[derive(Debug, Serialize)]
pub struct Target {
    pub name: String,
    pub bound: f64,
    /// The figure must not be below the bound (else: not above).
    pub at_least: bool,
    pub unit: &'static str,
    /// `None`: not measured in this run.
    pub measured: Option<f64>,
}

impl Target {
    fn at_most(
        name: impl Into<String>,
        bound: f64,
        unit: &'static str,
        measured: Option<f64>,
    ) -> Self {
        Self {
            name: name.into(),
            bound,
            at_least: false,
            unit,
            measured,
        }
    }

    fn met(&self) -> Option<bool> {
        self.measured.map(|m| {
            if self.at_least {
                m >= self.bound
            } else {
                m <= self.bound
            }
        })
    }
}

impl Report {
    /// Compares what was measured with the targets.
    pub fn judge(&mut self) {
        let cpu = |figures: &Figures| figures.cpu_sum_us();
        let rate = |figures: &Figures| Some(figures.requests_per_second);
        let p99 = |figures: &Figures| Some(figures.p99_us);
        let most = |m: &Memory| m.out_kib.max(m.in_kib) as f64 / 1024.0;
        let weft = self.memory.get(WEFT);
        let idle = weft.and_then(|m| m.idle);
        let per_service = weft.and_then(|m| m.unused_services).map(|m| {
            let more = m.with.out_kib.saturating_sub(m.without.out_kib);
            more as f64 / m.count as f64
        });
        let of_connections =
            |c: Option<IdleConnections>| c.map(|c| f64::max(c.out_kib_each, c.in_kib_each));
        let mut targets = Vec::new();
        for (pairs, weft, envoy) in COMPARED {
            let mut compare = |what, bound, case, figure: &dyn Fn(&Figures) -> Option<f64>| {
                targets.push(Target::at_most(
                    format!("{what}{pairs}"),
                    bound,
                    "x Envoy",
                    self.ratio(case, weft, envoy, figure),
                ));
            };
            compare("HTTP/1.1, CPU per request", 0.30, "http1-c32", &cpu);
            compare("TCP, CPU per request", 0.55, "tcp-c32", &cpu);
            compare("HTTP/2, CPU per request", 0.60, "http2", &cpu);
            compare("gRPC, CPU per request", 0.60, "grpc", &cpu);
            compare("HTTP/1.1, p99 at 32 connections", 0.5, "http1-c32", &p99);
            let rate = self.ratio("http1-c32", weft, envoy, &rate);
            let name = format!("HTTP/1.1, requests/s at 32 connections{pairs}");
            targets.push(Target {
                at_least: true,
                ..Target::at_most(name, 2.5, "x Envoy", rate)
            });
        }
        targets.extend([
            Target::at_most(
                "New mTLS connection, CPU",
                0.85,
                "x Envoy",
                self.ratio("connect", WEFT_OWN, ENVOY, &cpu),
            ),
            Target::at_most(
                "1,000 rules, CPU beyond that of one",
                2.0,
                "µs",
                self.more_than_one_rule("rules-1000", WEFT),
            ),
            Target::at_most("Memory, idle", 8.0, "MiB", idle.as_ref().map(most)),
            Target::at_most(
                "Memory, 256 connections",
                20.0,
                "MiB",
                weft.and_then(|m| m.at_256_connections.as_ref()).map(most),
            ),
            Target::at_most(
                "Memory, each known but unused service",
                0.1,
                "KiB",
                per_service,
            ),
            Target::at_most(
                "Memory, each idle HTTP/1.1 connection",
                20.0,
                "KiB",
                of_connections(weft.and_then(|m| m.idle_http1)),
            ),
            Target::at_most(
                "Memory, each idle TCP connection",
                20.0,
                "KiB",
                of_connections(weft.and_then(|m| m.idle_tcp)),
            ),
        ]);
        self.targets = targets;
    }

    /// Median of the rounds' ratios of one candidate's figure to another's.
    fn ratio(
        &self,
        case: &str,
        of: &str,
        to: &str,
        figure: &dyn Fn(&Figures) -> Option<f64>,
    ) -> Option<f64> {
        let case = self.cases.get(case)?;
        let ratios = case
            .get(of)?
            .iter()
            .zip(case.get(to)?)
            .filter_map(|(a, b)| Some(figure(a)? / figure(b)?))
            .collect();
        median(ratios)
    }

    /// The report as tables in Markdown.
    pub fn table(&self) -> String {
        let mut out = String::new();
        // Writing to a string does not fail.
        let _ = self.write(&mut out);
        out
    }

    fn write(&self, out: &mut String) -> std::fmt::Result {
        writeln!(
            out,
            "{} cores, placement {:?}, {} rounds of {} s; medians.\n",
            self.cores, self.placement, self.rounds, self.seconds_per_run
        )?;
        writeln!(
            out,
            "| | | requests/s | p50 ms | p99 ms | p99.9 ms | CPU µs/request out + in | x Envoy | system calls/request out + in | errors |\n|---|---|---|---|---|---|---|---|---|---|"
        )?;
        for case in CASES {
            let Some(candidates) = self.cases.get(case.name) else {
                continue;
            };
            for name in &self.candidates {
                let Some(rounds) = candidates.get(name) else {
                    continue;
                };
                let peer = match *name {
                    WEFT_ONE | ENVOY_ONE => ENVOY_ONE,
                    _ => ENVOY,
                };
                let of = |figure: &dyn Fn(&Figures) -> Option<f64>| {
                    median(rounds.iter().filter_map(figure).collect())
                };
                let number = |value: Option<f64>, digits: usize| {
                    value.map_or("–".to_owned(), |v| format!("{v:.digits$}"))
                };
                let pair = |value: Option<(f64, f64)>| {
                    value.map_or("–".to_owned(), |(a, b)| format!("{a:.1} + {b:.1}"))
                };
                let cpu = of(&|f| f.cpu_us.map(|c| c.0)).zip(of(&|f| f.cpu_us.map(|c| c.1)));
                let syscalls = self
                    .syscalls
                    .get(case.name)
                    .and_then(|s| s.get(name))
                    .copied();
                writeln!(
                    out,
                    "| {} | {name} | {} | {} | {} | {} | {} | {} | {} | {} |",
                    case.about,
                    number(of(&|f| Some(f.requests_per_second)), 0),
                    number(of(&|f| Some(f.p50_us / 1000.0)), 3),
                    number(of(&|f| Some(f.p99_us / 1000.0)), 3),
                    number(of(&|f| Some(f.p999_us / 1000.0)), 3),
                    pair(cpu),
                    number(self.ratio(case.name, name, peer, &Figures::cpu_sum_us), 2),
                    pair(syscalls),
                    rounds.iter().map(|f| f.errors).sum::<u64>(),
                )?;
            }
        }
        self.write_policies(out)?;
        self.write_memory(out)?;
        self.write_targets(out)
    }

    /// What policies add to a request, on either side.
    fn write_policies(&self, out: &mut String) -> std::fmt::Result {
        let cases = || {
            CASES
                .iter()
                .filter(|case| case.feature.is_some() && self.cases.contains_key(case.name))
        };
        if cases().next().is_none() {
            return Ok(());
        }
        writeln!(
            out,
            "\n| Policy | weft, CPU µs/request | envoy, CPU µs/request | x Envoy | weft, more than one rule | envoy, more than one rule |\n|---|---|---|---|---|---|"
        )?;
        let number = |value: Option<f64>, digits: usize| {
            value.map_or("–".to_owned(), |v| format!("{v:.digits$}"))
        };
        for case in cases() {
            let cpu = |name| {
                let rounds = self.cases.get(case.name)?.get(name)?;
                median(rounds.iter().filter_map(Figures::cpu_sum_us).collect())
            };
            writeln!(
                out,
                "| {} | {} | {} | {} | {} | {} |",
                case.about,
                number(cpu(WEFT), 1),
                number(cpu(ENVOY), 1),
                number(self.ratio(case.name, WEFT, ENVOY, &Figures::cpu_sum_us), 2),
                number(self.more_than_one_rule(case.name, WEFT), 1),
                number(self.more_than_one_rule(case.name, ENVOY), 1),
            )?;
        }
        Ok(())
    }

    /// CPU of a request beyond that of one under a single rule, microseconds: the median of the
    /// rounds' differences.
    fn more_than_one_rule(&self, case: &str, of: &str) -> Option<f64> {
        let of_case = |case: &str| self.cases.get(case)?.get(of);
        let (these, one) = (of_case(case)?, of_case("rules-1")?);
        let differences = these
            .iter()
            .zip(one)
            .filter_map(|(a, b)| Some(a.cpu_sum_us()? - b.cpu_sum_us()?))
            .collect();
        median(differences)
    }

    fn write_memory(&self, out: &mut String) -> std::fmt::Result {
        if self.memory.is_empty() {
            return Ok(());
        }
        writeln!(
            out,
            "\n| Memory, out / in | idle | 256 connections | unused services | each idle HTTP/1.1 connection | each idle TCP connection |\n|---|---|---|---|---|---|"
        )?;
        let mib = |m: Option<Memory>| {
            m.map_or("–".to_owned(), |m| {
                format!(
                    "{:.1} / {:.1} MiB",
                    m.out_kib as f64 / 1024.0,
                    m.in_kib as f64 / 1024.0
                )
            })
        };
        let each = |c: Option<IdleConnections>| {
            c.map_or("–".to_owned(), |c| {
                format!(
                    "{:.1} / {:.1} KiB ({})",
                    c.out_kib_each, c.in_kib_each, c.count
                )
            })
        };
        for (name, m) in &self.memory {
            let unused = m.unused_services.map_or("–".to_owned(), |m| {
                let more = |with: u64, without: u64| with as i64 - without as i64;
                format!(
                    "{:+} / {:+} KiB ({})",
                    more(m.with.out_kib, m.without.out_kib),
                    more(m.with.in_kib, m.without.in_kib),
                    m.count
                )
            });
            writeln!(
                out,
                "| {name} | {} | {} | {unused} | {} | {} |",
                mib(m.idle),
                mib(m.at_256_connections),
                each(m.idle_http1),
                each(m.idle_tcp)
            )?;
        }
        Ok(())
    }

    fn write_targets(&self, out: &mut String) -> std::fmt::Result {
        if self.targets.iter().all(|t| t.measured.is_none()) {
            return Ok(());
        }
        writeln!(out, "\n| Target | bound | measured | |\n|---|---|---|---|")?;
        for target in &self.targets {
            let sign = if target.at_least { "≥" } else { "≤" };
            writeln!(
                out,
                "| {} | {sign} {} {} | {} | {} |",
                target.name,
                target.bound,
                target.unit,
                target
                    .measured
                    .map_or("–".to_owned(), |m| format!("{m:.2}")),
                match target.met() {
                    Some(true) => "met",
                    Some(false) => "**missed**",
                    None => "not measured",
                }
            )?;
        }
        Ok(())
    }
}

/// The middle value, or the mean of the two middle ones.
pub fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => None,
        n if n % 2 == 1 => Some(values[middle]),
        _ => Some((values[middle - 1] + values[middle]) / 2.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn figures(cpu: f64) -> Figures {
        Figures {
            requests: 1,
            errors: 0,
            requests_per_second: 1000.0 / cpu,
            p50_us: cpu,
            p99_us: cpu,
            p999_us: cpu,
            cpu_us: Some((cpu / 2.0, cpu / 2.0)),
        }
    }

    fn report(weft: &[f64], envoy: &[f64]) -> Report {
        let rounds = |values: &[f64]| values.iter().map(|v| figures(*v)).collect();
        Report {
            cores: 2,
            placement: Placement::OneCpu,
            seconds_per_run: 1.0,
            rounds: weft.len(),
            candidates: vec![WEFT, ENVOY],
            cases: BTreeMap::from([(
                "http1-c32",
                BTreeMap::from([(WEFT, rounds(weft)), (ENVOY, rounds(envoy))]),
            )]),
            syscalls: BTreeMap::new(),
            memory: BTreeMap::new(),
            targets: Vec::new(),
        }
    }

    #[test]
    fn the_median_of_the_rounds_ratios_decides() {
        // Ratios 0.1, 0.5, 0.3: a round with noise does not.
        let mut report = report(&[1.0, 50.0, 3.0], &[10.0, 100.0, 10.0]);
        report.judge();
        let cpu = &report.targets[0];
        assert!((cpu.measured.unwrap() - 0.3).abs() < 1e-9);
        assert_eq!(cpu.met(), Some(true));
        let missing = report
            .targets
            .iter()
            .find(|t| t.name.starts_with("gRPC"))
            .unwrap();
        assert_eq!(missing.met(), None);
    }

    #[test]
    fn a_missed_target_is_called_missed() {
        let mut report = report(&[50.0], &[100.0]);
        report.judge();
        assert!(report.table().contains("**missed**"));
        let rate = report.targets.iter().find(|t| t.at_least).unwrap();
        assert_eq!(rate.met(), Some(false), "{rate:?}");
    }

    #[test]
    fn what_a_policy_adds_is_the_median_of_the_rounds_differences() {
        let mut report = report(&[30.0, 31.0, 32.0], &[60.0, 60.0, 60.0]);
        let cases = std::mem::take(&mut report.cases);
        for case in ["rules-1", "rules-1000"] {
            report.cases.insert(case, cases["http1-c32"].clone());
        }
        // 1, 90 and 2 more than one rule: a round with noise does not decide.
        let of = report.cases.get_mut("rules-1000").unwrap();
        let rounds = [31.0, 121.0, 34.0].map(figures).to_vec();
        of.insert(WEFT, rounds);
        assert_eq!(report.more_than_one_rule("rules-1000", WEFT), Some(2.0));
        assert_eq!(report.more_than_one_rule("rules-1000", ENVOY), Some(0.0));
        assert!(report.table().contains("| 1,000 rules | 34.0 | 60.0 |"));
    }

    #[test]
    fn medians() {
        assert_eq!(median(vec![]), None);
        assert_eq!(median(vec![3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(vec![4.0, 1.0]), Some(2.5));
    }
}
