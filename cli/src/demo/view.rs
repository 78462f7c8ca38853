//! What a person sees while the demo runs: redrawn in place on a terminal, plain lines elsewhere.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::Write as _;

use crate::output::{Cell, Paint, Tone, count, table};

use super::board::{Act, Board};
use super::topology::MEMBERS;

/// Seconds over which "now" is averaged.
const NOW: f64 = 2.0;

/// The whole picture. `total` is the length of the demo in seconds.
pub fn picture(board: &Board, total: f64, width: usize, paint: Paint) -> String {
    let now = board.now();
    let mut out = String::new();
    let _ = writeln!(
        out,
        "{}  {} of {}\n",
        paint.paint(Tone::Strong, "weft demo"),
        clock(now.min(total)),
        clock(total)
    );
    out.push_str(&headline(board, now, paint));
    out.push('\n');
    out.push_str(&services(board, now, paint));
    out.push('\n');
    out.push_str(&control(board, paint));
    out.push('\n');
    for act in &board.acts {
        out.push_str(&story(act, width, paint));
    }
    out
}

fn clock(seconds: f64) -> String {
    let whole = seconds as u64;
    format!("{:02}:{:02}", whole / 60, whole % 60)
}

/// The golden signals of now, in one line.
pub fn headline(board: &Board, now: f64, paint: Paint) -> String {
    // The last moments are not complete: what was due then may still run.
    let to = (now - 0.2).max(0.0);
    let figures = board.figures((to - NOW).max(0.0), to);
    let tone = match figures.success {
        s if s >= 99.99 => Tone::Good,
        s if s >= 99.0 => Tone::Warning,
        _ => Tone::Bad,
    };
    let (sent, mtls) = board.mtls();
    let share = match super::figures::percent(mtls as usize, sent as usize) {
        share if share >= 100.0 => paint.paint(Tone::Good, "mTLS 100 %"),
        share => paint.paint(Tone::Warning, &format!("mTLS {share:.1} %")),
    };
    format!(
        "{:.0} req/s   {}   p50 {:.1} ms   p99 {:.1} ms   {share}   retries {}   spans {}\n",
        figures.rate,
        paint.paint(tone, &format!("success {:.2} %", figures.success)),
        figures.p50,
        figures.p99,
        count(board.retries() as usize),
        count(board.spans),
    )
}

/// Endpoints by service, with what each gets, and the state of the circuit.
fn services(board: &Board, now: f64, paint: Paint) -> String {
    let latest = board.front.last();
    let before = board.front.iter().rev().find(|(at, _)| *at <= now - NOW);
    let mut rows = Vec::new();
    for service in ["front", "catalog", "pricing", "ledger"] {
        let members = MEMBERS.iter().filter(|m| m.app == service);
        let mut endpoints = Vec::new();
        let mut rate = 0.0;
        for member in members {
            let grown = match (latest, before) {
                (Some((at, now)), Some((before_at, before))) if service != "front" => {
                    let n = now
                        .sent_to(service, member.name)
                        .saturating_sub(before.sent_to(service, member.name));
                    n as f64 / (at - before_at).max(0.1)
                }
                _ => 0.0,
            };
            rate += grown;
            let ejected = latest.is_some_and(|(_, v)| v.is_ejected(service, member.name));
            endpoints.push(match service {
                _ if ejected => format!("{} ejected", member.name),
                "front" => member.name.to_owned(),
                _ => format!("{} {grown:.0}/s", member.name),
            });
        }
        if service == "front" {
            let to = (now - 0.2).max(0.0);
            rate = board.figures((to - NOW).max(0.0), to).rate;
        }
        let caller = if service == "front" {
            "visitor"
        } else {
            "front-1"
        };
        rows.push(vec![
            Cell::from(service),
            Cell::from(format!("{rate:.0}/s")),
            circuit(
                board
                    .proxies
                    .get(caller)
                    .and_then(|p| p.endpoints.get(service)),
            ),
            Cell::from(endpoints.join("  ")),
        ]);
    }
    table(&["SERVICE", "RATE", "CIRCUIT", "ENDPOINTS"], &rows, paint)
}

