//! How things are shown: colours only for people, tables, and one JSON document for programs.

use std::fmt::Write as _;
use std::io::IsTerminal;

use clap::ValueEnum;

/// `--output`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum Format {
    /// For people.
    #[default]
    Table,
    /// For programs: one document on standard output.
    Json,
}

/// What a person should notice about a piece of text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tone {
    Plain,
    Good,
    Warning,
    Bad,
    Dim,
    Strong,
}

/// Whether colours are used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Paint(bool);

impl Paint {
    pub const NEVER: Self = Self(false);
    #[cfg(test)]
    pub const ALWAYS: Self = Self(true);

    /// Colours on a terminal, unless NO_COLOR is set (no-color.org) or TERM is "dumb".
    pub fn stdout() -> Self {
        Self::on(std::io::stdout().is_terminal())
    }

    /// The same for standard error.
    pub fn stderr() -> Self {
        Self::on(std::io::stderr().is_terminal())
    }

    fn on(terminal: bool) -> Self {
        let unwanted = std::env::var_os("NO_COLOR").is_some_and(|v| !v.is_empty())
            || std::env::var_os("TERM").is_some_and(|v| v == "dumb");
        Self(terminal && !unwanted)
    }

    /// `text` in `tone`.
    pub fn paint(self, tone: Tone, text: &str) -> String {
        let code = match tone {
            Tone::Plain => return text.to_owned(),
            Tone::Good => "32",
            Tone::Warning => "33",
            Tone::Bad => "31",
            Tone::Dim => "2",
            Tone::Strong => "1",
        };
        if self.0 && !text.is_empty() {
            format!("\x1b[{code}m{text}\x1b[0m")
        } else {
            text.to_owned()
        }
    }
}

/// A cell of a table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cell {
    text: String,
    tone: Tone,
}

impl Cell {
    pub fn new(tone: Tone, text: impl Into<String>) -> Self {
        Self {
            text: text.into(),
            tone,
        }
    }
}

impl<T: Into<String>> From<T> for Cell {
    fn from(text: T) -> Self {
        Self::new(Tone::Plain, text)
    }
}

/// Columns of equal width, headings in capitals, two spaces between.
pub fn table(headings: &[&str], rows: &[Vec<Cell>], paint: Paint) -> String {
    let mut widths: Vec<usize> = headings.iter().map(|h| h.chars().count()).collect();
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.text.chars().count());
        }
    }
    let mut out = String::new();
    let mut line = |cells: &mut dyn Iterator<Item = (Tone, &str)>| {
        let mut text = String::new();
        let mut pad = 0;
        for ((tone, cell), width) in cells.zip(&widths) {
            let _ = write!(text, "{:pad$}{}", "", paint.paint(tone, cell));
            pad = width - cell.chars().count() + 2;
        }
        let _ = writeln!(out, "{}", text.trim_end());
    };
    line(&mut headings.iter().map(|h| (Tone::Dim, *h)));
    for row in rows {
        line(&mut row.iter().map(|c| (c.tone, c.text.as_str())));
    }
    out
}

/// A stretch of time as people say it: "23 h 50 min", "4.2 s", "350 ms".
pub fn span(seconds: f64) -> String {
    let whole = seconds.abs() as u64;
    let sign = if seconds < 0.0 { "-" } else { "" };
    match whole {
        0 if seconds.abs() < 1.0 => format!("{sign}{:.0} ms", seconds.abs() * 1e3),
        0..60 => format!("{sign}{:.1} s", seconds.abs()),
        60..3600 => format!("{sign}{} min {} s", whole / 60, whole % 60),
        3600..172_800 => format!("{sign}{} h {} min", whole / 3600, whole % 3600 / 60),
        _ => format!("{sign}{} d {} h", whole / 86_400, whole % 86_400 / 3600),
    }
}

/// A number with thousands set apart: 12,345.
pub fn count(n: usize) -> String {
    let digits = n.to_string();
    let mut out = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// Writes to standard output. A reader that has gone (`weft routes | head`) wants no more, and
/// that is no error.
pub fn show(text: &str) {
    use std::io::Write;
    let mut out = std::io::stdout().lock();
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}

/// A document for programs.
pub fn print_json(document: &impl serde::Serialize) -> anyhow::Result<()> {
    show(&format!("{}\n", serde_json::to_string_pretty(document)?));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up_with_and_without_colours() {
        let rows = vec![
            vec![
                Cell::from("shop/front"),
                Cell::new(Tone::Good, "ready"),
                "1".into(),
            ],
            vec!["a".into(), Cell::new(Tone::Bad, "gone"), "".into()],
        ];
        assert_eq!(
            table(&["NAME", "STATE", "N"], &rows, Paint::NEVER),
            "NAME        STATE  N\nshop/front  ready  1\na           gone\n"
        );
        let coloured = table(&["NAME", "STATE", "N"], &rows, Paint::ALWAYS);
        assert!(
            coloured.contains("shop/front  \x1b[32mready\x1b[0m  1"),
            "{coloured:?}"
        );
        assert!(
            coloured.contains("a           \x1b[31mgone\x1b[0m"),
            "{coloured:?}"
        );
    }

    #[test]
    fn numbers_for_people() {
        assert_eq!(count(0), "0");
        assert_eq!(count(999), "999");
        assert_eq!(count(1000), "1,000");
        assert_eq!(count(1234567), "1,234,567");
        assert_eq!(span(0.35), "350 ms");
        assert_eq!(span(4.25), "4.2 s");
        assert_eq!(span(85_800.0), "23 h 50 min");
        assert_eq!(span(-90.0), "-1 min 30 s");
        assert_eq!(span(200_000.0), "2 d 7 h");
    }
}
