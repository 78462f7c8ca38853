//! What a proxy's /metrics says, and what has changed between two times.

use std::collections::HashMap;

/// One series: its name and labels, sorted by name.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Series {
    pub name: String,
    labels: Vec<(String, String)>,
}

impl Series {
    /// A label's value; empty when there is none.
    pub fn label(&self, name: &str) -> &str {
        let found = self.labels.iter().find(|(known, _)| known == name);
        found.map_or("", |(_, value)| value)
    }
}

/// All series with their values.
pub type Samples = HashMap<Series, f64>;

/// Reads the text format (version 0.0.4), of the families whose name begins with one of `families`.
/// Lines that cannot be read are left out.
pub fn parse(text: &str, families: &[&str]) -> Samples {
    let wanted = |line: &&str| families.iter().any(|family| line.starts_with(family));
    text.lines().filter(wanted).filter_map(sample).collect()
}

fn sample(line: &str) -> Option<(Series, f64)> {
    let name_end = line.find(['{', ' '])?;
    let (name, rest) = line.split_at(name_end);
    let (mut labels, value) = match rest.strip_prefix('{') {
        Some(rest) => labels(rest)?,
        None => (Vec::new(), rest),
    };
    labels.sort();
    let value = value.split_whitespace().next()?.parse().ok()?;
    let name = name.to_owned();
    Some((Series { name, labels }, value))
}

/// `a="b",c="d"} rest`
fn labels(mut text: &str) -> Option<(Vec<(String, String)>, &str)> {
    let mut labels = Vec::new();
    loop {
        if let Some(rest) = text.strip_prefix('}') {
            return Some((labels, rest));
        }
        let (name, rest) = text.split_once("=\"")?;
        let mut value = String::new();
        let mut chars = rest.char_indices();
        let end = loop {
            match chars.next()? {
                (at, '"') => break at + 1,
                (_, '\\') => value.push(match chars.next()?.1 {
                    'n' => '\n',
                    other => other,
                }),
                (_, other) => value.push(other),
            }
        };
        labels.push((name.to_owned(), value));
        text = rest[end..].trim_start_matches(',');
    }
}

/// How much each counter has grown. One that has become less began anew with its proxy; one that was
/// not there is new.
pub fn growth<'a>(
    before: &'a Samples,
    now: &'a Samples,
) -> impl Iterator<Item = (&'a Series, f64)> {
    now.iter().map(|(series, value)| {
        let old = before.get(series).copied().unwrap_or(0.0);
        let grown = if *value < old { *value } else { value - old };
        (series, grown)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_format_is_read() {
        let text = "\
# HELP weft_requests_total Requests.
# TYPE weft_requests_total counter
weft_requests_total{direction=\"outbound\",destination_service=\"a \\\"b\\\"\\\\,}\\n\"} 12
weft_requests_total{} 3
weft_discovery_connected 1
weft_other{a=\"b\"} 5
weft_requests_total{broken 7
";
        let samples = parse(text, &["weft_requests_total", "weft_discovery_connected"]);
        assert_eq!(samples.len(), 3);
        let (series, value) = samples
            .iter()
            .find(|(series, _)| !series.label("direction").is_empty())
            .unwrap();
        assert_eq!(*value, 12.0);
        assert_eq!(series.label("destination_service"), "a \"b\"\\,}\n");
        assert_eq!(series.label("nothing"), "");
    }

    #[test]
    fn growth_survives_a_restart() {
        let at = |value: f64| parse(&format!("weft_a{{x=\"1\"}} {value}\n"), &["weft_"]);
        let grown = |before: &Samples, now: &Samples| growth(before, now).next().unwrap().1;
        assert_eq!(grown(&at(5.0), &at(9.0)), 4.0);
        assert_eq!(grown(&at(5.0), &at(2.0)), 2.0);
        assert_eq!(grown(&Samples::new(), &at(2.0)), 2.0);
    }
}