/// The circuit towards a service, from the states of its endpoints.
fn circuit(states: Option<&BTreeMap<String, String>>) -> Cell {
    let Some(states) = states else {
        return Cell::new(Tone::Dim, "-");
    };
    let of = |state: &str| states.values().filter(|s| *s == state).count();
    let (ready, ejected) = (of("ready"), of("ejected"));
    match (ready, ejected) {
        (0, 0) => Cell::new(Tone::Bad, "no endpoint"),
        (0, _) => Cell::new(Tone::Bad, "open"),
        (_, 0) => Cell::new(Tone::Good, "closed"),
        (ready, out) => Cell::new(Tone::Warning, format!("{out} of {} out", ready + out)),
    }
}

fn control(board: &Board, paint: Paint) -> String {
    let c = &board.control;
    if !c.up {
        return format!(
            "control plane  {}\n",
            paint.paint(Tone::Bad, "gone; the proxies go on with what they know")
        );
    }
    let mut text = format!(
        "control plane  {} of {} proxies connected",
        c.connected,
        MEMBERS.len()
    );
    match (c.behind, c.refused) {
        (0, 0) => text.push_str(", all have acknowledged"),
        (behind, 0) => {
            let _ = write!(text, ", {behind} behind");
        }
        (_, refused) => {
            let _ = write!(text, ", {refused} tables refused");
        }
    }
    text.push('\n');
    text
}

/// One act for people.
pub fn story(act: &Act, width: usize, paint: Paint) -> String {
    let mut out = String::new();
    let tone = match (act.ended, act.expected.iter().all(|e| e.held)) {
        (None, _) => Tone::Strong,
        (_, true) => Tone::Good,
        (_, false) => Tone::Bad,
    };
    let head = format!("{:>5.1} s  ", act.began);
    let indent = " ".repeat(head.chars().count());
    let _ = writeln!(out, "{head}{}", paint.paint(tone, act.name));
    for sentence in [&act.did, &act.saw] {
        for line in wrap(sentence, width.saturating_sub(indent.len()).max(20)) {
            let _ = writeln!(out, "{indent}{line}");
        }
    }
    for missed in act.expected.iter().filter(|e| !e.held) {
        let text = format!("not as expected: {}", missed.what);
        let _ = writeln!(out, "{indent}{}", paint.paint(Tone::Bad, &text));
    }
    out
}

/// Breaks text between words.
fn wrap(text: &str, width: usize) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for word in text.split_whitespace() {
        match lines.last_mut() {
            Some(line) if line.chars().count() + 1 + word.chars().count() <= width => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.to_owned()),
        }
    }
    lines
}

/// A terminal on which the picture is drawn again and again in the same place.
#[derive(Debug)]
pub struct Canvas {
    /// Lines drawn last time.
    drawn: usize,
}

impl Canvas {
    pub fn new() -> Self {
        Self { drawn: 0 }
    }

    /// Draws over what was drawn before. Lines that do not fit are cut, so that the cursor's way
    /// back is known.
    pub fn draw(&mut self, picture: &str, (width, height): (usize, usize)) {
        let lines: Vec<&str> = picture.lines().collect();
        // The newest stands at the end: when there are too many lines, the head of the picture
        // stays and the oldest acts go.
        let room = height.saturating_sub(1).max(8);
        let shown = fit(&lines, room);
        let mut out = String::new();
        if self.drawn > 0 {
            let _ = write!(out, "\x1b[{}A", self.drawn);
        }
        for line in &shown {
            let _ = write!(out, "\r\x1b[2K{}\n", cut(line, width));
        }
        out.push_str("\x1b[J");
        self.drawn = shown.len();
        let mut stdout = std::io::stdout().lock();
        let _ = stdout.write_all(out.as_bytes());
        let _ = stdout.flush();
    }
}

/// The first ten lines and as many of the last as there is room for.
fn fit<'a>(lines: &[&'a str], room: usize) -> Vec<&'a str> {
    const HEAD: usize = 11;
    if lines.len() <= room {
        return lines.to_vec();
    }
    let head = HEAD.min(room);
    let tail = room - head;
    let mut out = lines[..head].to_vec();
    out.extend_from_slice(&lines[lines.len() - tail..]);
    out
}

