//! The request that is asked about: `GET /items/3 canary: yes`.

/// What a request is matched by.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    pub method: String,
    pub path: String,
    /// Lower-case names.
    pub headers: Vec<(String, String)>,
}

impl std::str::FromStr for Request {
    type Err = String;

    fn from_str(given: &str) -> Result<Self, Self::Err> {
        let wrong =
            || format!("'{given}' is not a request: write 'GET /path' or 'GET /path name: value'");
        let mut words = given.split_whitespace();
        let (Some(method), Some(path)) = (words.next(), words.next()) else {
            return Err(wrong());
        };
        let mut headers: Vec<(String, String)> = Vec::new();
        for word in words {
            match (
                word.strip_suffix(':'),
                word.split_once(':'),
                headers.last_mut(),
            ) {
                (Some(name), _, _) if !name.is_empty() => {
                    headers.push((name.to_ascii_lowercase(), String::new()));
                }
                (None, Some((name, value)), _) if !name.is_empty() && is_token(name) => {
                    headers.push((name.to_ascii_lowercase(), value.to_owned()));
                }
                (None, _, Some((_, value))) => {
                    if !value.is_empty() {
                        value.push(' ');
                    }
                    value.push_str(word);
                }
                _ => return Err(wrong()),
            }
        }
        if !is_token(method) || !path.starts_with(['/', '*']) {
            return Err(wrong());
        }
        Ok(Self {
            method: method.to_owned(),
            path: path.to_owned(),
            headers,
        })
    }
}

/// RFC 9110 section 5.6.2.
pub fn is_token(text: &str) -> bool {
    let special = |c: char| "!#$%&'*+-.^_`|~".contains(c);
    !text.is_empty()
        && text
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || special(c))
}
