//! Filters of a route and of one of its backends, put together.

use http::{HeaderName, HeaderValue};
use weft_api::proto;
use weft_api::proto::filter::Filter as Given;

use super::compile::{BackendDraft, Backends, Invalid, Result, draft_backend, refuse};
use crate::tables::{Cors, FieldEdit, Mirror, PathEdit, Plan, Redirect};

/// Mirrors of a route.
const MAX_MIRRORS: usize = 16;
/// Fields that say where a message ends or how its connection is used, and the one that a rewrite
/// changes.
const NOT_TO_EDIT: [&str; 9] = [
    "connection",
    "content-length",
    "host",
    "keep-alive",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
];

/// A plan whose mirrors are not linked yet.
pub(super) struct PlanDraft<'a> {
    plan: Plan,
    mirrors: Vec<(BackendDraft<'a>, f64)>,
}

impl<'a> PlanDraft<'a> {
    pub(super) fn build(self, backends: &mut Backends<'a, '_>) -> Plan {
        Plan {
            mirrors: self
                .mirrors
                .into_iter()
                .map(|(backend, share)| Mirror {
                    backend: backends.get(backend),
                    share,
                })
                .collect(),
            ..self.plan
        }
    }
}

/// What is changed on the way to a backend and back; `None`: nothing.
pub(super) fn plan<'a>(
    of_route: &'a [proto::Filter],
    of_backend: &'a [proto::Filter],
) -> Result<Option<PlanDraft<'a>>> {
    let mut draft = PlanDraft {
        plan: Plan::default(),
        mirrors: Vec::new(),
    };
    let mut anything = false;
    for filter in of_route.iter().chain(of_backend) {
        let plan = &mut draft.plan;
        match kind(filter)? {
            Given::RequestHeaders(edits) => fields(edits, &mut plan.request)?,
            Given::ResponseHeaders(edits) => fields(edits, &mut plan.response)?,
            Given::Rewrite(rewrite) => {
                if !rewrite.hostname.is_empty() {
                    plan.host = Some(host(&rewrite.hostname)?.into());
                }
                if let Some(edit) = path_edit(rewrite.path.as_ref())? {
                    plan.path = Some(edit);
                }
            }
            Given::Mirror(mirror) => {
                let Some(backend) = &mirror.backend else {
                    refuse!("a mirror names no backend");
                };
                if mirror.denominator == 0 || mirror.numerator > mirror.denominator {
                    refuse!(
                        "{}/{} is not a share of the requests to mirror",
                        mirror.numerator,
                        mirror.denominator
                    );
                }
                let share = f64::from(mirror.numerator) / f64::from(mirror.denominator);
                draft.mirrors.push((draft_backend(backend)?, share));
                if draft.mirrors.len() > MAX_MIRRORS {
                    refuse!("it has more than {MAX_MIRRORS} mirrors");
                }
            }
            Given::Redirect(_) | Given::Cors(_) => continue,
        }
        anything = true;
    }
    draft.plan.redirect = redirect(of_backend)?;
    draft.plan.cors = cors(of_backend)?;
    anything |= draft.plan.redirect.is_some() || draft.plan.cors.is_some();
    Ok(anything.then_some(draft))
}

/// A filter this proxy knows; one it does not know must not be skipped.
fn kind(filter: &proto::Filter) -> Result<&Given> {
    match &filter.filter {
        Some(kind) => Ok(kind),
        None => refuse!("a filter is not known to this version of the proxy"),
    }
}

pub(super) fn redirect(filters: &[proto::Filter]) -> Result<Option<Box<Redirect>>> {
    for filter in filters {
        let Given::Redirect(given) = kind(filter)? else {
            continue;
        };
        let status = match u16::try_from(given.status) {
            Ok(status @ (301 | 302 | 303 | 307 | 308)) => status,
            _ => refuse!("{} is not a redirect's status code", given.status),
        };
        if !matches!(given.scheme.as_str(), "" | "http" | "https") {
            refuse!("a redirect to the scheme '{}' is not known", given.scheme);
        }
        let some = |text: &str| (!text.is_empty()).then(|| text.into());
        return Ok(Some(Box::new(Redirect {
            scheme: some(&given.scheme),
            hostname: match given.hostname.as_str() {
                "" => None,
                name => Some(host(name)?.into()),
            },
            path: path_edit(given.path.as_ref())?,
            port: match u16::try_from(given.port) {
                Ok(0) => None,
                Ok(port) => Some(port),
                Err(_) => refuse!("a redirect has port {}", given.port),
            },
            status,
        })));
    }
    Ok(None)
}