/// At most `width` characters, colours not counted.
fn cut(line: &str, width: usize) -> String {
    let mut out = String::new();
    let mut shown = 0;
    let mut in_escape = false;
    for c in line.chars() {
        if c == '\x1b' {
            in_escape = true;
        }
        if !in_escape {
            if shown == width {
                continue;
            }
            shown += 1;
        }
        out.push(c);
        if in_escape && c.is_ascii_alphabetic() {
            in_escape = false;
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::super::board::{ControlView, Shared, expect};
    use super::super::observe::ProxyView;
    use super::*;
    use crate::apps::visitor::Report;

    #[test]
    fn the_picture_has_everything_in_it() {
        let shared = Shared::new();
        let mut board = shared.lock();
        for n in 0..100u32 {
            let report = Report {
                at: board.epoch(-1.0) + f64::from(n),
                took: 4.0,
                method: "GET".to_owned(),
                path: "/page/1".to_owned(),
                status: 200,
                said: String::new(),
            };
            board.reports.push(report);
        }
        let states = |pairs: &[(&str, &str)]| {
            let owned = |(w, s): &(&str, &str)| ((*w).to_owned(), (*s).to_owned());
            pairs.iter().map(owned).collect()
        };
        board.proxies.insert(
            "front-1",
            ProxyView {
                sent: 200,
                sent_mtls: 200,
                retries: 1234,
                endpoints: [
                    (
                        "catalog".to_owned(),
                        states(&[
                            ("catalog-1", "ready"),
                            ("catalog-2", "ready"),
                            ("catalog-3", "ejected"),
                        ]),
                    ),
                    (
                        "pricing".to_owned(),
                        states(&[("pricing-1", "ready"), ("pricing-2", "ready")]),
                    ),
                    ("ledger".to_owned(), states(&[("ledger-1", "ejected")])),
                ]
                .into(),
                ..ProxyView::default()
            },
        );
        board.control = ControlView {
            up: true,
            connected: 8,
            behind: 0,
            refused: 0,
        };
        board.acts.push(Act {
            name: "slow endpoint",
            began: 7.0,
            ended: Some(14.0),
            did: "catalog-2 took 400 ms longer.".to_owned(),
            saw: "Its share fell from 33 % to 2 %.".to_owned(),
            expected: vec![expect(false, "its share falls by half")],
            ..Act::default()
        });
        let picture = picture(&board, 60.0, 80, Paint::NEVER);
        for part in [
            "00:00 of 01:00",
            "success 100.00 %",
            "mTLS 100 %",
            "retries 1,234",
            "1 of 3 out",
            "closed",
            "open",
            "catalog-3 0/s",
            "8 of 8 proxies connected, all have acknowledged",
            "  7.0 s  slow endpoint\n         catalog-2 took 400 ms longer.\n",
            "not as expected: its share falls by half",
        ] {
            assert!(picture.contains(part), "{part} is not in\n{picture}");
        }
        assert!(!picture.contains('\x1b'));
    }

    #[test]
    fn lines_are_cut_by_what_is_seen() {
        assert_eq!(cut("\x1b[32mabcdef\x1b[0m", 3), "\x1b[32mabc\x1b[0m");
        assert_eq!(cut("abc", 3), "abc");
    }

    #[test]
    fn words_are_not_broken() {
        assert_eq!(wrap("a bb ccc dddd", 6), ["a bb", "ccc", "dddd"]);
        assert_eq!(wrap("", 6), Vec::<String>::new());
    }

    #[test]
    fn a_low_terminal_keeps_the_head_and_the_newest() {
        let lines: Vec<String> = (0..50).map(|n| n.to_string()).collect();
        let lines: Vec<&str> = lines.iter().map(String::as_str).collect();
        let shown = fit(&lines, 20);
        assert_eq!(shown.len(), 20);
        assert_eq!(
            (shown[0], shown[10], shown[11], shown[19]),
            ("0", "10", "41", "49")
        );
    }
}