pub(super) fn cors(filters: &[proto::Filter]) -> Result<Option<Box<Cors>>> {
    for filter in filters {
        let Given::Cors(given) = kind(filter)? else {
            continue;
        };
        let list = |texts: &[String]| -> Result<Vec<Box<str>>> {
            texts
                .iter()
                .map(|text| {
                    if text.is_empty() || !text.bytes().all(|byte| byte.is_ascii_graphic()) {
                        refuse!("'{text}' cannot stand in a CORS policy");
                    }
                    Ok(text.as_str().into())
                })
                .collect()
        };
        return Ok(Some(Box::new(Cors {
            origins: list(&given.allow_origins)?,
            credentials: given.allow_credentials,
            methods: list(&given.allow_methods)?,
            headers: list(&given.allow_headers)?,
            expose: list(&given.expose_headers)?,
            max_age: given.max_age_seconds,
        })));
    }
    Ok(None)
}

fn host(name: &str) -> Result<&str> {
    let ok = |byte: u8| byte.is_ascii_alphanumeric() || b"-._:[]".contains(&byte);
    if !name.bytes().all(ok) {
        refuse!("'{name}' is not a host");
    }
    Ok(name)
}

fn path_edit(given: Option<&proto::PathEdit>) -> Result<Option<PathEdit>> {
    use proto::path_edit::Edit;
    let Some(given) = given else { return Ok(None) };
    let Some(edit) = &given.edit else {
        refuse!("a path edit is not known to this version of the proxy");
    };
    let (Edit::Full(text) | Edit::Prefix(text)) = edit;
    let visible = text.bytes().all(|byte| byte.is_ascii_graphic());
    if !visible || text.contains(['?', '#']) {
        refuse!("'{text}' cannot stand in a path");
    }
    Ok(Some(match edit {
        Edit::Full(path) => PathEdit::Full(path.as_str().into()),
        Edit::Prefix(path) => PathEdit::Prefix(path.as_str().into()),
    }))
}

/// Adds a filter's edits to those before it: what comes of each name is decided once.
fn fields(given: &proto::HeaderEdits, edits: &mut Vec<FieldEdit>) -> Result<()> {
    for header in &given.set {
        let value = header_value(&header.value)?;
        let edit = edit(&header.name, edits)?;
        edit.keep = false;
        edit.values = vec![value];
    }
    for header in &given.add {
        let value = header_value(&header.value)?;
        edit(&header.name, edits)?.values.push(value);
    }
    for name in &given.remove {
        let edit = edit(name, edits)?;
        edit.keep = false;
        edit.values.clear();
    }
    Ok(())
}

/// The edit of a name, made when there is none.
fn edit<'e>(name: &str, edits: &'e mut Vec<FieldEdit>) -> Result<&'e mut FieldEdit> {
    let spelling = name;
    let name = HeaderName::from_bytes(name.as_bytes())
        .map_err(|_| Invalid(format!("'{name}' is not a header's name")))?;
    if NOT_TO_EDIT.contains(&name.as_str()) {
        refuse!("a filter may not change the header '{name}'");
    }
    let at = match edits.iter().position(|edit| edit.name == name) {
        Some(at) => at,
        None => {
            edits.push(FieldEdit {
                name,
                spelling: spelling.into(),
                keep: true,
                values: Vec::new(),
            });
            edits.len() - 1
        }
    };
    Ok(&mut edits[at])
}

fn header_value(value: &str) -> Result<HeaderValue> {
    HeaderValue::from_str(value)
        .map_err(|_| Invalid("a filter sets a value that a header cannot hold".to_owned()))
}
